"""Decompress a gzip file as a stream, with bounded memory, and find the exact byte at which a damaged one ends."""

import io
import zlib
from typing import Any, BinaryIO, cast

from pipeline.errors import DamagedError
from pipeline.limits import Limits

MAGIC = b"\x1f\x8b"
INPUT_BYTES = 64 << 10  # compressed bytes per read of the file
OUTPUT_BYTES = 256 << 10  # decompressed bytes per step
FREE_BYTES = 1 << 30  # decompressed bytes to which the limit of the expansion does not apply
_WITH_HEADER = 16 + zlib.MAX_WBITS  # zlib reads the header and checks the CRC and the length at the end


def open_gzip(stream: BinaryIO, url: str, limits: Limits, start: bytes = b"") -> BinaryIO:
    """Return the content of a gzip file as a stream. start: bytes that were read from the file already.

    A read raises DamagedError, at a byte of the decompressed content, if the file is damaged or truncated, or if its
    content is larger than `limits.expansion` permits. All bytes before the damage can be read.
    """
    return cast(BinaryIO, io.BufferedReader(_GzipContent(stream, url, limits, start), OUTPUT_BYTES))


class _GzipContent(io.RawIOBase):
    """The content of the members of a gzip file, one after the other: `cat` and parallel compressors make several."""

    def __init__(self, stream: BinaryIO, url: str, limits: Limits, start: bytes) -> None:
        self._stream, self._url, self._limits = stream, url, limits
        self._input = start
        self._compressed, self._offset = len(start), 0
        self._inflate = zlib.decompressobj(_WITH_HEADER)
        self._problem = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._read_piece(min(len(buffer), OUTPUT_BYTES))
        buffer[: len(piece)] = piece
        return len(piece)

    def _read_piece(self, size: int) -> bytes:
        """Return up to `size` bytes; b"" at the end of the content."""
        while True:
            if self._problem:
                raise DamagedError(f"{self._url} is damaged: {self._problem}", at=self._offset)
            if self._inflate.eof and not self._begin_member():
                return b""
            if not self._input and not self._fill():
                self._problem = f"it ends within its compressed data, after byte {self._offset} of its content"
            elif piece := self._decompress(size):
                self._offset += len(piece)
                self._check_expansion()
                return piece

    def _fill(self) -> bool:
        """Read more of the file. Returns False at its end."""
        self._input = self._stream.read(INPUT_BYTES)
        self._compressed += len(self._input)
        return bool(self._input)

    def _begin_member(self) -> bool:
        """Begin the member that follows the last one. Returns False at the end of the file, which zeros may pad."""
        self._input = self._inflate.unused_data.lstrip(b"\0")
        while not self._input and self._fill():
            self._input = self._input.lstrip(b"\0")
        if not self._input:
            return False
        self._inflate = zlib.decompressobj(_WITH_HEADER)
        return True

    def _decompress(self, size: int) -> bytes:
        """Decompress up to `size` bytes of the input. If that fails, return the bytes before the damage."""
        before, data = self._inflate.copy(), self._input
        try:
            piece = self._inflate.decompress(data, size)
            self._input = self._inflate.unconsumed_tail
            return piece
        except zlib.error as error:
            self._problem = f"{str(error).rpartition(': ')[2]}, after byte {{}} of its content"
        piece = b""
        try:
            while byte := before.decompress(data, 1):
                piece, data = piece + byte, before.unconsumed_tail
        except zlib.error:
            pass
        self._problem = self._problem.format(self._offset + len(piece))
        return piece

    def _check_expansion(self) -> None:
        if self._offset > FREE_BYTES + self._limits.expansion * self._compressed:
            self._problem = (
                f"its content has more than {self._limits.expansion} times the bytes of the file; "
                "--input-limit expansion=N accepts it"
            )
