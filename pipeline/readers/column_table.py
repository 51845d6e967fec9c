"""Read a table of columns for the rows of a cache, some rows at a time: Parquet, Arrow, CSV, TSV and JSONL files."""

import codecs
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv

from pipeline.errors import ShardError
from pipeline.limits import Limits
from pipeline.readers import arrow, parquet
from pipeline.readers.csv_quotes import open_quoted
from pipeline.readers.image_column import check_names
from pipeline.readers.table import (
    DELIMITERS,
    Written,
    choose_type,
    convert_numbers,
    find_written,
    get_value_type,
    make_csv_options,
    name_format,
    parse_jsonl,
    read_header,
)
from pipeline.records import ListedFile, PlannedFile, extension
from pipeline.storage.reading import open_stream

TABLE_EXTENSIONS = ("parquet", "arrow", "feather", "csv", "tsv", "jsonl", "ndjson")
_BATCH_BYTES = 16 << 20  # of the rows that are read from a Parquet file at a time
_MOST_ROWS = 1 << 16
_BLOCK_BYTES = 8 << 20


class ColumnTable:
    """The rows of one or more files of one format.

    columns: the names to read; None for all. Numbers in CSV files are texts until `convert` has seen all of them.
    """

    def __init__(
        self, files: Sequence[ListedFile], options: Mapping[str, Any], limits: Limits, columns: Collection[str] | None
    ) -> None:
        self.files, self.options, self.limits, self.columns = files, options, limits, columns
        self._written: dict[str, Written] = {}

    def read(self) -> Iterator[pa.Table]:
        """Yield the rows, some at a time, without dictionaries and extension types. Types may differ between files.

        Raises ShardError or DamagedError, which name the file, if it cannot be read, and SourceError if it changes.
        """
        for file in self.files:
            planned = PlannedFile(file.path, file.bytes, file.etag)
            with open_stream(file.url, self.options, planned, seeking=extension(file.path) == "parquet") as stream:
                for table in self._read_file(stream, file):
                    check_names(table.schema, file.url)
                    names = [name for name in table.schema.names if self.columns is None or name in self.columns]
                    with name_format(file.url, extension(file.path)):
                        table = simplify_types(table.select(names))
                        table.validate(full=True)  # Arrow does not check whether texts are UTF-8
                    yield table

    def convert(self, rows: pa.Table) -> pa.Table:
        """Return rows with the types that their columns have in the whole table, once it has been read."""
        types = {name: choose_type(self._written.get(name, Written(0))) for name in rows.schema.names}
        return pa.table({name: convert_numbers(rows[name], kind) for name, kind in types.items()})

    def _read_file(self, stream: BinaryIO, file: ListedFile) -> Iterator[pa.Table]:
        kind, url = extension(file.path), file.url
        if kind == "parquet":
            yield from self._read_parquet(stream, url)
        elif kind in ("arrow", "feather"):
            yield from (pa.table(batch) for batch in arrow.read_batches(stream, url, self.limits))
        else:
            with name_format(url, kind):
                if kind in DELIMITERS:
                    yield from self._read_csv(stream, file, DELIMITERS[kind])
                else:
                    yield from parse_jsonl(_iterate_lines(stream))

    def _read_parquet(self, stream: BinaryIO, url: str) -> Iterator[pa.Table]:
        with parquet.open_parquet(stream, url, self.limits) as file:
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
            rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, size)))
            names = [name for name in file.schema_arrow.names if self.columns is None or name in self.columns]
            yield file.schema_arrow.empty_table().select(names)
            for batch in file.iter_batches(rows, columns=names, use_threads=False):
                yield pa.table(batch)

    def _read_csv(self, stream: BinaryIO, file: ListedFile, delimiter: str) -> Iterator[pa.Table]:
        with open_stream(file.url, self.options) as head:
            names = read_header(head, delimiter)
        if not names:
            raise ShardError(f"{file.url} is empty: its first line must name its columns")
        for batch in pa.csv.open_csv(open_quoted(stream, delimiter), **make_csv_options(names, delimiter)):
            table = pa.table(batch)
            for name in names:
                self._written[name] = self._written.get(name, Written(0)) | find_written(table[name])
            yield table


def simplify_types(table: pa.Table) -> pa.Table:
    """Return a table with the values of dictionaries, the storage of extension types, and no views."""
    columns = {}
    for name, column in zip(table.schema.names, table.columns, strict=True):
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        columns[name] = column.cast(_simplify(get_value_type(column.type)))
    return pa.table(columns)


def _simplify(kind: Any) -> Any:
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _iterate_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, without a byte-order mark."""
    rest, is_first = b"", True
    while block := stream.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.removeprefix(codecs.BOM_UTF8) if is_first else line
            is_first = False
    yield rest.removeprefix(codecs.BOM_UTF8) if is_first else rest
