"""A tar shard in webdataset's layout (img2dataset's too), read as a stream: never downloaded whole, never unpacked.

Members that share a key stand next to each other: `0001.jpg`, `0001.txt`, `0001.json`. The key is the member's path
up to the first dot of its base name. Python's `tarfile` and webdataset end silently where a shard is cut off; this
reader demands the end mark, two blocks of zeros (POSIX.1-2001, pax interchange format).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import DamagedError, Rejected, ShardError
from pipeline.limits import DEFAULT, Limits, check_key, check_text
from pipeline.records import PICTURE_EXTENSIONS, TEXT_EXTENSIONS, Reject, Sample

BLOCK = 512
SKIP_AT_ONCE = 1 << 20
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")
_PAX_SIZE = re.compile(rb"\d+ size=(\d+)\n")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, size and content; None of one that is too large for what it is."""

    name: str
    size: int
    data: bytes | None

    @property
    def key(self) -> str:
        folder, _, base = self.name.rpartition("/")
        stem = base.split(".", 1)[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


NO_PICTURE = Member("", 0, b"")


def read_tar(
    stream: BinaryIO, url: str, texts: Sequence[str] = TEXT_EXTENSIONS, limits: Limits = DEFAULT
) -> Iterator[Sample | Reject]:
    """The samples of a tar, in their order. texts: extensions of the members that come along as columns.

    Rejects (stage "read"): `no_picture`, `duplicate_key`, `bad_key`, `too_many_bytes`, `bad_text`, `text_too_long`.
    Raises DamagedError, which names the URL and the byte, where the tar is damaged or ends early; ShardError where
    it has more members than are read.
    """
    position = 0
    seen: set[str] = set()
    for key, members in _by_key(read_members(stream, url, texts, limits)):
        pictures = [member for member in members if member.extension in PICTURE_EXTENSIONS]
        for picture in pictures or [NO_PICTURE]:
            try:
                if picture is NO_PICTURE:
                    raise Rejected("read", "no_picture")
                check_key(key, limits)
                if key in seen:
                    raise Rejected("read", "duplicate_key")
                seen.add(key)
                if picture.data is None:
                    raise Rejected("read", "too_many_bytes", picture.size, limits.picture_bytes)
                yield Sample(position, key, picture.data, _texts(members, texts, limits))
            except Rejected as why:
                yield Reject.of(position, key[: limits.key_bytes], why)
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


def _texts(members: list[Member], names: Sequence[str], limits: Limits) -> dict[str, str]:
    texts: dict[str, str] = {}
    for member in members:
        if member.extension in names and member.extension not in texts:
            if member.data is None:
                raise Rejected("read", "text_too_long", member.extension, limits.text_bytes)
            text = check_text(member.data, member.extension, limits)
            if text is not None:
                texts[member.extension] = text
    return texts


def read_members(
    stream: BinaryIO, url: str, texts: Sequence[str] = TEXT_EXTENSIONS, limits: Limits = DEFAULT
) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU and pax long names), to its end mark; all else is passed over.

    Only pictures and texts are held, and only where they are within their limits.
    """
    offset = count = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _exactly(stream, BLOCK, url, offset)
        if not any(header):
            if any(_exactly(stream, BLOCK, url, offset + BLOCK)):
                raise DamagedError(f"{url} is damaged: after byte {offset} stands one block of zeros, not two")
            return
        size = long_size if long_size is not None else _number(header[124:136], url, offset)
        _check_sum(header, url, offset)
        kind, start = header[156:157], offset + BLOCK
        extra = kind in b"LxgK"
        padding = -size % BLOCK
        if extra:
            if size > limits.header_bytes:
                raise DamagedError(f"{url} has a header of {size} bytes at byte {offset}: that is more than is read")
            data = _exactly(stream, size, url, start)
            if kind == b"L":
                long_name = _text(data.rstrip(b"\0"), url, offset)
            elif kind == b"x":
                path, length = _PAX_PATH.search(data), _PAX_SIZE.search(data)
                long_name = _text(path[1], url, offset) if path else None
                long_size = int(length[1]) if length else None
        else:
            count += 1
            if count > limits.members:
                raise ShardError(f"{url} has more than {limits.members} members; --input-limit members=N reads more")
            member = Member(long_name or _short_name(header, url, offset), size, None)
            if kind in b"0\0" and size <= _most(member, texts, limits):
                member = Member(member.name, size, _exactly(stream, size, url, start))
            else:
                _skip(stream, size, url, start)
            if kind in b"0\0":
                yield member
            long_name = long_size = None
        _exactly(stream, padding, url, start + size)
        offset = start + size + padding


def _most(member: Member, texts: Sequence[str], limits: Limits) -> int:
    """The bytes up to which a member is held."""
    if member.extension in PICTURE_EXTENSIONS:
        return limits.picture_bytes
    return limits.text_bytes if member.extension in texts else 0


def _skip(stream: BinaryIO, count: int, url: str, offset: int) -> None:
    while count > 0:
        some = min(count, SKIP_AT_ONCE)
        _exactly(stream, some, url, offset)
        offset, count = offset + some, count - some


def _exactly(stream: BinaryIO, count: int, url: str, offset: int) -> bytes:
    data = stream.read(count)
    while len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            raise DamagedError(f"{url} is cut off at byte {offset + len(data)}: it has no end mark")
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
                raise DamagedError(f"{url} is damaged: the header at byte {offset} is not one of a tar")
            return 0
        value = int(digits, 8)
    return value


def _check_sum(header: bytes, url: str, offset: int) -> None:
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _number(header[148:156], url, offset):
        raise DamagedError(f"{url} is damaged: the header at byte {offset} is not one of a tar")


def _short_name(header: bytes, url: str, offset: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, url, offset)


def _text(name: bytes, url: str, offset: int) -> str:
    try:
        return name.decode().removeprefix("./")
    except UnicodeDecodeError:
        raise DamagedError(f"{url} has a member at byte {offset} whose name is not UTF-8") from None
