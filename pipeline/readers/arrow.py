"""Read images and further columns from an Arrow IPC file (`.arrow`), as `datasets` and `save_to_disk` write it.

Both formats are read as a stream from start to end: the file format is the stream format between two marks. One record
batch is in memory at a time. Its size is checked before it is read, and its values before they are used.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa

from latentmill.error_text import first_line
from pipeline.errors import DamagedError, NoImagesError, ShardError
from pipeline.limits import DEFAULT_LIMITS, Limits
from pipeline.readers.image_column import flatten_schema, select_passable
from pipeline.readers.skipped import NO_IMAGES
from pipeline.readers.table_rows import BATCH_ROWS, TableRow, choose_columns, make_row_samples, read_rows
from pipeline.records import Reject, Sample

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # types of messages


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
    messages = _Messages(stream, url, limits)
    with _damage_at(messages):
        schema = pa.ipc.open_stream(messages).schema
        columns = choose_columns(schema, image_column, key_column, pa.schema([]), url)
        return select_passable(flatten_schema(schema), columns.images)


def read_arrow(
    stream: BinaryIO,
    url: str,
    image_column: str | None,
    key_column: str | None,
    wanted: pa.Schema,
    limits: Limits = DEFAULT_LIMITS,
    skipped: Counter[str] | None = None,
) -> Iterator[Sample | Reject]:
    """Yield the samples of an Arrow file, in the order of its rows. The arguments are those of `read_parquet`.

    Rejects: see `make_row_samples`.
    Raises DamagedError if the file is damaged, and ShardError if a column's type differs from the cache's, if a record
    batch is compressed, or if one is larger than the limit.
    """
    messages = _Messages(stream, url, limits)
    try:
        with _damage_at(messages):
            reader = pa.ipc.open_stream(messages)
            columns = choose_columns(reader.schema, image_column, key_column, wanted, url)
    except NoImagesError:
        if skipped is not None:
            skipped[NO_IMAGES] += 1
        return

    def read() -> Iterator[TableRow]:
        number = 0
        for batch in _read_batches(reader, messages):
            for start in range(0, len(batch), BATCH_ROWS):
                yield from read_rows(batch.slice(start, BATCH_ROWS), number + start, columns, url)
            number += len(batch)

    yield from make_row_samples(read(), key_column is not None, (), limits)


def read_batches(stream: BinaryIO, url: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file without images. Raises the errors of `read_arrow`."""
    messages = _Messages(stream, url, limits)
    with _damage_at(messages):
        reader = pa.ipc.open_stream(messages)
    yield from _read_batches(reader, messages)


class _Messages:
    """The messages of an Arrow stream, as a file that Arrow reads. Each is checked before Arrow sees its first byte.

    start: the byte of the file at which the last message begins.
    """

    closed = False

    def __init__(self, stream: BinaryIO, url: str, limits: Limits) -> None:
        self._stream, self.url, self._limits = stream, url, limits
        self._head, self._body = b"", 0  # what is left of the last message
        self._offset = self._dictionaries = self.start = 0
        self._is_file = self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes. Arrow reads the head of a message in pieces, and its body at once."""
        if not self._head and not self._body and not self._ended:
            self._next_message()
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        data = self._read_exactly(min(size, self._body))
        self._body -= len(data)
        return data

    def _next_message(self) -> None:
        self.start = self._offset
        head = self._read_exactly(8)
        if not self.start and head[: len(_MAGIC)] == _MAGIC:
            self._is_file = True
            head = self._read_exactly(8)
        mark, size = struct.unpack("<LL", head)
        if mark != _CONTINUATION:
            raise DamagedError(f"{self.url} is damaged, or is not an Arrow file: see byte {self.start}", at=self.start)
        if size == 0:
            self._ended, self._head = True, head
            self._check_end()
            return
        if size > self._limits.footer_bytes:
            message = f"{self.url} has a header of {size} bytes; --input-limit footer_bytes=N accepts it"
            raise DamagedError(message, at=self.start)
        metadata = self._read_exactly(size)
        try:
            kind, self._body, is_compressed = _parse_message(metadata)
        except (struct.error, IndexError, ValueError) as error:
            message = f"{self.url} is damaged: the header at byte {self.start} is not valid"
            raise DamagedError(message, at=self.start) from error
        if is_compressed:
            raise ShardError(f"{self.url} is compressed: write it without compression, or as Parquet")
        self._dictionaries += self._body if kind == _DICTIONARY else 0
        if max(self._body, self._dictionaries) > self._limits.batch_bytes:
            raise ShardError(
                f"{self.url} has a record batch or dictionaries of more than {self._limits.batch_bytes} bytes: write "
                "smaller batches, or accept it with --input-limit batch_bytes=N"
            )
        self._head = head + metadata

    def _check_end(self) -> None:
        """Raise DamagedError if more rows may follow the end mark. The file format has a footer there."""
        rest = self._stream.read(self._limits.footer_bytes)
        size = len(rest) - 4 - len(_MAGIC)
        stated = int.from_bytes(rest[size : size + 4], "little") if size >= 0 and rest.endswith(_MAGIC) else -1
        if rest and not (self._is_file and stated == size):
            message = f"{self.url} is damaged: other data follows its end mark at byte {self._offset}"
            raise DamagedError(message, at=self._offset)

    def _read_exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        self._offset += len(data)
        if len(data) < size:
            raise DamagedError(f"{self.url} is truncated at byte {self._offset}: it has no end mark", at=self._offset)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _damage_at(messages: _Messages) -> Iterator[None]:
    """Turn Arrow's errors into a DamagedError at the start of the last message."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = first_line(error) or type(error).__name__
        raise DamagedError(f"{messages.url} cannot be read as Arrow: {reason}", at=messages.start) from error


def _read_batches(reader: Any, messages: _Messages) -> Iterator[pa.RecordBatch]:
    """Yield the record batches, each with valid offsets and text."""
    while True:
        with _damage_at(messages):
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            batch.validate(full=True)
        yield batch


def _parse_message(data: bytes) -> tuple[int, int, bool]:
    """Return the type of a message, the length of its body in bytes, and whether the body is compressed.

    data: the message as a flatbuffer (Message.fbs of Arrow). Raises struct.error, IndexError or ValueError.
    """
    (message,) = struct.unpack_from("<L", data, 0)
    kind = data[_find_field(data, message, 1)]
    at = _find_field(data, message, 3)
    length = struct.unpack_from("<q", data, at)[0] if at else 0
    if length < 0:
        raise ValueError("negative length")
    header = _follow(data, _find_field(data, message, 2))
    if kind == _DICTIONARY:
        header = _follow(data, _find_field(data, header, 1))
    return kind, length, kind in (_DICTIONARY, _BATCH) and bool(_find_field(data, header, 3))


def _find_field(data: bytes, table: int, index: int) -> int:
    """Return the offset of a table's field in a flatbuffer; 0 if the table lacks it."""
    table_of_fields = table - struct.unpack_from("<l", data, table)[0]
    slot = 4 + 2 * index
    if table_of_fields < 0 or slot >= struct.unpack_from("<H", data, table_of_fields)[0]:
        return 0
    offset = struct.unpack_from("<H", data, table_of_fields + slot)[0]
    return int(table + offset) if offset else 0


def _follow(data: bytes, at: int) -> int:
    """Return the offset to which a field refers."""
    return int(at + struct.unpack_from("<L", data, at)[0])
