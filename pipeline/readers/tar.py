"""Read tar shards in the layout of webdataset and img2dataset, as streams: never downloaded whole, never unpacked.

Members that share a key are adjacent: `0001.jpg`, `0001.txt`, `0001.json`. The key is the member's path up to the first
dot of its base name. Python's `tarfile` and webdataset end silently at the end of a truncated shard, and before a
second archive that was appended to the first. This reader requires the end mark, two blocks of zeros (POSIX.1-2001, pax
interchange format), and continues after it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import BinaryIO

from pipeline.errors import DamagedError, Rejected, ShardError
from pipeline.limits import DEFAULT_LIMITS, Limits, check_key, check_text
from pipeline.readers import compression
from pipeline.readers.tar_members import (
    APART,
    HIDDEN,
    STRAY,
    Member,
    explain_no_image,
    fold_key,
    is_stray,
    select_images,
)
from pipeline.records import TEXT_EXTENSIONS, Reject, Sample, image_rank
from pipeline.text import printable_key, to_valid_text

BLOCK = 512
SKIP_SIZE = 1 << 20  # bytes per read of a skipped member
FILES = b"0\x007"
FOLDER = b"5"
OLD_FILE = b"\0"  # in tars before POSIX; a folder if its name ends with `/`
WITHOUT_DATA = b"123456"  # links, devices, folders: no data follows, even if the size field is not 0
_PAX_LENGTH = re.compile(rb"([0-9]{1,9}) ")
_PAX_SIZE = re.compile(rb"[0-9]{1,19}\n")


NO_IMAGE = Member("", 0, b"")
APART_FROM_IMAGE = "; its image is elsewhere in the tar: the files of a sample must be adjacent"
OTHER_SPELLING = (
    "; the key of an image differs only in the case of letters or in Unicode normalization: rename one of them"
)


def read_tar(
    stream: BinaryIO,
    url: str,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    skipped: Counter[str] | None = None,
    encoding: str = "utf-8",
) -> Iterator[Sample | Reject]:
    """Yield the samples of a tar, in their order. texts: extensions of the members that are copied as columns.

    encoding: of these texts.

    skipped: receives the number of members that are not part of a sample, as HIDDEN and STRAY. As APART it receives
    how many images and texts of one key are not adjacent.
    Rejects (stage "read"): `no_image`, `image_not_embedded`, `duplicate_key`, `bad_key`, `too_many_bytes`, `bad_text`,
    `text_too_long`.
    Raises DamagedError, which names the URL and the byte, if the tar is damaged or truncated. Raises ShardError if it
    has more members than the limit, or if it is compressed.
    """
    skipped = Counter() if skipped is None else skipped
    position = 0
    keys: set[str] = set()  # of images so far
    folded: set[str] = set()  # the same by `fold_key`, if that changes them
    keys_without_image: set[str] = set()
    for key, members in _group_by_key(read_members(stream, url, texts, limits, skipped)):
        images = select_images(members)
        if not images and is_stray(members, texts):
            skipped[STRAY] += len(members)
            continue
        other, same = (keys_without_image, keys) if images else (keys, keys_without_image)
        skipped[APART] += key in other and key not in same
        for image in images or [NO_IMAGE]:
            try:
                if image is NO_IMAGE:
                    keys_without_image.add(key)
                    raise explain_no_image(members, _explain_missing_image(key, keys, folded))
                if image.is_link:
                    raise Rejected("read", "image_not_embedded")
                check_key(key, limits)
                if key in keys:
                    raise Rejected("read", "duplicate_key")
                keys.add(key)
                if fold_key(key) != key:
                    folded.add(fold_key(key))
                if image.data is None:
                    raise Rejected("read", "too_many_bytes", image.size, limits.image_bytes)
                yield Sample(position, key, image.data, _collect_texts(members, texts, limits, encoding))
            except Rejected as error:
                yield Reject.from_error(position, printable_key(key, limits.key_bytes), error)
            position += 1


def _explain_missing_image(key: str, keys: Set[str], folded: Set[str]) -> str:
    """Return a hint about the image of a sample without one. keys: of images so far. folded: the same by `fold_key`."""
    if key in keys:
        return APART_FROM_IMAGE
    return OTHER_SPELLING if fold_key(key) in keys or fold_key(key) in folded else ""


def _group_by_key(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Yield groups of adjacent members with one key.

    Only the first image of each rank, and the first text of each extension, keep their bytes. No other member is used,
    and there may be any number of them.
    """
    group: list[Member] = []
    held: set[str] = set()
    for member in members:
        if group and member.key != group[0].key:
            yield group[0].key, group
            group, held = [], set()
        kind = f"image {image_rank(member.extension)}" if member.is_image else f".{member.extension}"
        group.append(replace(member, data=None) if kind in held else member)
        if not member.is_link:
            held.add(kind)
    if group:
        yield group[0].key, group


def _collect_texts(members: list[Member], names: Sequence[str], limits: Limits, encoding: str) -> dict[str, str]:
    """Return the texts of a sample, by extension. Raises Rejected if one of them cannot be used."""
    texts: dict[str, str] = {}
    for member in members:
        if member.extension in names:
            if member.is_link:
                raise Rejected("read", "image_not_embedded")
            if member.extension in texts:  # it is unknown which of them is the image's
                raise Rejected("read", "bad_text", member.extension)
            if member.data is None:
                raise Rejected("read", "text_too_long", member.extension, limits.text_bytes)
            text = check_text(member.data, member.extension, limits, encoding)
            if text is not None:
                texts[member.extension] = text
    return texts


def read_members(
    stream: BinaryIO,
    url: str,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    skipped: Counter[str] | None = None,
) -> Iterator[Member]:
    """Yield the files, links and devices of a tar (ustar, GNU and pax long names), and of tars appended to it.

    Only the bytes of images and texts within their limits are kept. Hidden files are skipped, and counted in `skipped`.
    """
    for member in _read_all_members(stream, url, texts, limits):
        if not member.is_hidden:
            yield member
        elif skipped is not None:
            skipped[HIDDEN] += 1


def _read_all_members(stream: BinaryIO, url: str, texts: Sequence[str], limits: Limits) -> Iterator[Member]:
    """Yield the members of `read_members`, including hidden ones."""
    offset = count = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _read_exactly(stream, BLOCK, url, offset) if offset else _read_first_header(stream, url)
        if not any(header):
            if any(_read_exactly(stream, BLOCK, url, offset + BLOCK)):
                raise DamagedError(
                    f"{url} is damaged: there is one block of zeros after byte {offset}, not two", at=offset
                )
            offset, header = _find_next_archive(stream, url, offset + 2 * BLOCK)
            if not header:
                return
        size = _parse_number(header[124:136], url, offset)
        _check_header_sum(header, url, offset)
        kind, start = header[156:157], offset + BLOCK
        if kind in b"LxgK":
            if size > limits.header_bytes:
                raise DamagedError(
                    f"{url} has a header of {size} bytes at byte {offset}; --input-limit header_bytes=N accepts it",
                    at=offset,
                )
            data = _read_exactly(stream, size, url, start)
            if kind == b"L":
                long_name = _decode_name(data.rstrip(b"\0"))
            elif kind == b"x":
                records = _parse_pax(data, url, offset)
                long_name = _decode_name(records[b"path"]) if b"path" in records else None
                long_size = int(records[b"size"]) if b"size" in records else None
        else:
            count += 1
            if count > limits.members:
                raise ShardError(f"{url} has more than {limits.members} members; --input-limit members=N accepts more")
            name = long_name or _parse_name(header)
            is_folder = kind == FOLDER or (kind == OLD_FILE and name.endswith("/"))
            size = long_size if long_size is not None else size
            if is_folder or kind in WITHOUT_DATA:
                size = 0
            member = Member(name, size, None, is_link=kind not in FILES)
            if not member.is_link and size <= _limit_bytes(member, texts, limits):
                member = Member(member.name, size, _read_exactly(stream, size, url, start))
            else:
                _skip(stream, size, url, start)
            if not is_folder:
                yield member
            long_name = long_size = None
        padding = -size % BLOCK
        _read_exactly(stream, padding, url, start + size)
        offset = start + size + padding


def _read_first_header(stream: BinaryIO, url: str) -> bytes:
    """Read the first header of a tar. Raises ShardError if the file is another kind of archive."""
    start = _read_up_to(stream, BLOCK)
    kind = compression.detect_archive(start)
    if kind and start[257:262] != b"ustar":  # a name may begin with any bytes
        raise ShardError(f"{url} is not a tar, but a {kind} file; {compression.ADVICE}")
    return start + _read_exactly(stream, BLOCK - len(start), url, len(start))


def _find_next_archive(stream: BinaryIO, url: str, offset: int) -> tuple[int, bytes]:
    """Skip zeros after an end mark. Return the offset and first header of a further tar, or b"" at the end."""
    while block := _read_up_to(stream, BLOCK):
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


def _limit_bytes(member: Member, texts: Sequence[str], limits: Limits) -> int:
    """Return the size in bytes up to which the content of a member is kept."""
    if member.is_hidden:
        return 0
    if member.is_image:
        return limits.image_bytes
    return limits.text_bytes if member.extension in texts else 0


def _skip(stream: BinaryIO, count: int, url: str, offset: int) -> None:
    """Read and discard `count` bytes."""
    while count > 0:
        size = min(count, SKIP_SIZE)
        _read_exactly(stream, size, url, offset)
        offset, count = offset + size, count - size


def _read_exactly(stream: BinaryIO, count: int, url: str, offset: int) -> bytes:
    """Read exactly `count` bytes. Raises DamagedError if the file ends before. offset: of the first byte."""
    data = _read_up_to(stream, count)
    if len(data) < count:
        end = offset + len(data)
        raise DamagedError(f"{url} is truncated at byte {end}: it has no end mark", at=end)
    return data


def _read_up_to(stream: BinaryIO, count: int) -> bytes:
    """Read `count` bytes, or all up to the end. A single read of a stream may return fewer."""
    data = stream.read(count)
    while len(data) < count and (more := stream.read(count - len(data))):
        data += more
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
    return _decode_name(prefix + b"/" + name if prefix else name)


def _decode_name(name: bytes) -> str:
    """Return a name as text. The `\\` of Windows becomes `/`, and a leading `./` is removed."""
    return to_valid_text(name.decode(errors="surrogateescape")).replace("\\", "/").removeprefix("./")
