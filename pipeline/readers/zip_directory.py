"""Read the directory at the end of a zip archive (PKWARE's APPNOTE 6.3, with zip64). Nothing is decompressed.

Every number is checked against the file's size. Members that overlap, as those of some decompression bombs do, are
damage.
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from pipeline.errors import DamagedError, ShardError
from pipeline.limits import Limits
from pipeline.readers.members import clean_name

LOCAL_HEADER = 30  # bytes of the header before each member, without its name and its extra field
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_MAX_COMMENT = 0xFFFF
_UTF8, _ZIP64, _LARGE, _UNIX = 0x800, 1, 0xFFFFFFFF, 3


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A member as the directory describes it, without folders.

    start: byte of its local header. stop: start of what follows it. compressed, size: bytes of its content.
    """

    name: str
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    start: int
    is_link: bool
    stop: int = 0


@dataclass(frozen=True, slots=True)
class _Directory:
    """start, size: of the directory in the file, in bytes. shift: bytes before the archive. count: of its entries."""

    start: int
    size: int
    shift: int
    count: int


def read_directory(stream: BinaryIO, url: str, limits: Limits) -> list[ZipEntry]:
    """Return the members of a zip in the order of their bytes in the file.

    Raises DamagedError if the archive is truncated or damaged. Raises ShardError if it has more members than the limit,
    or is one of several volumes.
    """
    found = _find_directory(stream, url)
    problem = ""
    if found.size > limits.footer_bytes:
        problem = f"has a directory of {found.size} bytes; --input-limit footer_bytes=N accepts it"
    elif found.count > limits.members:
        problem = f"has more than {limits.members} members; --input-limit members=N accepts more"
    if problem:
        raise ShardError(f"{url} {problem}")
    stream.seek(found.start)
    data = stream.read(found.size)
    try:
        entries = sorted(_parse_entries(data, found), key=lambda entry: entry.start)
    except (struct.error, ValueError) as error:
        raise DamagedError(f"{url} is damaged: its directory is not valid", at=found.start) from error
    stops = [*(entry.start for entry in entries[1:]), found.start]
    for entry, stop in zip(entries, stops, strict=True):
        if not 0 <= entry.start <= entry.start + LOCAL_HEADER + entry.compressed <= stop:
            raise DamagedError(f"{url} is damaged: its members overlap", at=found.start)
    pairs = zip(entries, stops, strict=True)
    return [replace(entry, stop=stop) for entry, stop in pairs if not entry.name.endswith("/")]


def _find_directory(stream: BinaryIO, url: str) -> _Directory:
    """Find the directory by the end record, which a comment may follow."""
    size = stream.seek(0, 2)
    tail_start = max(0, size - _END.size - _MAX_COMMENT)
    stream.seek(tail_start)
    tail = stream.read(size - tail_start)
    at = len(tail) - _END.size + 4
    while (at := tail.rfind(b"PK\5\6", 0, max(0, at))) >= 0:
        if _END.unpack_from(tail, at)[-1] <= len(tail) - at - _END.size:  # the length of the comment
            break
    if at < 0:
        raise DamagedError(f"{url} is not a zip file, or is truncated: it has no end record", at=max(0, size - 1))
    end = tail_start + at
    _, disk, first_disk, _, count, length, offset, _ = _END.unpack_from(tail, at)
    if end >= _LOCATOR64.size:
        stream.seek(end - _LOCATOR64.size)
        mark, _, at64, _ = _LOCATOR64.unpack(stream.read(_LOCATOR64.size))
        if mark == b"PK\6\7" and at64 + _END64.size <= end:
            stream.seek(at64)
            mark, _, _, _, disk, first_disk, _, count, length, offset = _END64.unpack(stream.read(_END64.size))
            if mark != b"PK\6\6":
                raise DamagedError(f"{url} is damaged: it has no zip64 end record", at=end)
            end = at64
    if (disk, first_disk) != (0, 0):
        raise ShardError(f"{url} is one volume of a zip archive that was split: join the volumes (zip -s 0)")
    start = end - length
    if not 0 <= offset <= start:
        raise DamagedError(f"{url} is damaged: its end record names a directory outside of the file", at=end)
    return _Directory(start, length, start - offset, count)


def _parse_entries(data: bytes, found: _Directory) -> Iterator[ZipEntry]:
    """Yield the entries of a directory. Raises ValueError or struct.error if it is not valid."""
    at = count = 0
    while at < len(data):
        mark, version, _, flags, method, _, _, crc, *more = _ENTRY.unpack_from(data, at)
        compressed, size, names, extras, comments, _, _, attributes, start = more
        if mark != b"PK\1\2":
            raise ValueError("not an entry")
        at += _ENTRY.size
        name, extra = data[at : at + names], data[at + names : at + names + extras]
        at += names + extras + comments
        compressed, size, start = _expand_sizes(extra, compressed, size, start)
        kind = attributes >> 16 if version >> 8 == _UNIX else 0
        yield ZipEntry(
            _decode_name(name, flags), flags, method, crc, compressed, size, start + found.shift, stat.S_ISLNK(kind)
        )
        count += 1
    if at != len(data) or (count - found.count) % 0x10000:  # the count has 16 bits, unless it is zip64
        raise ValueError("another number of entries")


def _expand_sizes(extra: bytes, compressed: int, size: int, start: int) -> tuple[int, int, int]:
    """Return the compressed size, the size and the start, of which zip64 stores large ones in the extra field."""
    numbers = [size, compressed, start]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64:
            for index, number in enumerate(numbers):
                if number == _LARGE:
                    (numbers[index],) = struct.unpack_from("<Q", extra[: at + 4 + length], at + 4)
                    at, length = at + 8, length - 8
            break
        at += 4 + length
    size, compressed, start = numbers
    return compressed, size, start


def _decode_name(name: bytes, flags: int) -> str:
    """Return a name as text. Many tools write UTF-8 without its flag; otherwise, names are in code page 437."""
    try:
        return clean_name(name.decode())
    except UnicodeDecodeError:
        return clean_name(name) if flags & _UTF8 else clean_name(name.decode("cp437"))
