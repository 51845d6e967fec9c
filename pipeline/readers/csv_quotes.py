"""Check the quotes of a CSV file, and mend those of a TSV file, before Arrow reads it.

Arrow takes a quote that is never closed as one value up to the end of the file, and so loses rows without an error.
"""

import codecs
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20
_LONGEST_VALUE = 16 << 20  # in quotes; Arrow reads no longer row
_VALUE = re.compile(rb'"([^"]*+(?:""[^"]*+)*+)("?)')  # in quotes, with doubled quotes inside
_PLAIN_TSV = re.compile(rb"[^\t\r\n]*+")


def open_quoted(stream: BinaryIO, delimiter: str) -> io.BufferedReader:
    """Return a stream of the same CSV, of UTF-8, whose quotes all open and close a value, without a byte-order mark.

    If the delimiter is a comma, reading raises ValueError, which names the line, for a quote that is not closed, and
    for text after a closing quote. If it is a tab, such a quote is an ordinary character, and is written as Arrow reads
    one. So is a quote whose value has both a tab and a line break: it would swallow a row.
    """
    return io.BufferedReader(_Blocks(_check_quotes(stream, delimiter.encode())), _BLOCK_BYTES)


class _Blocks(io.RawIOBase):
    """A stream of the bytes of several blocks."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _check_quotes(stream: BinaryIO, delimiter: bytes) -> Iterator[bytes]:
    """Yield the bytes of a stream. Bytes that cannot be judged yet wait for the next block."""
    start = stream.read(_BLOCK_BYTES)
    waiting, line = b"\n" + start.removeprefix(codecs.BOM_UTF8), 0  # the line break stands for the start of the file
    is_first, is_last = True, not start
    while True:
        checked, end = _check_block(waiting, delimiter, line, is_last)
        line += waiting.count(b"\n", 0, end)
        yield checked[1:] if is_first and checked else checked
        is_first = is_first and not checked
        if is_last:
            return
        block = stream.read(_BLOCK_BYTES)
        waiting, is_last = waiting[end:] + block, not block


def _check_block(data: bytes, delimiter: bytes, line: int, is_last: bool) -> tuple[bytes, int]:
    """Return the first bytes of a block with mended quotes, and where those end that are not judged yet.

    line: the number of line breaks before the block. is_last: whether the block ends the file.
    """
    opening = re.compile(rb"[" + delimiter + rb'\r\n]"')
    pieces, done, at = list[bytes](), 0, 0
    while found := opening.search(data, at):
        quote = found.start() + 1
        value = _VALUE.match(data, quote)
        assert value is not None
        at = value.end()
        is_row = delimiter == b"\t" and b"\t" in value[1] and b"\n" in value[1]
        if not is_row and at == len(data) and not is_last and at - quote < _LONGEST_VALUE:
            return b"".join([*pieces, data[done : quote - 1]]), quote - 1
        is_end = at == len(data) and is_last
        if not is_row and value[2] and (is_end or data[at : at + 1] in (delimiter, b"\r", b"\n")):
            continue
        if delimiter != b"\t" or at - quote >= _LONGEST_VALUE:
            first, last = (line + data.count(b"\n", 0, place) for place in (quote, at))
            problem = f"is closed in line {last}, where text follows it" if value[2] else "is not closed"
            raise ValueError(f'line {first}: its opening quote {problem}; write a quote inside a value twice ("")')
        plain = _PLAIN_TSV.match(data, quote)
        assert plain is not None
        at = plain.end()
        if at == len(data) and not is_last:
            return b"".join([*pieces, data[done : quote - 1]]), quote - 1
        pieces += [data[done:quote], b'"', plain[0].replace(b'"', b'""'), b'"']
        done = at
    # The last byte waits, because a quote may follow it.
    end = len(data) if is_last else max(done, len(data) - 1)
    return b"".join([*pieces, data[done:end]]), end
