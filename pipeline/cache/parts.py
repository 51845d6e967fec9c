"""The write step: publish a part's file once, and find and read the parts that exist.

If a file exists under a part's name, it is the part, even if a `create` reported an error. The record in that file
counts. Nothing in this module removes or overwrites a part.
"""

import hashlib
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol

import pyarrow as pa

from latentmill.cache_files import DATA as DATA
from latentmill.cache_files import EMPTY as EMPTY
from latentmill.cache_files import PART_SUFFIXES
from latentmill.cache_files import iterate_part_files as iterate_part_files
from latentmill.cache_files import list_part_files as list_part_files
from latentmill.group_spans import GroupSpan, Readable
from latentmill.part_files import PARQUET_SUFFIX, WEBDATASET_SUFFIX, count_record_bytes, read_record_json
from pipeline.cache.part_info import PartInfo
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import REST_OF_SHARD, CacheError, StorageError
from pipeline.formats import parquet, webdataset
from pipeline.formats.part_record import PartRecord, format_part_stem
from pipeline.formats.schema import OutputSchema
from pipeline.records import Container, Row
from pipeline.storage.folder import Folder

HASHED_AT_ONCE = 32 << 20  # bytes of a part that are in memory while it is hashed
RECORD_BYTES = 64 << 10  # bytes at the edge of a file in which most records are found
_RETRY_STEM = re.compile(r"-\d{5}r\d+$")


class PartFormat(Protocol):
    """A file format for parts with rows: one module in `pipeline.formats` per container."""

    SUFFIX: str  # the extension of the files, with its dot

    def describe_schema(self, layout: OutputSchema) -> list[dict[str, str]]:
        """Return the columns or members of a row as cache.json describes them."""

    def serialize_part(
        self, rows: Iterable[Row], record: PartRecord, layout: OutputSchema
    ) -> tuple[memoryview, Sequence[GroupSpan]]:
        """Return the content of a part's file, and its row groups. rows: at least one."""

    def read_groups(self, edge: bytes, file: Readable) -> Sequence[GroupSpan]:
        """Return the row groups of a part. edge: the bytes with its record. file: at its start; it may be read."""


PART_FORMATS: Mapping[Container, PartFormat] = {"parquet": parquet, "webdataset": webdataset}


def describe_schema(layout: OutputSchema) -> list[dict[str, str]]:
    """Return the columns of a row, or the members of a sample, as cache.json describes them."""
    return PART_FORMATS[layout.container].describe_schema(layout)


def publish_part(cache: Folder, record: PartRecord, rows: Iterable[Row], layout: OutputSchema) -> PartInfo:
    """Create a part's file, and return the part that exists: another writer's, if its file was first.

    rows: as many as the record counts. They are read once, and each is dropped once it is in the file.
    The record of the result is `record` itself if this call created the file.
    A part with rows and a part without rows have different names. Two writers can disagree about the rows, for example
    because of their limits. Then the part with rows counts, because it is the one that readers see. So it is created in
    any case. If a commit names the part without rows, `commit_scan` repairs that commit at the end of a run.
    """
    part_format = PART_FORMATS[layout.container]
    data_file = f"{DATA}/{record.stem}{part_format.SUFFIX}"
    if record.rows:
        data, groups = part_format.serialize_part(rows, record, layout)
        with data:
            return _create(cache, data_file, data, record, groups)
    existing = inspect_part(cache, data_file, record.identity)
    return existing or _create(cache, f"{EMPTY}/{record.stem}.json", record.to_json(), record)


class UnitParts:
    """The parts of a unit: which ones exist, as far as a worker knows, and those that it publishes.

    unit: the unit's name. standing: the files of the unit that existed when they were listed. Only these are looked
    for, until a file exists that was not among them. Then another writer works on the unit, and each further part is
    looked for. A writer that is not noticed does no harm, because a file is only created if it does not exist.
    """

    def __init__(
        self, cache: Folder, unit: str, identity_sha256: str, layout: OutputSchema, standing: Collection[str]
    ) -> None:
        self.cache, self.unit, self.identity_sha256, self.layout = cache, unit, identity_sha256, layout
        self.standing: Collection[str] | None = standing

    def find(self, number: int) -> PartInfo | None:
        """Return the part of this number, or None if it does not exist as far as is known."""
        return find_part(
            self.cache, self.unit, number, self.identity_sha256, self.layout.container, among=self.standing
        )

    def publish(self, record: PartRecord, rows: Iterable[Row]) -> PartInfo:
        """Publish a part as `publish_part` does."""
        part = publish_part(self.cache, record, rows, self.layout)
        if part.record is not record:
            self.standing = None
        return part


def _create(
    cache: Folder, name: str, data: bytes | memoryview, record: PartRecord, groups: Sequence[GroupSpan] = ()
) -> PartInfo:
    try:
        if cache.create(name, data):
            return PartInfo(record, name, len(data), hashlib.sha256(data).hexdigest(), groups)
    except StorageError:  # the file may exist nevertheless, if only the answer was lost
        if (existing := inspect_part(cache, name, record.identity)) is None:
            raise
        return existing
    if (existing := inspect_part(cache, name, record.identity)) is None:
        raise StorageError(f"{cache.url_of(name)} existed when it was to be created, and was removed since; try again")
    return existing


def find_part(
    cache: Folder,
    unit: str,
    number: int,
    identity_sha256: str,
    container: Container = "parquet",
    round: int = 0,
    among: Collection[str] | None = None,
) -> PartInfo | None:
    """Return the part of this number, or None if it does not exist yet. Its whole file is read (`inspect_part`).

    unit: the unit's name. round: the number of the retry that wrote the part, 0 for a part of the encode command.
    among: the files that may exist; None: any.
    """
    for name in list_part_names(unit, number, container, round):
        if among is None or name in among:
            part = inspect_part(cache, name, identity_sha256)
            if part is not None:
                return part
    return None


def find_record(
    cache: Folder, unit: str, number: int, identity_sha256: str, container: Container = "parquet", round: int = 0
) -> PartRecord | None:
    """Return the record of the part of this number, or None if it does not exist yet (`find_part`).

    Of its file, only the record is read (`read_part_record`).
    """
    names = list_part_names(unit, number, container, round)
    records = (read_part_record(cache, name, identity_sha256) for name in names)
    return next((record for record in records if record is not None), None)


def list_part_names(unit: str, number: int, container: Container, round: int = 0) -> tuple[str, str]:
    """Return the two names that a part can have: with rows, and without rows."""
    stem = format_part_stem(unit, number, round)
    return f"{DATA}/{stem}{PART_FORMATS[container].SUFFIX}", f"{EMPTY}/{stem}.json"


def inspect_part(cache: Folder, name: str, identity_sha256: str) -> PartInfo | None:
    """Read the part with this file name: its record, size, sha256 and groups. Returns None if there is no such file.

    The whole file is read for its sha256, block by block. Where the record is enough, use `read_part_record`.
    Raises CacheError if the file belongs to another cache or another name.
    """
    block = cache.read_slice(name, 0, HASHED_AT_ONCE)
    if block is None:
        return None
    edge = block if len(block) < HASHED_AT_ONCE else read_record_bytes(cache, name)  # a short block is the whole file
    if edge is None:
        return None
    record, file = _parse_record(cache, name, edge, identity_sha256), _HashedFile(cache, name, block)
    groups = read_groups(name, edge, file, cache.url_of(name))
    return PartInfo(record, name, *file.finish(), groups)


class _HashedFile:
    """A file that is read once from its start, block by block, and hashed. block: its first HASHED_AT_ONCE bytes."""

    def __init__(self, cache: Folder, name: str, block: bytes) -> None:
        self._cache, self._name = cache, name
        self._sha256, self._size = hashlib.sha256(), 0
        self._add(block)

    def _add(self, block: bytes) -> None:
        self._sha256.update(block)
        self._size += len(block)
        self._unread = memoryview(block)

    def _read_block(self) -> bool:
        """Read the next block, and return whether there is one. A short block is the last one."""
        if self._size % HASHED_AT_ONCE == 0:
            self._add(self._cache.read_slice(self._name, self._size, self._size + HASHED_AT_ONCE) or b"")
            return len(self._unread) > 0
        return False

    def read(self, size: int, /) -> bytes:
        """Read up to `size` bytes. At the end of the file, there are none."""
        if not self._unread:
            self._read_block()
        data, self._unread = bytes(self._unread[:size]), self._unread[size:]
        return data

    def finish(self) -> tuple[int, str]:
        """Read the rest. Returns the size and the sha256 of the file."""
        while self._read_block():
            pass
        return self._size, self._sha256.hexdigest()


def read_groups(name: str, edge: bytes, file: Readable, url: str) -> Sequence[GroupSpan]:
    """Return the row groups of a part's file; none of a bare record. Raises CacheError if they cannot be read.

    name: its name. edge: its bytes with the record. file: at its start; it may be read to its end.
    """
    formats = [part_format for part_format in PART_FORMATS.values() if name.endswith(part_format.SUFFIX)]
    try:
        return [group for part_format in formats for group in part_format.read_groups(edge, file)]
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise CacheError(f"{url} is damaged: its row groups cannot be read; {VERIFY_HINT}") from error


def read_part_record(cache: Folder, name: str, identity_sha256: str) -> PartRecord | None:
    """Read the record of the part with this file name. Returns None if the file does not exist.

    Only the record is read: the end of a Parquet file, the start of a tar, the whole of a bare record.
    Raises CacheError if the file belongs to another cache or another name.
    """
    data = read_record_bytes(cache, name)
    return None if data is None else _parse_record(cache, name, data, identity_sha256)


def read_record_bytes(cache: Folder, name: str) -> bytes | None:
    """Read the edge of a part's file that has the whole record. Returns None if the file does not exist."""
    data = _read_edge(cache, name, RECORD_BYTES)
    if data is not None and len(data) == RECORD_BYTES < (needed := count_record_bytes(data, name)):
        data = _read_edge(cache, name, needed)
    return data


def _read_edge(cache: Folder, name: str, count: int) -> bytes | None:
    """Read the edge of a part's file at which its record is, up to `count` bytes, or a whole bare record."""
    if name.endswith(PARQUET_SUFFIX):
        return cache.read_slice(name, -count)
    return cache.read_slice(name, 0, count if name.endswith(WEBDATASET_SUFFIX) else None)


def _parse_record(cache: Folder, name: str, data: bytes, identity_sha256: str) -> PartRecord:
    """Return the record in a part's bytes. Raises CacheError if the file belongs to another cache or another name."""
    record = read_record(data, cache.url_of(name))
    if record.identity != identity_sha256:
        raise CacheError(f"{cache.url_of(name)} belongs to a cache with another identity; move it away")
    if get_expected_stem(record) != strip_extension(name):
        raise CacheError(
            f"{cache.url_of(name)} holds the part {get_expected_stem(record)}: it was copied or renamed; move it away"
        )
    return record


def get_expected_stem(record: PartRecord) -> str:
    """Return the name that the file of a part must have, without the extension."""
    return f"{DATA if record.rows else EMPTY}/{record.stem}"


def strip_extension(name: str) -> str:
    """Return a name without its extension."""
    return name.rpartition(".")[0]


def read_record(data: bytes, name: str) -> PartRecord:
    """Return the record inside a part's file. Raises CacheError, with the file's name, if there is none."""
    is_bare = name.endswith(".json")
    try:
        return PartRecord.from_json(data if is_bare else read_record_json(data, name))
    except (ValueError, KeyError, TypeError) as error:
        if is_bare:
            raise CacheError(f"{name} cannot be read as the record of a part") from error
        raise CacheError(f"{name} is not a part of a latentmill cache: it has no readable record") from error


def find_twins(names: Iterable[str]) -> set[str]:
    """Return the files in `_empty/` that do not count, because the same part is in `data/`, with rows."""
    names = list(names)
    data_stems = {strip_extension(name) for name in names if name.startswith(f"{DATA}/")}
    return {name for name in names if to_data_stem(name) in data_stems}


def to_data_stem(name: str) -> str | None:
    """Return the name that the part of a file in `_empty/` has in `data/`, without the extension; None otherwise."""
    return f"{DATA}/{strip_extension(name).removeprefix(f'{EMPTY}/')}" if name.startswith(f"{EMPTY}/") else None


def is_retry_part(stem: str) -> bool:
    """Return whether this is the name of a part that `retry` wrote."""
    return _RETRY_STEM.search(stem) is not None


def list_unit_files(cache: Folder, unit: str) -> list[str]:
    """Return the files of a unit's parts, including retry parts. unit: the unit's name."""
    found: list[str] = []
    for below, suffixes in PART_SUFFIXES.items():
        names = (name for name in cache.list_files_of(below, f"{unit}-") if name.endswith(suffixes))
        found += (file for name in names if parse_unit_name(file := f"{below}/{name}") == unit)
    return found


def find_unit_files(cache: Folder, units: Set[str]) -> dict[str, frozenset[str]]:
    """Return the part files of these units, including retry parts. A unit without files is left out.

    The files of the whole cache are listed, but only those of these units are held.
    """
    found: dict[str, list[str]] = {}
    for file in iterate_part_files(cache):
        if (unit := parse_unit_name(file)) in units:
            found.setdefault(unit, []).append(file)
    return {unit: frozenset(files) for unit, files in found.items()}


def read_counted_records(cache: Folder, files: Iterable[str], identity_sha256: str) -> Iterator[PartRecord]:
    """Read the records of these parts, without the files in `_empty/` that do not count."""
    files = list(files)
    twins = find_twins(files)
    for file in files:
        if file not in twins and (record := read_part_record(cache, file, identity_sha256)) is not None:
            yield record


def parse_unit_name(file: str) -> str:
    """Return the name of the unit that a part's file belongs to."""
    stem = strip_extension(file).partition("/")[2]
    return _RETRY_STEM.sub("", stem) if is_retry_part(stem) else stem.rpartition("-")[0]


def parse_commit_name(file: str) -> str:
    """Return the name of the commit to which a part's file belongs: its unit, or the stem of a retry part."""
    stem = strip_extension(file).rpartition("/")[2]
    return stem if is_retry_part(stem) else stem.rpartition("-")[0]


def read_superseded(
    cache: Folder, identity_sha256: str, units: Set[str], files: Iterable[str] | None = None
) -> dict[str, dict[int, str]]:
    """Return the rejects of these units that retry parts supersede: unit -> position -> reason.

    files: the part files of the units, and perhaps others; None: all files of the cache are listed.
    """
    superseded: dict[str, dict[int, str]] = {}
    listed = (iterate_part_files(cache) if files is None else files) if units else ()
    retried = sorted(file for file in listed if is_retry_part(strip_extension(file)) and parse_unit_name(file) in units)
    for record in read_counted_records(cache, retried, identity_sha256):
        reasons = superseded.setdefault(record.unit, {})
        for position, reason in record.supersedes:
            # The retry that reads a rest can reject its first sample, and a later retry can supersede that reject. The
            # unit's own part rejected the position as `rest_of_shard`, so that reason stays.
            if reasons.get(position) != REST_OF_SHARD:
                reasons[position] = reason
    return superseded
