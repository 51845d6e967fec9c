"""The overlay files of a cache: columns of a part's rows, in row groups as the part has them."""

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.arrow_values import to_python
from latentmill.canonical_json import VERIFY_HINT
from latentmill.error_text import describe_error
from latentmill.errors import CacheError, LatentmillError
from latentmill.folder import CacheFolder
from latentmill.part_files import open_parquet_file

FILES = "_columns/files"
_TAIL = 256 << 10  # bytes at the end of a file that are read with its footer: most overlays of texts are smaller


@dataclass(frozen=True, slots=True, eq=False)
class OverlayEntry:
    """An overlay file of a version. file: of the part, in data/. name: its own, in `_columns/files`."""

    file: str
    name: str
    rows: int
    bytes: int
    sha256: str


def get_stored_type(kind: Any) -> Any:
    """Return the type of a column in an overlay file: fixed-size lists of numbers are stored as their bytes.

    Parquet would take about seven times as long to read them as lists.
    """
    if pa.types.is_fixed_size_list(kind) and (pa.types.is_integer(kind.value_type) or _is_float(kind.value_type)):
        return pa.binary(kind.list_size * kind.value_type.bit_width // 8)
    return kind


def _is_float(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind))


def to_stored(array: Any) -> Any:
    """Return a column as it is stored. A fixed-size list of numbers must not have a null among them."""
    kind, stored = array.type, get_stored_type(array.type)
    if stored == kind:
        return array
    values, width = array.values, kind.value_type.bit_width // 8
    data = values.buffers()[1].slice(values.offset * width) if len(values) else pa.py_buffer(b"")
    return pa.Array.from_buffers(stored, len(array), [array.buffers()[0], data], offset=array.offset)


def from_stored(array: Any, kind: Any) -> Any:
    """Return a stored column with its own type, without a copy."""
    if get_stored_type(kind) == kind:
        return array
    numbers = (array.offset + len(array)) * kind.list_size
    values = pa.Array.from_buffers(kind.value_type, numbers, [None, array.buffers()[1]])
    return pa.Array.from_buffers(kind, len(array), [array.buffers()[0]], offset=array.offset, children=[values])


def to_rows(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column as Python's; fixed-size lists of numbers as arrays of numpy, without a copy."""
    kind = column.type
    if get_stored_type(kind) == kind:
        return to_python(column)
    rows: list[Any] = []
    for chunk in column.chunks:
        numbers = chunk.values.to_numpy(zero_copy_only=False).reshape(-1, kind.list_size)
        valid = chunk.is_valid().to_pylist()
        rows += [numbers[chunk.offset + index] if valid[index] else None for index in range(len(chunk))]
    return rows


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an overlay file is. Its name has a hash of its content, so that what was read of it stays true."""

    url: str
    bytes: int
    name: str = field(compare=False)
    folder: CacheFolder = field(compare=False)


@functools.lru_cache(maxsize=64)
def _read_tail(place: _Place) -> tuple[memoryview, Any]:
    """Return the last bytes of an overlay file, and the metadata in its footer."""
    start = max(0, place.bytes - _TAIL)
    tail = place.folder.read_range(place.name, start, place.bytes)
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < needed <= place.bytes:
        tail = place.folder.read_range(place.name, place.bytes - needed, place.bytes)
    return tail, pq.read_metadata(io.BytesIO(tail))


class OverlayFile:
    """Reads row groups of an overlay file, each by one request at most.

    schema: of the version. names: the columns to read. Raises CacheError if the file is damaged.
    """

    def __init__(self, folder: CacheFolder, entry: OverlayEntry, schema: pa.Schema, names: Sequence[str]) -> None:
        self.url = folder.url_of(f"{FILES}/{entry.name}")
        self.names, self.schema = names, schema
        self._place = _Place(self.url, entry.bytes, f"{FILES}/{entry.name}", folder)
        try:
            self._tail, self._metadata = _read_tail(self._place)
        except (pa.ArrowException, OSError) as error:
            raise CacheError(f"{self.url} is damaged: it has no readable footer; {VERIFY_HINT}") from error

    @property
    def stored_schema(self) -> pa.Schema:
        """The columns of the file, as they are stored."""
        return self._metadata.schema.to_arrow_schema()

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each row group."""
        return [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]

    def read_group(self, group: int) -> pa.Table:
        """Return the rows of a row group."""
        try:
            start, stop = self._find_bytes(group)
            tail_start = self._place.bytes - len(self._tail)
            pieces = {tail_start: self._tail}
            if start < tail_start:
                pieces[start] = self._place.folder.read_range(self._place.name, start, stop)
            file = open_parquet_file(_Pieces(self._place.bytes, pieces), self._metadata)
            table = file.read_row_group(group, columns=list(self.names), use_threads=False)
            kinds = {name: self.schema.field(name).type for name in self.names}
            columns = {
                name: pa.chunked_array([from_stored(chunk, kind) for chunk in table[name].chunks], kind)
                for name, kind in kinds.items()
            }
            return pa.table(columns)
        except LatentmillError:
            raise
        except Exception as error:  # damaged bytes can make Arrow raise anything
            raise CacheError(f"{self.url} is damaged: {describe_error(error):.200}; {VERIFY_HINT}") from error

    def _find_bytes(self, group: int) -> tuple[int, int]:
        """Return the first byte of the wanted columns of a row group, and the byte after their last."""
        metadata, bounds = self._metadata.row_group(group), []
        for number in range(metadata.num_columns):
            chunk = metadata.column(number)
            if chunk.path_in_schema.split(".")[0] in self.names or "." in "".join(self.names):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                bounds.append((start, start + chunk.total_compressed_size))
        return min(start for start, _ in bounds), max(stop for _, stop in bounds)


class _Pieces(io.RawIOBase):
    """A file of which some bytes are in memory. pieces: by the offset of their first byte."""

    def __init__(self, size: int, pieces: Mapping[int, memoryview]) -> None:
        self._size, self._pieces, self._at = size, pieces, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek as in a file."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return bytes that are in one piece. Raises ValueError for others: the metadata is damaged."""
        stop = self._size if size < 0 else min(self._at + size, self._size)
        for start, data in self._pieces.items():
            if start <= self._at and stop <= start + len(data):
                read = bytes(data[self._at - start : stop - start])
                self._at = stop
                return read
        raise ValueError(f"bytes {self._at} to {stop} are not those of a row group")
