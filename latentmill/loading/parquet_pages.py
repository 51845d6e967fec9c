"""Find the values of a latent column in the bytes of its chunk, without a copy.

Latents are written as PLAIN pages without compression: a header, the levels, and then the length and the bytes of each
value. So the bytes of all values lie where they were read, at regular distances. See docs/cache-format.md, Rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from isal.isal_zlib import crc32
except ImportError:  # a platform without a wheel: the same values, a tenth as fast
    from zlib import crc32

_DATA_PAGE, _PLAIN = 0, 0  # as Parquet numbers the kinds of pages, and encodings
_MAX_HEADER = 256  # bytes; ours have about 25
_LENGTH = 4  # bytes of the length before a value, and of the length before the levels


class PageError(ValueError):
    """A chunk is not one of latents. `str(error)` is the reason."""


@dataclass(frozen=True, slots=True)
class _Page:
    """A page. count: its values. crc: of its bytes; None if it has none. start, size: of its bytes in the chunk."""

    count: int
    crc: int | None
    start: int
    size: int


def find_values(chunk: memoryview, rows: int, value_bytes: int, checksums: bool) -> NDArray[np.int64]:
    """Return where each value begins in a column chunk, [rows]. No value is null, and each has `value_bytes` bytes.

    checksums: compare each page with its CRC. Raises PageError.
    """
    found = [_find_in_page(chunk, page, value_bytes, checksums) for page in _iterate_pages(chunk)]
    values = np.concatenate([np.zeros(0, np.int64), *found])
    if len(values) != rows:
        raise PageError(f"it has {len(values)} values, not {rows}")
    return values


def _find_in_page(chunk: memoryview, page: _Page, value_bytes: int, checksums: bool) -> NDArray[np.int64]:
    data = chunk[page.start : page.start + page.size]
    if len(data) != page.size:
        raise PageError("a page is cut short")
    if checksums and (page.crc is None or crc32(data) != page.crc & 0xFFFFFFFF):
        raise PageError("a page does not have its checksum")
    levels = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    step = _LENGTH + value_bytes
    if page.size != levels + page.count * step:
        raise PageError(f"{page.count} values of {value_bytes} bytes do not have the size of their page")
    lengths = np.ndarray((page.count,), "<i4", data, levels, (step,))
    if (lengths != value_bytes).any():
        wrong = int(lengths[lengths != value_bytes][0])
        raise PageError(f"a value has {wrong} bytes, not {value_bytes}")
    return page.start + levels + _LENGTH + step * np.arange(page.count, dtype=np.int64)


def _iterate_pages(chunk: memoryview) -> Iterator[_Page]:
    position = 0
    while position < len(chunk):
        try:
            header, length = _read_struct(chunk[position : position + _MAX_HEADER], 0)
            page = _Page(int(header[5][1]), header.get(4), position + length, int(header[3]))
            is_plain = (header[1], header[5][2], header[2]) == (_DATA_PAGE, _PLAIN, header[3])
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise PageError("the header of a page cannot be read") from error
        if not is_plain or page.size < _LENGTH or page.count < 0:
            raise PageError("a page is not PLAIN and without compression, as latents are written")
        yield page
        position = page.start + page.size


def _read_struct(data: memoryview, position: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct in Thrift's compact protocol by their number, and the position after it.

    Only the kinds of fields that a page header of ours has: booleans, integers and structs.
    """
    fields, number = dict[int, Any](), 0
    while (kind := data[position]) != 0:
        position += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, position = _read_integer(data, position)
        match kind & 15:
            case 1 | 2 as value:
                fields[number] = value == 1
            case 4 | 5 | 6:
                fields[number], position = _read_integer(data, position)
            case 12:
                fields[number], position = _read_struct(data, position)
            case other:
                raise ValueError(f"a field is of kind {other}")
    return fields, position + 1


def _read_integer(data: memoryview, position: int) -> tuple[int, int]:
    """Return a zigzag integer of seven bits per byte, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), position
