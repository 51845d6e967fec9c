"""Read images from a Parquet file: a column of bytes, or of Hugging Face's `{bytes, path}`, and further columns.

Only the needed columns are read, a few pages at a time, whatever the size of a row group. A unit is a range of the
file's bytes. It has the row groups whose middle byte is in that range, so units follow from the file's size alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.arrow_values import has_times
from pipeline.errors import DamagedError, NoImagesError, Rejected, ShardError
from pipeline.formats.schema import to_cache_name, to_source_name
from pipeline.limits import DEFAULT_LIMITS, Limits, check_key
from pipeline.readers import parquet_footer
from pipeline.readers.parquet_keys import FileKeys, KeySet
from pipeline.records import Reject, Sample
from pipeline.text import printable_key
from pipeline.values import to_json_value

MIN_BYTES = 12  # of a Parquet file: two magic numbers and the size of its footer
BATCH_ROWS = 16
BUFFER_BYTES = 4 << 20  # per column
NO_IMAGES = "no_images"  # the kind under which a unit's report counts a skipped file
KEY = "key"  # key column of img2dataset's metadata
_IMAGE_COLUMN_NAMES = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "img",
    "picture",
    "bytes",
)  # preferred names if several columns are binary


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
        for name, count in Counter(file.schema_arrow.names).items():
            if count > 1:
                raise ShardError(f"{url} has {count} columns with the name {name}; rename or remove one of them")
        yield file


@contextmanager
def damage_at(offset: int, url: str) -> Iterator[None]:
    """Turn Arrow's errors into a DamagedError at this byte of the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # column names that are not UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{url} cannot be read as Parquet: {reason}", at=offset) from error


def find_image_column(schema: pa.Schema, wanted: str | None, url: str) -> str:
    """Return the name of the column with the images: `wanted`, or otherwise the only candidate.

    A column without any value may have no type. If its name is an image column's, it is an image column without images.
    Raises NoImagesError if no column may hold images. Raises ShardError if a column may hold images in a form that is
    not supported, and if several columns hold bytes but none has the name of an image column.
    """
    binary = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in _IMAGE_COLUMN_NAMES if name in binary]
    empty = [name for name in _IMAGE_COLUMN_NAMES if name in schema.names and _has_no_type(schema.field(name).type)]
    if wanted is not None:
        if wanted not in binary and not (wanted in schema.names and _has_no_type(schema.field(wanted).type)):
            problem = (
                "holds no bytes" if wanted in schema.names else f"does not exist; columns: {', '.join(schema.names)}"
            )
            raise ShardError(f"{url}: the column {wanted} {problem}; name another one with --image-column")
        return wanted
    if len(binary) > 1 and not named and not empty:
        raise ShardError(f"{url} has several columns with bytes, {', '.join(binary)}; name one with --image-column")
    if candidates := [*named, *empty, *binary]:
        return str(candidates[0])
    nothing = f"{url} has no column with the bytes of images: it has {', '.join(schema.names)}"
    if hint := _explain_unsupported_images(schema):
        raise ShardError(f"{nothing}; {hint}. If the file has no images, remove it from the sources")
    raise NoImagesError(nothing + _suggest_download(schema))


def _explain_unsupported_images(schema: pa.Schema) -> str:
    """Return which column may hold images in a form that is not supported, and a remedy; "" if there is none."""
    for field in schema:
        if _has_bytes_inside(field.type) and _is_list(field.type):
            return f"{field.name} is a list of images: write one row per image"
        if _has_bytes_inside(field.type):
            return f"{field.name} has bytes inside it: write them to a separate column"
    for name in _IMAGE_COLUMN_NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            return f"{name} is {kind}, not binary: decode base64 to bytes, or download the images that it names"
    return ""


def _suggest_download(schema: pa.Schema) -> str:
    """Return a remedy for a file with URLs of images; "" if there are none."""
    names = [name for name in schema.names if name.lower() in ("url", "urls", "image_url", "img_url")]
    remedy = "give the file itself as the source, or first download them, for example with img2dataset"
    return f"; to read the images that {names[0]} names, {remedy}" if names else ""


def check_key_column(schema: pa.Schema, key_column: str | None, images: str, url: str) -> None:
    """Raise ShardError if a file lacks the requested key column. images: the column with the images."""
    if key_column is not None and key_column not in schema.names:
        others = ", ".join(name for name in schema.names if name != images) or "no other column"
        raise ShardError(f"--key-column: {url} has no column {key_column}; it has {others}")


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
        images = find_image_column(file.schema_arrow, image_column, url)
        check_key_column(file.schema_arrow, key_column, images, url)
        return _select_passable(file.schema_arrow, images)


def read_available_metadata_columns(stream: BinaryIO, url: str, limits: Limits = DEFAULT_LIMITS) -> pa.Schema:
    """Return the columns of img2dataset's metadata beside a tar. Raises ShardError if the file is not such metadata."""
    with open_parquet(stream, url, limits) as file:
        _check_metadata(file.schema_arrow, url)
        return _select_passable(file.schema_arrow, None)


def read_metadata(
    stream: BinaryIO, url: str, wanted: pa.Schema, limits: Limits = DEFAULT_LIMITS
) -> dict[str, dict[str, Any]]:
    """Return the wanted columns of img2dataset's metadata, by key. A Rejected replaces text that is not UTF-8."""
    with open_parquet(stream, url, limits) as file:
        _check_metadata(file.schema_arrow, url)
        rows: dict[str, dict[str, Any]] = {}
        names = [to_source_name(name) for name in wanted.names if to_source_name(name) in file.schema_arrow.names]
        for batch in file.iter_batches(columns=sorted({KEY, *names}), use_threads=False):
            values = _convert_columns(batch, wanted, url)
            for index, key in enumerate(_convert_keys(batch.column(KEY), KEY)):
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
    Rejects (stage "read"): `no_key`, `bad_key`, `duplicate_key`, `no_image`, `image_not_embedded`,
    `too_many_bytes`, `bad_text`.
    Raises DamagedError if the file is damaged, and ShardError if a column's type differs from the cache's.
    """
    with open_parquet(stream, url, limits) as file:
        schema = file.schema_arrow
        try:
            images = find_image_column(schema, image_column, url)
        except NoImagesError:
            if skipped is not None:
                skipped[NO_IMAGES] += file_range[0] == 0
            return
        check_key_column(schema, key_column, images, url)
        groups = select_row_groups(parquet_footer.find_row_group_middles(stream, url), file_range, size)
        rows_of_groups = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if rows_of_groups != file.metadata.num_rows:
            footer = stream.seek(0, 2) - 8 - file.metadata.serialized_size
            raise DamagedError(f"{url} is damaged: its footer has two different numbers of rows", at=footer)
        earlier_keys = _read_earlier_keys(file, groups, key_column, known or FileKeys())
        keys: set[str] = set()
        names = {images, *([key_column] if key_column else []), *map(to_source_name, wanted.names)}
        rows = _read_rows(file, groups, sorted(names & set(schema.names)), images, key_column, wanted, url)
        for position, (row, key, image, columns) in enumerate(rows):
            name = str(row) if key is None or isinstance(key, Rejected) else _escape(key)
            try:
                for value in (key, image, *columns.values()):
                    if isinstance(value, Rejected):
                        raise value
                if key is None and key_column is not None:
                    raise Rejected("read", "no_key")
                check_key(name, limits)
                if name in keys or name in earlier_keys:
                    raise Rejected("read", "duplicate_key")
                keys.add(name)
                yield Sample(position, name, _get_bytes(image, limits), columns)
            except Rejected as error:
                yield Reject.from_error(position, printable_key(name, limits.key_bytes), error)


def select_row_groups(middles: Sequence[int], file_range: tuple[int, int], size: int) -> list[int]:
    """Return the row groups whose middle byte is in range k of n of the file's bytes."""
    k, n = file_range
    return [group for group, middle in enumerate(middles) if k * size <= middle * n < (k + 1) * size]


def _read_rows(
    file: Any,
    groups: list[int],
    names: list[str],
    images: str,
    key_column: str | None,
    wanted: pa.Schema,
    url: str,
) -> Iterator[tuple[int, Any, Any, Mapping[str, Any]]]:
    """Yield the number in the file, key, image and columns of each row. Only a few rows are in memory at a time."""
    for group in groups:
        first, count = sum(file.metadata.row_group(before).num_rows for before in range(group)), 0
        with damage_at(_find_start(file, group), url):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                values = _convert_columns(batch, wanted, url)
                keys = _convert_keys(batch.column(key_column), key_column) if key_column else [None] * len(batch)
                for index in range(len(batch)):
                    columns = {name: column[index] for name, column in values.items()}
                    image = _convert_value(batch.column(images)[index], images)
                    yield first + count + index, keys[index], image, columns
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
            yield from (_escape(key) for key in _convert_keys(batch.column(0), str(key_column)) if isinstance(key, str))

    return known.read_before(groups[0] if groups and key_column is not None else 0, read)


def convert_rows(rows: pa.Table, wanted: pa.Schema, url: str) -> list[dict[str, Any]]:
    """Return the wanted columns of each row, by name in the cache. A Rejected replaces text that is not UTF-8."""
    values = _convert_columns(rows, wanted, url)
    return [{name: column[index] for name, column in values.items()} for index in range(len(rows))]


def _convert_columns(batch: Any, wanted: pa.Schema, url: str) -> dict[str, list[Any]]:
    """Return the wanted columns that a batch has, by their names in the cache, cast to the wanted types."""
    values: dict[str, list[Any]] = {}
    for field in wanted:
        name = to_source_name(field.name)
        if name not in batch.schema.names:
            continue
        try:
            array = batch.column(name).cast(field.type)
        except pa.ArrowException as error:
            found = batch.schema.field(name).type
            raise ShardError(f"{url}: the column {name} is {found}, but in the cache it is {field.type}") from error
        values[field.name] = _convert_values(array, name)
    return values


def _convert_keys(array: Any, name: str) -> list[Any]:
    """Return keys as text, whatever their type: None for a missing key, a Rejected for one that is not UTF-8."""
    return [_convert_key(value, name) for value in _convert_values(array, name)]


def _convert_key(value: Any, name: str) -> Any:
    """Return one key as `_convert_keys` does."""
    try:
        if isinstance(value, pa.Scalar):  # a time
            value = to_json_value(value)
        if isinstance(value, bytes):
            value = value.decode()
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)
    return value if value is None or isinstance(value, Rejected) else str(value)


def _convert_values(array: Any, name: str) -> list[Any]:
    """Return the values of a column as Python objects, but times as Arrow scalars, which cover more years.

    A Rejected replaces text that is not UTF-8, which Arrow does not check.
    """
    if has_times(array.type):
        return [_check_scalar(scalar, name) for scalar in array]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_convert_value(scalar, name) for scalar in array]


def _convert_value(scalar: Any, name: str) -> Any:
    """Return a scalar's Python object, or a Rejected if its text is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)


def _check_scalar(scalar: Any, name: str) -> Any:
    """Return an Arrow scalar with times unchanged, or a Rejected if it contains text that is not UTF-8."""
    try:
        to_json_value(scalar)
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)
    return scalar


def _get_bytes(image: Any, limits: Limits) -> bytes:
    """Return the bytes of a value of the image column. Raises Rejected if there are none or too many."""
    if isinstance(image, dict):
        if image["bytes"] is None and image.get("path"):
            raise Rejected("read", "image_not_embedded")
        image = image["bytes"]
    if image is None:
        raise Rejected("read", "no_image")
    if len(image) > limits.image_bytes:
        raise Rejected("read", "too_many_bytes", len(image), limits.image_bytes)
    return bytes(image)


def _escape(key: str) -> str:
    """Return a key that webdataset can split: with `%` as %25 and `.` as %2E."""
    return key.replace("%", "%25").replace(".", "%2E")


def _select_passable(schema: pa.Schema, images: str | None) -> pa.Schema:
    """Return the columns that can be copied: all except the images, with dictionaries as their value type."""
    types = {field.name: field.type for field in schema if field.name != images}
    plain = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in types.items()}
    return pa.schema([(to_cache_name(name), kind) for name, kind in plain.items()])


def holds_bytes(kind: Any) -> bool:
    """Whether a type can hold images: binary, a struct with a binary field `bytes`, or a dictionary of these."""
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _has_no_type(kind: Any) -> bool:
    """Whether a type is null, as in a column without values, or is a struct whose `bytes` are null."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and bool(pa.types.is_null(kind.field(index).type))
    return bool(pa.types.is_null(kind))


def _has_bytes_inside(kind: Any) -> bool:
    """Whether a type contains bytes in a list, a struct or a map."""
    inside = [kind.field(index).type for index in range(kind.num_fields)]
    return any(_is_binary(inner) or _has_bytes_inside(inner) for inner in inside)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


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
