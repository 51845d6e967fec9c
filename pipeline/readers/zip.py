"""Read zip archives of images. Only the members that are needed are read, each by its place in the file.

A key is that of a tar: the path up to the first dot of the base name. The members of a key form one sample, wherever
they are in the archive. Samples are in the order of their first members in the file. A unit is a range of the file's
bytes. It has the samples whose first member begins in that range.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from pipeline.errors import NoImagesError, Rejected
from pipeline.limits import Limits
from pipeline.readers.archive_samples import make_samples
from pipeline.readers.members import Member, Wanted, looks_like_image
from pipeline.readers.skipped import HIDDEN, NO_IMAGES
from pipeline.readers.zip_directory import LOCAL_HEADER, ZipEntry, read_directory
from pipeline.records import Reject, Sample

READ_AHEAD = 4 << 20  # bytes per request while members are read one after the other
_MAX_FIELD = 0xFFFF  # bytes of a name, and of an extra field
_OVERHEAD = 1024  # bytes by which the compressed content may exceed the content, beyond 1/1000
_ENCRYPTED, _STORED, _DEFLATED = 1, 0, 8


def read_zip(
    stream: BinaryIO,
    url: str,
    size: int,
    file_range: tuple[int, int],
    wanted: Wanted,
    limits: Limits,
    skipped: Counter[str] | None = None,
) -> Iterator[Sample | Reject]:
    """Yield the samples of range k of n of a zip. size: bytes of the file. file_range: (k, n).

    skipped: see `make_samples`. It also receives 1, once per file, for a file without images.
    Rejects: see `make_samples`. A member that is encrypted or damaged rejects its own sample.
    Raises DamagedError and ShardError: see `read_directory`.
    """
    k, n = file_range
    skipped = Counter() if skipped is None else skipped
    entries = read_directory(stream, url, limits)
    if not _may_have_images(entries, wanted):
        skipped[NO_IMAGES] += k == 0
        return
    in_range = [entry for entry in entries if k * size <= entry.start * n < (k + 1) * size]
    if hidden := sum(_describe(entry).is_hidden for entry in in_range):
        skipped[HIDDEN] += hidden
    members = _read_members(stream, _group_entries(entries, in_range), wanted, limits)
    yield from make_samples(members, wanted, limits, skipped)


def list_members(stream: BinaryIO, url: str, wanted: Wanted, limits: Limits) -> list[Member]:
    """Return the members of a zip without their content. Hidden ones are left out.

    Raises NoImagesError if the archive has no images, and no members that may be meant as images.
    """
    entries = read_directory(stream, url, limits)
    if not _may_have_images(entries, wanted):
        raise NoImagesError(f"{url} has no images")
    return [member for member in map(_describe, entries) if not member.is_hidden]


def _may_have_images(entries: Iterable[ZipEntry], wanted: Wanted) -> bool:
    members = (member for member in map(_describe, entries) if not member.is_hidden)
    return any(wanted.is_image(member) or looks_like_image(member) for member in members)


def _describe(entry: ZipEntry) -> Member:
    return Member(entry.name, entry.size, None, entry.is_link)


def _group_entries(entries: Sequence[ZipEntry], first: Sequence[ZipEntry]) -> Iterator[ZipEntry]:
    """Yield the entries of each key one after the other, if the first entry of the key is among `first`."""
    groups: dict[str, list[ZipEntry]] = {}
    for entry in entries:
        member = _describe(entry)
        if not member.is_hidden:
            groups.setdefault(member.key, []).append(entry)
    starts = {entry.start for entry in first}
    return (entry for group in groups.values() if group[0].start in starts for entry in group)


def _read_members(stream: BinaryIO, entries: Iterable[ZipEntry], wanted: Wanted, limits: Limits) -> Iterator[Member]:
    """Yield the members of these entries. Only the bytes of wanted members within their limits are read."""
    window = _Window(stream)
    for entry in entries:
        member = _describe(entry)
        limit = wanted.limit_bytes(member, limits)
        if entry.is_link or not limit or entry.size > limit:
            yield member
            continue
        try:
            yield Member(entry.name, entry.size, _read_content(window, entry))
        except Rejected as problem:
            yield Member(entry.name, entry.size, None, problem=problem)


def _read_content(window: "_Window", entry: ZipEntry) -> bytes:
    """Return the content of a member. Raises Rejected if it cannot be read, or is not what the directory states."""
    if entry.flags & _ENCRYPTED or entry.method not in (_STORED, _DEFLATED):
        raise Rejected("read", "unsupported_member")
    if entry.compressed > entry.size + entry.size // 1000 + _OVERHEAD:
        raise Rejected("read", "corrupt_member")
    most = LOCAL_HEADER + 2 * _MAX_FIELD + entry.compressed
    data = window.read(entry.start, min(entry.stop - entry.start, most))
    start = LOCAL_HEADER + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    content = data[start : start + entry.compressed]
    if entry.method == _DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = inflate.decompress(content, entry.size + 1)
        except zlib.error:
            raise Rejected("read", "corrupt_member") from None
    if data[:4] != b"PK\3\4" or len(content) != entry.size or zlib.crc32(content) != entry.crc:
        raise Rejected("read", "corrupt_member")
    return content


class _Window:
    """The last bytes that were read of a file, so that small members that follow one another share a request."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._start, self._data = stream, 0, b""

    def read(self, start: int, count: int) -> bytes:
        """Read `count` bytes, or fewer at the end of the file."""
        offset = start - self._start
        if not 0 <= offset <= len(self._data):
            self._start, self._data, ahead = start, b"", 0
        else:
            self._start, self._data, ahead = start, self._data[offset:], READ_AHEAD
        if count > len(self._data):
            self._stream.seek(start + len(self._data))
            self._data += self._stream.read(max(count, ahead) - len(self._data))
        return self._data[:count]
