"""Read tar shards in the layout of webdataset and img2dataset, as streams: never downloaded whole, never unpacked.

A tar may be compressed with gzip, whatever its name. Positions and damages then refer to its decompressed content.

Members that share a key are adjacent: `0001.jpg`, `0001.txt`, `0001.json`. The key is the member's path up to the first
dot of its base name. Python's `tarfile` and webdataset end silently at the end of a truncated shard, and before a
second archive that was appended to the first. This reader requires the end mark, two blocks of zeros (POSIX.1-2001, pax
interchange format), and continues after it.
"""

import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import BinaryIO

from latentmill.byte_stream import read_up_to
from pipeline.errors import DamagedError, ShardError
from pipeline.limits import DEFAULT_LIMITS, Limits
from pipeline.readers import compression
from pipeline.readers.archive_samples import make_samples
from pipeline.readers.blocks import BlockReader
from pipeline.readers.gzip_stream import open_gzip
from pipeline.readers.members import DEFAULT_WANTED, Member, Wanted, clean_name
from pipeline.readers.skipped import HIDDEN
from pipeline.records import Reject, Sample

BLOCK = 512
WHOLE: tuple[int, int | None] = (0, None)  # the range of bytes of a tar that is not divided
SKIP_SIZE = 1 << 20  # bytes per read of a skipped member
FILES = b"0\x007"
FOLDER = b"5"
OLD_FILE = b"\0"  # in tars before POSIX; a folder if its name ends with `/`
WITHOUT_DATA = b"123456"  # links, devices, folders: no data follows, even if the size field is not 0
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")
_PAX_SIZE = re.compile(rb"[0-9]{1,19}\n")


def read_tar(
    stream: BinaryIO,
    url: str,
    wanted: Wanted = DEFAULT_WANTED,
    limits: Limits = DEFAULT_LIMITS,
    skipped: Counter[str] | None = None,
    byte_range: tuple[int, int | None] = WHOLE,
    on_member: Callable[[int], None] = lambda start: None,
) -> Iterator[Sample | Reject]:
    """Yield the samples of a tar, in their order.

    skipped: see `make_samples`, which also lists the rejects. on_member: called with the first byte of each member.
    byte_range: the bytes (start, stop) of the tar that are read; stop: None for its end. Each must be the first byte of
    a member. The stream must be at `start`.
    Raises DamagedError, which names the URL and the byte (of a gzip file, the byte of its decompressed content), if the
    tar is damaged or truncated. Raises ShardError if it has more members than the limit, if it is another kind of
    archive, or if no member begins at `stop`.
    """
    skipped = Counter() if skipped is None else skipped
    members = read_members(stream, url, wanted, limits, skipped, byte_range)
    yield from make_samples(_note_starts(members, on_member), wanted, limits, skipped)


def _note_starts(members: Iterator[Member], on_member: Callable[[int], None]) -> Iterator[Member]:
    for member in members:
        on_member(member.start)
        yield member


def read_members(
    stream: BinaryIO,
    url: str,
    wanted: Wanted = DEFAULT_WANTED,
    limits: Limits = DEFAULT_LIMITS,
    skipped: Counter[str] | None = None,
    byte_range: tuple[int, int | None] = WHOLE,
) -> Iterator[Member]:
    """Yield the files, links and devices of a tar (ustar, GNU and pax long names), and of tars appended to it.

    Only the bytes of wanted members within their limits are kept. Hidden files are skipped, and counted in `skipped`.
    """
    for count, member in enumerate(read_all_members(stream, url, wanted, limits, byte_range), 1):
        if count > limits.members:
            raise ShardError(f"{url} has more than {limits.members} members; --input-limit members=N accepts more")
        if not member.is_hidden:
            yield member
        elif skipped is not None:
            skipped[HIDDEN] += 1


def read_all_members(
    stream: BinaryIO, url: str, wanted: Wanted, limits: Limits, byte_range: tuple[int, int | None] = WHOLE
) -> Iterator[Member]:
    """Yield the members of `read_members`, including hidden ones, and any number of them."""
    offset, stop = byte_range
    first = b""
    if not offset:
        stream, url, first = _open_tar(stream, url, limits)
    while True:
        offset = yield from read_archive(stream, url, wanted, limits, (offset, stop), first)
        if offset == stop:
            return
        if stop is None or offset < stop:
            offset, first = _find_next_archive(stream, url, offset)
        if not first or (stop is not None and offset >= stop):
            break
    if stop is not None and offset != stop:
        raise ShardError(
            f"{url} was divided at byte {stop}, but no member begins there: it may contain another tar. Compress it "
            "with gzip, because compressed tars are not divided, and encode it into another cache"
        )


def read_archive(
    stream: BinaryIO, url: str, wanted: Wanted, limits: Limits, byte_range: tuple[int, int | None], first: bytes = b""
) -> Generator[Member, None, int]:
    """Yield the members up to `stop` or the next end mark. Returns the offset at which the next header may follow.

    first: the first header, if it has been read.
    """
    offset, stop = byte_range
    begin: int | None = None  # of the extended headers that precede a header
    long_name: str | None = None
    long_size: int | None = None
    while stop is None or begin is not None or offset < stop:
        header = first or _read_exactly(stream, BLOCK, url, offset)
        first = b""
        if not any(header):
            if any(_read_exactly(stream, BLOCK, url, offset + BLOCK)):
                raise DamagedError(
                    f"{url} is damaged: there is one block of zeros after byte {offset}, not two", at=offset
                )
            return offset + 2 * BLOCK
        size = _parse_number(header[124:136], url, offset)
        _check_header_sum(header, url, offset)
        kind, start = header[156:157], offset + BLOCK
        begin = offset if begin is None else begin
        if kind in b"LxgK":
            data = _read_extended_header(stream, size, url, offset, limits)
            if kind == b"L":
                long_name = clean_name(data.rstrip(b"\0"))
            elif kind == b"x":
                records = _parse_pax(data, url, offset)
                long_name = clean_name(records[b"path"]) if b"path" in records else None
                long_size = int(records[b"size"]) if b"size" in records else None
        else:
            name = long_name or _parse_name(header)
            is_folder = kind == FOLDER or (kind == OLD_FILE and name.endswith("/"))
            size = long_size if long_size is not None else size
            if is_folder or kind in WITHOUT_DATA:
                size = 0
            member = Member(name, size, None, is_link=kind not in FILES, start=begin)
            if not member.is_link and size <= wanted.limit_bytes(member, limits):
                member = replace(member, data=_read_exactly(stream, size, url, start))
            else:
                _skip(stream, size, url, start)
            if not is_folder:
                yield member
            begin = long_name = long_size = None
        padding = -size % BLOCK
        _read_exactly(stream, padding, url, start + size)
        offset = start + size + padding
    return offset


def is_header(block: bytes) -> bool:
    """Whether a block is a valid header of a member, in a format since POSIX (`ustar`)."""
    if block[257:262] != b"ustar":
        return False
    try:
        _parse_number(block[124:136], "", 0)
        _check_header_sum(block, "", 0)
    except DamagedError:
        return False
    return True


def _read_extended_header(stream: BinaryIO, size: int, url: str, offset: int, limits: Limits) -> bytes:
    """Return the content of an extended header. Raises DamagedError if it has more bytes than the limit."""
    if size > limits.header_bytes:
        raise DamagedError(
            f"{url} has a header of {size} bytes at byte {offset}; --input-limit header_bytes=N accepts it", at=offset
        )
    return _read_exactly(stream, size, url, offset + BLOCK)


def _open_tar(stream: BinaryIO, url: str, limits: Limits) -> tuple[BinaryIO, str, bytes]:
    """Return the uncompressed tar, its name in errors, and its first header.

    Raises ShardError if the file is another kind of archive.
    """
    start = read_up_to(stream, BLOCK)
    kind = detect_other_archive(start)
    if kind == "gzip":
        stream, url = open_gzip(stream, url, limits, start), f"{url} (decompressed)"
        start = read_up_to(stream, BLOCK)
        kind = detect_other_archive(start)
    if kind:
        raise ShardError(f"{url} is not a tar, but a {kind} file; {compression.ADVICE}")
    return stream, url, start + _read_exactly(stream, BLOCK - len(start), url, len(start))


def detect_other_archive(start: bytes) -> str | None:
    """Return the kind of archive that begins with these bytes; None for a tar, whose first name may be any bytes."""
    return None if start[257:262] == b"ustar" else compression.detect_archive(start)


def _find_next_archive(stream: BinaryIO, url: str, offset: int) -> tuple[int, bytes]:
    """Skip zeros after an end mark. Return the offset and first header of a further tar, or b"" at the end."""
    while block := read_up_to(stream, BLOCK):
        if any(block):
            return offset, block + _read_exactly(stream, BLOCK - len(block), url, offset + len(block))
        offset += len(block)
    return offset, b""


def _parse_pax(data: bytes, url: str, offset: int) -> dict[bytes, bytes]:
    """Parse the records of an extended header. Each is `LENGTH KEY=VALUE` with a newline."""
    records: dict[bytes, bytes] = {}
    start = 0
    while length := _PAX_LENGTH.match(data, start):
        end = start + int(length[1])
        key, equals, value = data[length.end() : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            break
        if key == b"size" and not _PAX_SIZE.fullmatch(value):
            break
        records[key], start = value[:-1], end
    if data[start:].strip(b"\0"):
        raise DamagedError(f"{url} is damaged: the extended header at byte {offset} is not valid", at=offset)
    return records


def _skip(stream: BinaryIO, count: int, url: str, offset: int) -> None:
    """Read and discard `count` bytes."""
    if isinstance(stream, BlockReader):
        stream.skip(count)
        return
    while count > 0:
        size = min(count, SKIP_SIZE)
        _read_exactly(stream, size, url, offset)
        offset, count = offset + size, count - size


def _read_exactly(stream: BinaryIO, count: int, url: str, offset: int) -> bytes:
    """Read exactly `count` bytes. Raises DamagedError if the file ends before. offset: of the first byte."""
    data = read_up_to(stream, count)
    if len(data) < count:
        end = offset + len(data)
        raise DamagedError(f"{url} is truncated at byte {end}: it has no end mark", at=end)
    return data


def _parse_number(field: bytes, url: str, offset: int) -> int:
    """Parse an octal number, or a number in GNU's base 256 if the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        digits = field.strip(b"\0 ")
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            if digits:
                raise DamagedError(f"{url} is damaged: the header at byte {offset} is not a tar header", at=offset)
            return 0
        value = int(digits, 8)
    return value


def _check_header_sum(header: bytes, url: str, offset: int) -> None:
    """Raise DamagedError if the checksum of a header does not match."""
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _parse_number(header[148:156], url, offset):
        raise DamagedError(f"{url} is damaged: the header at byte {offset} is not a tar header", at=offset)


def _parse_name(header: bytes) -> str:
    """Return the name in a header, with the prefix of ustar."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return clean_name(prefix + b"/" + name if prefix else name)
