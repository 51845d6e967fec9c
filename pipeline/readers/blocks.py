"""Read parts of a file by ranged requests, each of which returns a block."""

from collections.abc import Callable

BLOCK_BYTES = 1 << 20  # a few members of usual sizes

ReadRange = Callable[[int, int], bytes]  # returns the bytes (start, stop) of a file


class BlockReader:
    """A file of which only some bytes are read. The last block is kept.

    size: of the file, in bytes. offset: of the next byte. start, block: a block that has been read already.
    """

    def __init__(self, read_range: ReadRange, size: int, offset: int = 0, start: int = 0, block: bytes = b"") -> None:
        self._read_range, self._size, self._offset = read_range, size, offset
        self._start, self._block = start, block

    def read(self, count: int) -> bytes:
        """Read `count` bytes, or fewer at the end of the file."""
        stop = min(self._offset + count, self._size)
        if stop <= self._offset:
            return b""
        if not self._start <= self._offset <= stop <= self._start + len(self._block):
            self._start = self._offset
            self._block = self._read_range(self._start, min(max(stop, self._start + BLOCK_BYTES), self._size))
        data = self._block[self._offset - self._start : stop - self._start]
        self._offset += len(data)
        return data

    def skip(self, count: int) -> None:
        """Continue `count` bytes later. They are not read."""
        self._offset += count
