"""A tar shard in webdataset's layout (img2dataset's too), read as a stream: never downloaded whole, never unpacked.

Members that share a key stand next to each other: `0001.jpg`, `0001.txt`, `0001.json`. The key is the member's path
up to the first dot of its base name. Python's `tarfile` and webdataset end silently where a shard is cut off; this
reader demands the end mark, two blocks of zeros (POSIX.1-2001, pax interchange format).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import Rejected, ShardError
from pipeline.records import PICTURE_EXTENSIONS, TEXT_EXTENSIONS, Reject, Sample

BLOCK = 512
MAX_MEMBER = 256 << 20
MAX_HEADER = 1 << 20
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")
_PAX_SIZE = re.compile(rb"\d+ size=(\d+)\n")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name and content."""

    name: str
    data: bytes

    @property
    def key(self) -> str:
        folder, _, base = self.name.rpartition("/")
        stem = base.split(".", 1)[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


NO_PICTURE = Member("", b"")


def read_tar(stream: BinaryIO, url: str, texts: Sequence[str] = TEXT_EXTENSIONS) -> Iterator[Sample | Reject]:
    """The samples of a tar, in their order. texts: extensions of the members that come along as columns.

    Rejects (stage "read"): `no_picture`, `duplicate_key`, `bad_text`.
    Raises ShardError, which names the URL and the byte, where the tar is damaged or ends early.
    """
    position = 0
    seen: set[str] = set()
    for key, members in _by_key(read_members(stream, url)):
        pictures = [member for member in members if member.extension in PICTURE_EXTENSIONS]
        for picture in pictures or [NO_PICTURE]:
            try:
                if picture is NO_PICTURE:
                    raise Rejected("read", "no_picture")
                if key in seen:
                    raise Rejected("read", "duplicate_key")
                seen.add(key)
                yield Sample(position, key, picture.data, _texts(members, texts))
            except Rejected as why:
                yield Reject.of(position, key, why)
            position += 1


def _by_key(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    group: list[Member] = []
    for member in members:
        if group and member.key != group[0].key:
            yield group[0].key, group
            group = []
        group.append(member)
    if group:
        yield group[0].key, group


def _texts(members: list[Member], names: Sequence[str]) -> dict[str, str]:
    found = {member.extension: member.data for member in reversed(members)}
    texts: dict[str, str] = {}
    for name in names:
        try:
            if name in found:
                texts[name] = found[name].decode()
        except UnicodeDecodeError:
            raise Rejected("read", "bad_text", name) from None
    return texts


def read_members(stream: BinaryIO, url: str) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU and pax long names), to its end mark; all else is passed over."""
    offset = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _exactly(stream, BLOCK, url, offset)
        if not any(header):
            if any(_exactly(stream, BLOCK, url, offset + BLOCK)):
                raise ShardError(f"{url} is damaged: after byte {offset} stands one block of zeros, not two")
            return
        size = long_size if long_size is not None else _number(header[124:136], url, offset)
        _check_sum(header, url, offset)
        kind, start = header[156:157], offset + BLOCK
        extra = kind in b"LxgK"
        if size > (MAX_HEADER if extra else MAX_MEMBER):
            raise ShardError(f"{url} has a member of {size} bytes at byte {offset}: that is more than is read")
        data = _exactly(stream, size, url, start)
        padding = -size % BLOCK
        _exactly(stream, padding, url, start + size)
        if kind == b"L":
            long_name = _text(data.rstrip(b"\0"), url, offset)
        elif kind == b"x":
            path, length = _PAX_PATH.search(data), _PAX_SIZE.search(data)
            long_name = _text(path[1], url, offset) if path else None
            long_size = int(length[1]) if length else None
        elif not extra:
            if kind in b"0\0":
                yield Member(long_name or _short_name(header, url, offset), data)
            long_name = long_size = None
        offset = start + size + padding


def _exactly(stream: BinaryIO, count: int, url: str, offset: int) -> bytes:
    data = stream.read(count)
    while len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            raise ShardError(f"{url} is cut off at byte {offset + len(data)}: it has no end mark")
        data += more
    return data


def _number(field: bytes, url: str, offset: int) -> int:
    """An octal number, or GNU's base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        digits = field.strip(b"\0 ")
        if not digits.isdigit() or b"8" in digits or b"9" in digits:
            if digits:
                raise ShardError(f"{url} is damaged: the header at byte {offset} is not one of a tar")
            return 0
        value = int(digits, 8)
    return value


def _check_sum(header: bytes, url: str, offset: int) -> None:
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _number(header[148:156], url, offset):
        raise ShardError(f"{url} is damaged: the header at byte {offset} is not one of a tar")


def _short_name(header: bytes, url: str, offset: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, url, offset)


def _text(name: bytes, url: str, offset: int) -> str:
    try:
        return name.decode().removeprefix("./")
    except UnicodeDecodeError:
        raise ShardError(f"{url} has a member at byte {offset} whose name is not UTF-8") from None
