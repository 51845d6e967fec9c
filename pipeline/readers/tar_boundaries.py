"""Find bytes at which a large tar can be divided between two samples. Only a small part of the tar is read.

A boundary is the first byte of a member (of its extended headers, if it has any) whose key differs from that of the
member before it. Near each wanted byte, a header is searched, and the members that follow it show the next boundary.
If that fails, because the member there is large, say, the headers are read one after the other from the last boundary
on.

The content of a member can look like a tar only if it is one. So a tar whose members include tars is never searched.
The worker that reads a range checks that the next range begins where a member ends (`readers.tar`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import BinaryIO, cast

from pipeline.canonical_json import VERIFY_HINT, canonical_json
from pipeline.errors import CacheError, DamagedError, ShardError
from pipeline.limits import Limits
from pipeline.readers.blocks import BLOCK_BYTES, BlockReader, ReadRange
from pipeline.readers.members import DEFAULT_WANTED, Member
from pipeline.readers.tar import BLOCK, WHOLE, detect_other_archive, is_header, read_all_members, read_archive
from pipeline.records import Unit

SEARCHED = (BLOCK_BYTES, 4 * BLOCK_BYTES, 16 * BLOCK_BYTES)  # bytes per request until a header is found
CHAIN = 16  # members that follow one another without a gap are no accident
LONGEST_CHAIN = 1024  # members of one key, before the search is given up


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search. boundary: None if there is none. has_tars: whether a member is a tar itself."""

    boundary: int | None = None
    has_tars: bool = False


class TarHeaders:
    """The headers of a tar. read_range: reads bytes of it. size: in bytes. url: for errors."""

    def __init__(self, read_range: ReadRange, size: int, url: str, limits: Limits) -> None:
        self._read_range, self._size, self._url = read_range, size, url
        self._limits = replace(limits, image_bytes=0, text_bytes=0)  # no content is read

    def is_searchable(self) -> bool:
        """Whether boundaries can be searched: no member is a tar, as far as the first members show.

        Raises ShardError or DamagedError if the file does not begin like a tar. A compressed one does not.
        """
        if kind := detect_other_archive(self._read_range(0, min(BLOCK, self._size))):
            raise ShardError(f"{self._url} is a {kind} file")
        return not any(map(_is_tar, islice(self._walk(0), CHAIN)))

    def search(self, wanted: int) -> Found:
        """Search the first boundary that the members after a byte show."""
        reader, start = self._find_header(wanted)
        if reader is None:
            return Found()
        members = read_archive(cast(BinaryIO, reader), self._url, DEFAULT_WANTED, self._limits, (start, None))
        found, keys = None, list[str]()
        try:
            # an extended header with the name of the first member may precede it
            for count, member in enumerate(islice(members, 1, LONGEST_CHAIN)):
                if _is_tar(member):
                    return Found(has_tars=True)
                if not member.is_hidden:
                    keys.append(member.key)
                    if found is None and keys[-1] != keys[0]:
                        found = member.start
                if found is not None and count >= CHAIN:
                    return Found(found)
        except DamagedError:
            return Found()
        return Found()  # the end of this archive, or a key with very many members

    def _find_header(self, wanted: int) -> tuple[BlockReader | None, int]:
        """Return a reader at the first header at or after a byte, and its byte; None if it is far away."""
        start = -(-wanted // BLOCK) * BLOCK
        for count in SEARCHED:
            if start >= self._size:
                break
            data = self._read_range(start, min(start + count, self._size))
            at = data.find(b"ustar")
            while at >= 0:
                header = at - 257
                if header >= 0 and header % BLOCK == 0 and is_header(data[header : header + BLOCK]):
                    return BlockReader(self._read_range, self._size, start + header, start, data), start + header
                at = data.find(b"ustar", at + 1)
            start += count
        return None, 0

    def walk_boundaries(self, start: int) -> Iterator[int]:
        """Yield all boundaries after a boundary, or after the tar's start, up to damaged bytes."""
        last: str | None = None
        try:
            for member in self._walk(start):
                if not member.is_hidden:
                    if last is not None and member.key != last:
                        yield member.start
                    last = member.key
        except (DamagedError, ShardError):
            return

    def _walk(self, start: int) -> Iterator[Member]:
        reader = cast(BinaryIO, BlockReader(self._read_range, self._size, start))
        return read_all_members(reader, self._url, DEFAULT_WANTED, self._limits, (start, None))


def choose_boundaries(headers: TarHeaders, wanted: Sequence[int], searched: Sequence[Found]) -> list[int]:
    """Return a boundary at or after each wanted byte, sorted and without repetitions.

    searched: the results of `TarHeaders.search` for each of the wanted bytes.
    """
    chosen, last = list[int](), 0
    walk: Iterator[int] | None = None  # from the last boundary that was searched
    use_search = not any(found.has_tars for found in searched)
    for byte, found in zip(wanted, searched, strict=True):
        if last >= byte:
            continue
        boundary = found.boundary if use_search else None
        if boundary is None:
            walk = walk or headers.walk_boundaries(last)
            boundary = next((walked for walked in walk if walked >= byte), None)
        else:
            walk = None
        if boundary is not None:
            chosen.append(boundary)
            last = boundary
    return chosen


def pack_ranges(boundaries: Sequence[int]) -> list[str]:
    """Return the `files` of a tar's units, one per range: its bytes [start, stop]. stop: null for the tar's end."""
    if not boundaries:
        return [""]
    pairs = zip([0, *boundaries], [*boundaries, None], strict=True)
    return [canonical_json(list(pair)).decode() for pair in pairs]


def unpack_range(unit: Unit) -> tuple[int, int | None]:
    """Return the bytes (start, stop) of a tar that a unit reads. Raises CacheError if the plan is corrupt."""
    if not unit.files:
        return WHOLE
    try:
        start, stop = json.loads(unit.files)
        return int(start), None if stop is None else int(stop)
    except (ValueError, TypeError) as error:
        raise CacheError(f"the plan has no valid range of bytes of the unit {unit.name}; {VERIFY_HINT}") from error


def _is_tar(member: Member) -> bool:
    """Whether the content of a member is a tar, by its name."""
    return member.extension.rpartition(".")[2] == "tar"
