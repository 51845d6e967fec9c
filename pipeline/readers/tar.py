"""A tar shard in webdataset's layout (img2dataset's too), read as a stream: never downloaded whole, never unpacked.

Members that share a key stand next to each other: `0001.jpg`, `0001.txt`, `0001.json`. The key is the member's path
up to the first dot of its base name. Python's `tarfile` and webdataset end silently where a shard is cut off, and
before a second archive that was appended to the first; this reader demands the end mark, two blocks of zeros
(POSIX.1-2001, pax interchange format), and goes on after it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import BinaryIO

from pipeline.errors import DamagedError, Rejected, ShardError
from pipeline.limits import DEFAULT_LIMITS, Limits, check_key, check_text, printable_key, to_valid_text
from pipeline.readers import compression
from pipeline.readers.tar_members import APART, HIDDEN, STRAY, Member, explain_no_image, fold_key, is_stray
from pipeline.records import TEXT_EXTENSIONS, Reject, Sample

BLOCK = 512
SKIP_AT_ONCE = 1 << 20
FILES = b"0\x007"
FOLDER = b"5"
OLD_FILE = b"\0"  # of tars before POSIX: a folder where its name ends with `/`
WITHOUT_DATA = b"123456"  # links, devices, folders: none follows, whatever their size says
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")
_PAX_SIZE = re.compile(rb"[0-9]{1,19}\n")


NO_IMAGE = Member("", 0, b"")
APART_FROM_IMAGE = "; its image stands elsewhere in the tar: the files of a sample must follow each other"
OTHER_SPELLING = (
    "; an image's key differs from it in the case of letters or in Unicode normalization only: rename one of them"
)


def read_tar(
    stream: BinaryIO,
    url: str,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    passed: Counter[str] | None = None,
) -> Iterator[Sample | Reject]:
    """The samples of a tar, in their order. texts: extensions of the members that come along as columns.

    passed: what is no part of a sample is counted there, as HIDDEN and STRAY; and as APART, how many images and texts
    of one key do not follow each other.
    Rejects (stage "read"): `no_image`, `image_not_embedded`, `duplicate_key`, `bad_key`, `too_many_bytes`, `bad_text`,
    `text_too_long`.
    Raises DamagedError, which names the URL and the byte, where the tar is damaged or ends early; ShardError where
    it has more members than are read, and where it is compressed.
    """
    passed = Counter() if passed is None else passed
    position = 0
    seen: set[str] = set()
    others: set[str] = set()  # keys as `folded` makes them, where that is another text
    alone: set[str] = set()  # of texts without an image
    for key, members in _by_key(read_members(stream, url, texts, limits, passed)):
        images = [member for member in members if member.is_image]
        if not images and is_stray(members, texts):
            passed[STRAY] += len(members)
            continue
        other, same = (alone, seen) if images else (seen, alone)
        passed[APART] += key in other and key not in same
        for image in images or [NO_IMAGE]:
            try:
                if image is NO_IMAGE:
                    alone.add(key)
                    raise explain_no_image(members, _where_the_image_is(key, seen, others))
                if image.is_link:
                    raise Rejected("read", "image_not_embedded")
                check_key(key, limits)
                if key in seen:
                    raise Rejected("read", "duplicate_key")
                seen.add(key)
                if fold_key(key) != key:
                    others.add(fold_key(key))
                if image.data is None:
                    raise Rejected("read", "too_many_bytes", image.size, limits.image_bytes)
                yield Sample(position, key, image.data, _texts(members, texts, limits))
            except Rejected as why:
                yield Reject.of(position, printable_key(key, limits), why)
            position += 1


def _where_the_image_is(key: str, seen: Set[str], others: Set[str]) -> str:
    """What is known of the image of a sample that has none. seen: keys of images so far; others: the same, folded."""
    if key in seen:
        return APART_FROM_IMAGE
    return OTHER_SPELLING if fold_key(key) in seen or fold_key(key) in others else ""


def _by_key(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """The members of each key that stand together. The first image and the first text of an extension keep their
    bytes: no other is used, and there may be any number."""
    group: list[Member] = []
    held: set[str] = set()
    for member in members:
        if group and member.key != group[0].key:
            yield group[0].key, group
            group, held = [], set()
        kind = "image" if member.is_image else f".{member.extension}"
        group.append(replace(member, data=None) if kind in held else member)
        if not member.is_link:
            held.add(kind)
    if group:
        yield group[0].key, group


def _texts(members: list[Member], names: Sequence[str], limits: Limits) -> dict[str, str]:
    texts: dict[str, str] = {}
    for member in members:
        if member.extension in names:
            if member.is_link:
                raise Rejected("read", "image_not_embedded")
            if member.extension in texts:  # which of them is the image's, nobody can tell
                raise Rejected("read", "bad_text", member.extension)
            if member.data is None:
                raise Rejected("read", "text_too_long", member.extension, limits.text_bytes)
            text = check_text(member.data, member.extension, limits)
            if text is not None:
                texts[member.extension] = text
    return texts


def read_members(
    stream: BinaryIO,
    url: str,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    passed: Counter[str] | None = None,
) -> Iterator[Member]:
    """The files, links and devices of a tar (ustar, GNU and pax long names), and of those appended to it.

    Only images and texts are held, and only where they are within their limits. Hidden files are passed over, and
    counted in `passed`.
    """
    for member in _all_members(stream, url, texts, limits):
        if not member.is_hidden:
            yield member
        elif passed is not None:
            passed[HIDDEN] += 1


def _all_members(stream: BinaryIO, url: str, texts: Sequence[str], limits: Limits) -> Iterator[Member]:
    offset = count = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _exactly(stream, BLOCK, url, offset) if offset else _first_header(stream, url)
        if not any(header):
            if any(_exactly(stream, BLOCK, url, offset + BLOCK)):
                raise DamagedError(
                    f"{url} is damaged: after byte {offset} stands one block of zeros, not two", at=offset
                )
            offset, header = _next_archive(stream, url, offset + 2 * BLOCK)
            if not header:
                return
        size = _number(header[124:136], url, offset)
        _check_sum(header, url, offset)
        kind, start = header[156:157], offset + BLOCK
        if kind in b"LxgK":
            if size > limits.header_bytes:
                raise DamagedError(
                    f"{url} has a header of {size} bytes at byte {offset}: that is more than is read", at=offset
                )
            data = _exactly(stream, size, url, start)
            if kind == b"L":
                long_name = _text(data.rstrip(b"\0"))
            elif kind == b"x":
                said = _pax(data, url, offset)
                long_name = _text(said[b"path"]) if b"path" in said else None
                long_size = int(said[b"size"]) if b"size" in said else None
        else:
            count += 1
            if count > limits.members:
                raise ShardError(f"{url} has more than {limits.members} members; --input-limit members=N reads more")
            name = long_name or _short_name(header)
            is_folder = kind == FOLDER or (kind == OLD_FILE and name.endswith("/"))
            size = long_size if long_size is not None else size
            if is_folder or kind in WITHOUT_DATA:
                size = 0
            member = Member(name, size, None, is_link=kind not in FILES)
            if not member.is_link and size <= _most(member, texts, limits):
                member = Member(member.name, size, _exactly(stream, size, url, start))
            else:
                _skip(stream, size, url, start)
            if not is_folder:
                yield member
            long_name = long_size = None
        padding = -size % BLOCK
        _exactly(stream, padding, url, start + size)
        offset = start + size + padding


def _first_header(stream: BinaryIO, url: str) -> bytes:
    """The first header of a tar. Raises ShardError where the file is another archive."""
    start = _up_to(stream, BLOCK)
    kind = compression.archive_kind(start)
    if kind and start[257:262] != b"ustar":  # a name may begin with any bytes
        raise ShardError(f"{url} is not a tar but {kind}; {compression.ADVICE}")
    return start + _exactly(stream, BLOCK - len(start), url, len(start))


def _next_archive(stream: BinaryIO, url: str, offset: int) -> tuple[int, bytes]:
    """What stands after an end mark: mostly zeros up to the end, then b""; else the first header of a further tar."""
    while block := _up_to(stream, BLOCK):
        if any(block):
            return offset, block + _exactly(stream, BLOCK - len(block), url, offset + len(block))
        offset += len(block)
    return offset, b""


def _pax(data: bytes, url: str, offset: int) -> dict[bytes, bytes]:
    """The records of an extended header, `LENGTH KEY=VALUE` each, with a newline."""
    said: dict[bytes, bytes] = {}
    place = 0
    while length := _PAX_LENGTH.match(data, place):
        end = place + int(length[1])
        key, equals, value = data[length.end() : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            break
        if key == b"size" and not _PAX_SIZE.fullmatch(value):
            break
        said[key], place = value[:-1], end
    if data[place:].strip(b"\0"):
        raise DamagedError(f"{url} is damaged: the extended header at byte {offset} is not one of a tar", at=offset)
    return said


def _most(member: Member, texts: Sequence[str], limits: Limits) -> int:
    """The bytes up to which a member is held."""
    if member.is_hidden:
        return 0
    if member.is_image:
        return limits.image_bytes
    return limits.text_bytes if member.extension in texts else 0


def _skip(stream: BinaryIO, count: int, url: str, offset: int) -> None:
    while count > 0:
        some = min(count, SKIP_AT_ONCE)
        _exactly(stream, some, url, offset)
        offset, count = offset + some, count - some


def _exactly(stream: BinaryIO, count: int, url: str, offset: int) -> bytes:
    data = _up_to(stream, count)
    if len(data) < count:
        end = offset + len(data)
        raise DamagedError(f"{url} is cut off at byte {end}: it has no end mark", at=end)
    return data


def _up_to(stream: BinaryIO, count: int) -> bytes:
    """So many bytes, or all up to the end; a stream may give less than was asked for."""
    data = stream.read(count)
    while len(data) < count and (more := stream.read(count - len(data))):
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
                raise DamagedError(f"{url} is damaged: the header at byte {offset} is not one of a tar", at=offset)
            return 0
        value = int(digits, 8)
    return value


def _check_sum(header: bytes, url: str, offset: int) -> None:
    if sum(header[:148]) + 8 * 32 + sum(header[156:]) != _number(header[148:156], url, offset):
        raise DamagedError(f"{url} is damaged: the header at byte {offset} is not one of a tar", at=offset)


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    """A name as text: `\\` as Windows writes it is `/`, and a `./` in front is no part of it."""
    return to_valid_text(name.decode(errors="surrogateescape")).replace("\\", "/").removeprefix("./")
