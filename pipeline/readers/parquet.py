"""Read images and further columns from a Parquet file.

Only the needed columns are read, a few pages at a time, whatever the size of a row group. A unit is a range of the
file's bytes. It has the row groups whose middle byte is in that range, so units follow from the file's size alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.error_text import first_line
from pipeline.errors import DamagedError, NoImagesError, ShardError
from pipeline.formats.schema import to_source_name
from pipeline.limits import DEFAULT_LIMITS, Limits
from pipeline.readers import parquet_footer
from pipeline.readers.image_column import check_names, flatten_schema, get_column, holds_bytes, select_passable
from pipeline.readers.parquet_keys import FileKeys, KeySet
from pipeline.readers.skipped import NO_IMAGES
from pipeline.readers.table_rows import (
    BATCH_ROWS,
    TableColumns,
    TableRow,
    choose_columns,
    convert_columns,
    convert_keys,
    make_row_samples,
    read_rows,
)
from pipeline.records import Reject, Sample
from pipeline.text import escape_key

MIN_BYTES = 12  # of a Parquet file: two magic numbers and the size of its footer
BUFFER_BYTES = 4 << 20  # per column
KEY = "key"  # key column of img2dataset's metadata


@contextmanager
def open_parquet(stream: BinaryIO, url: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file.

    Raises DamagedError, which names the URL, if the file is damaged, or if a read inside the block fails. Its byte is
    the start of the footer unless a more precise one is known. Raises ShardError if two columns have one name.
    """
    size = stream.seek(0, 2)
    if size < MIN_BYTES:  # checked first, because stores refuse a seek before the start, each with its own error
        raise DamagedError(f"{url} is not a Parquet file: it has {size} bytes", at=0)
    stream.seek(size - 8)
    end = stream.read(8)
    if end[4:] != b"PAR1":
        raise DamagedError(f"{url} is not a Parquet file, or is truncated: it has no end mark", at=size - 8)
    footer = max(0, size - 8 - int.from_bytes(end[:4], "little"))
    if int.from_bytes(end[:4], "little") > limits.footer_bytes:
        message = (
            f"{url} has a footer of more than {limits.footer_bytes} bytes; --input-limit footer_bytes=N accepts it"
        )
        raise DamagedError(message, at=footer)
    stream.seek(0)
    with damage_at(footer, url):
        file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        check_names(file.schema_arrow, url)
        yield file


@contextmanager
def damage_at(offset: int, url: str) -> Iterator[None]:
    """Turn Arrow's errors into a DamagedError at this byte of the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # column names that are not UTF-8
        reason = first_line(error) or type(error).__name__
        raise DamagedError(f"{url} cannot be read as Parquet: {reason}", at=offset) from error


def read_available_columns(
    stream: BinaryIO,
    url: str,
    image_column: str | None,
    limits: Limits = DEFAULT_LIMITS,
    key_column: str | None = None,
) -> pa.Schema:
    """Return the columns beside the images of a file, by their names in a cache.

    Raises ShardError if the file lacks the requested image or key column.
    """
    with open_parquet(stream, url, limits) as file:
        columns = choose_columns(file.schema_arrow, image_column, key_column, pa.schema([]), url)
        return select_passable(flatten_schema(file.schema_arrow), columns.images)


def read_available_metadata_columns(stream: BinaryIO, url: str, limits: Limits = DEFAULT_LIMITS) -> pa.Schema:
    """Return the columns of img2dataset's metadata beside a tar. Raises ShardError if the file is not such metadata."""
    with open_parquet(stream, url, limits) as file:
        _check_metadata(file.schema_arrow, url)
        return select_passable(file.schema_arrow, None)


def read_metadata(
    stream: BinaryIO, url: str, wanted: pa.Schema, limits: Limits = DEFAULT_LIMITS
) -> dict[str, dict[str, Any]]:
    """Return the wanted columns of img2dataset's metadata, by key. A Rejected replaces text that is not UTF-8."""
    with open_parquet(stream, url, limits) as file:
        _check_metadata(file.schema_arrow, url)
        rows: dict[str, dict[str, Any]] = {}
        names = [to_source_name(name) for name in wanted.names if to_source_name(name) in file.schema_arrow.names]
        for batch in file.iter_batches(columns=sorted({KEY, *names}), use_threads=False):
            values = convert_columns(batch, wanted, url)
            for index, key in enumerate(convert_keys(batch.column(KEY), KEY)):
                if isinstance(key, str):  # a sample's key is always text
                    rows[key] = {name: column[index] for name, column in values.items()}
        return rows


def read_parquet(
    stream: BinaryIO,
    url: str,
    size: int,
    file_range: tuple[int, int],
    image_column: str | None,
    key_column: str | None,
    wanted: pa.Schema,
    limits: Limits = DEFAULT_LIMITS,
    known: FileKeys | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[Sample | Reject]:
    """Yield the samples of range k of n of a Parquet file, in the order of its rows. file_range: (k, n).

    size: bytes of the file. image_column: default: the only candidate.
    key_column: default: the number of the row in the file.
    wanted: the columns to copy, with their names and types in the cache; columns that the file lacks are omitted.
    known: keys of the file that were read before. skipped: receives 1, once per file, for a file without images.
    Rejects: see `make_row_samples`.
    Raises DamagedError if the file is damaged, and ShardError if a column's type differs from the cache's.
    """
    with open_parquet(stream, url, limits) as file:
        try:
            columns = choose_columns(file.schema_arrow, image_column, key_column, wanted, url)
        except NoImagesError:
            if skipped is not None:
                skipped[NO_IMAGES] += file_range[0] == 0
            return
        groups = select_row_groups(parquet_footer.find_row_group_middles(stream, url), file_range, size)
        rows_of_groups = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if rows_of_groups != file.metadata.num_rows:
            footer = stream.seek(0, 2) - 8 - file.metadata.serialized_size
            raise DamagedError(f"{url} is damaged: its footer has two different numbers of rows", at=footer)
        earlier_keys = _read_earlier_keys(file, groups, key_column, known or FileKeys())
        rows = _read_groups(file, groups, columns, url)
        yield from make_row_samples(rows, key_column is not None, earlier_keys, limits)


def select_row_groups(middles: Sequence[int], file_range: tuple[int, int], size: int) -> list[int]:
    """Return the row groups whose middle byte is in range k of n of the file's bytes."""
    k, n = file_range
    return [group for group, middle in enumerate(middles) if k * size <= middle * n < (k + 1) * size]


def _read_groups(file: Any, groups: list[int], columns: TableColumns, url: str) -> Iterator[TableRow]:
    """Yield the rows of row groups. Only a few are in memory at a time."""
    for group in groups:
        first, count = sum(file.metadata.row_group(before).num_rows for before in range(group)), 0
        with damage_at(_find_start(file, group), url):
            names = list(columns.names)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                yield from read_rows(batch, first + count, columns, url)
                count += len(batch)
        if count != file.metadata.row_group(group).num_rows:
            message = f"{url} is damaged: row group {group} has {count} rows, which differs from its footer"
            raise DamagedError(message, at=_find_start(file, group))


def _find_start(file: Any, group: int) -> int:
    """Return the first byte of a row group. Safe only after `parquet_footer.find_row_group_middles`."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    return max(0, min(int(chunk.dictionary_page_offset or chunk.data_page_offset) for chunk in chunks))


def _read_earlier_keys(file: Any, groups: list[int], key_column: str | None, known: FileKeys) -> KeySet:
    """Return the keys of the rows before a range, so that a key is unique in the whole file."""

    def read(group: int) -> Iterator[str]:
        for batch in file.iter_batches(row_groups=[group], columns=[key_column], use_threads=False):
            keys = convert_keys(get_column(batch, str(key_column)), str(key_column))
            yield from (escape_key(key) for key in keys if isinstance(key, str))

    return known.read_before(groups[0] if groups and key_column is not None else 0, read)


def _check_metadata(schema: pa.Schema, url: str) -> None:
    """Raise ShardError if a file beside a tar is not img2dataset's metadata."""
    if any(holds_bytes(field.type) for field in schema):
        raise ShardError(
            f"{url} is beside a tar with the same name but has images itself; rename it, or move it to another folder"
        )
    if KEY not in schema.names:
        raise ShardError(
            f"{url} is beside a tar with the same name but has no column '{KEY}' to join its rows by; rename it"
        )
