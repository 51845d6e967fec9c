"""The write step: publish a part's file once, and find and read the parts that exist.

If a file exists under a part's name, it is the part, even if a `create` reported an error. The record in that file
counts. Nothing in this module removes or overwrites a part.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Protocol

from latentmill.cache import DATA as DATA
from latentmill.cache import EMPTY as EMPTY
from latentmill.cache import list_part_files as list_part_files
from latentmill.part_files import read_record_json
from pipeline.cache.part_info import PartInfo
from pipeline.errors import REST_OF_SHARD, CacheError, StorageError
from pipeline.formats import parquet, webdataset
from pipeline.formats.part_record import PartRecord, format_part_stem
from pipeline.formats.schema import OutputSchema
from pipeline.records import Container, Row
from pipeline.storage.folder import Folder

_RETRY_STEM = re.compile(r"-\d{5}r\d+$")


class PartFormat(Protocol):
    """A file format for parts with rows: one module in `pipeline.formats` per container."""

    SUFFIX: str  # the extension of the files, with its dot

    def describe_schema(self, layout: OutputSchema) -> list[dict[str, str]]:
        """Return the columns or members of a row as cache.json describes them."""

    def serialize_part(self, rows: Sequence[Row], record: PartRecord, layout: OutputSchema) -> bytes:
        """Return the content of a part's file. rows: at least one."""


PART_FORMATS: Mapping[Container, PartFormat] = {"parquet": parquet, "webdataset": webdataset}


def describe_schema(layout: OutputSchema) -> list[dict[str, str]]:
    """Return the columns of a row, or the members of a sample, as cache.json describes them."""
    return PART_FORMATS[layout.container].describe_schema(layout)


def publish_part(cache: Folder, record: PartRecord, rows: Sequence[Row], layout: OutputSchema) -> PartInfo:
    """Create a part's file, and return the part that exists: another writer's, if its file was first.

    A part with rows and a part without rows have different names. Two writers can disagree about the rows, for example
    because of their limits. Then the part with rows counts, because it is the one that readers see.
    """
    part_format = PART_FORMATS[layout.container]
    data_file, empty_file = f"{DATA}/{record.stem}{part_format.SUFFIX}", f"{EMPTY}/{record.stem}.json"
    if not rows:
        if existing := inspect_part(cache, data_file, record.identity):
            return existing
        created = _create(cache, empty_file, record.to_json(), record)
        return inspect_part(cache, data_file, record.identity) or created
    existing = inspect_part(cache, empty_file, record.identity)
    return existing or _create(cache, data_file, part_format.serialize_part(rows, record, layout), record)


def _create(cache: Folder, name: str, data: bytes, record: PartRecord) -> PartInfo:
    try:
        if cache.create(name, data):
            return PartInfo(record, name, len(data), hashlib.sha256(data).hexdigest())
    except StorageError:  # the file may exist nevertheless, if only the answer was lost
        if (existing := inspect_part(cache, name, record.identity)) is None:
            raise
        return existing
    if (existing := inspect_part(cache, name, record.identity)) is None:
        raise StorageError(f"{cache.url_of(name)} existed when it was to be created, and was removed since; try again")
    return existing


def find_part(
    cache: Folder, unit: str, number: int, identity_sha256: str, container: Container = "parquet", round: int = 0
) -> PartInfo | None:
    """Return the part of this number, or None if it does not exist yet.

    unit: the unit's name. round: the number of the retry that wrote the part, 0 for a part of the encode command.
    """
    stem = format_part_stem(unit, number, round)
    for name in (f"{DATA}/{stem}{PART_FORMATS[container].SUFFIX}", f"{EMPTY}/{stem}.json"):
        part = inspect_part(cache, name, identity_sha256)
        if part is not None:
            return part
    return None


def inspect_part(cache: Folder, name: str, identity_sha256: str) -> PartInfo | None:
    """Read the part with this file name. Returns None if the file does not exist.

    Raises CacheError if the file belongs to another cache or another name.
    """
    data = cache.read_if_exists(name)
    if data is None:
        return None
    record = read_record(data, cache.url_of(name))
    if record.identity != identity_sha256:
        raise CacheError(f"{cache.url_of(name)} belongs to a cache with another identity; move it away")
    if get_expected_stem(record) != strip_extension(name):
        raise CacheError(
            f"{cache.url_of(name)} holds the part {get_expected_stem(record)}: it was copied or renamed; move it away"
        )
    return PartInfo(record, name, len(data), hashlib.sha256(data).hexdigest())


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


def find_empty_duplicates(names: Iterable[str]) -> set[str]:
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


def read_retry_parts(cache: Folder, identity_sha256: str, units: Set[str] | None = None) -> list[PartInfo]:
    """Read the parts that `retry` wrote, in the order of their names. units: the units' names; default: all units."""

    def is_wanted(name: str) -> bool:
        return is_retry_part(strip_extension(name)) and (units is None or parse_unit_name(name) in units)

    return _read_parts(cache, identity_sha256, is_wanted)


def read_unit_parts(cache: Folder, unit: str, identity_sha256: str) -> list[PartInfo]:
    """Read all existing parts of a unit, including retry parts. unit: the unit's name."""
    return _read_parts(cache, identity_sha256, lambda name: parse_unit_name(name) == unit)


def _read_parts(cache: Folder, identity_sha256: str, is_wanted: Callable[[str], bool]) -> list[PartInfo]:
    """Read the parts with wanted file names, without the files in `_empty/` that do not count."""
    names = list_part_files(cache)
    duplicates = find_empty_duplicates(names)
    parts = (inspect_part(cache, name, identity_sha256) for name in names if is_wanted(name) and name not in duplicates)
    return [part for part in parts if part is not None]


def parse_unit_name(file: str) -> str:
    """Return the name of the unit that a part's file belongs to."""
    stem = strip_extension(file).partition("/")[2]
    return _RETRY_STEM.sub("", stem) if is_retry_part(stem) else stem.rpartition("-")[0]


def parse_commit_name(file: str) -> str:
    """Return the name of the commit to which a part's file belongs: its unit, or the stem of a retry part."""
    stem = strip_extension(file).rpartition("/")[2]
    return stem if is_retry_part(stem) else stem.rpartition("-")[0]


def read_superseded(cache: Folder, identity_sha256: str, units: Set[str]) -> dict[str, dict[int, str]]:
    """Return the rejects of these units that retry parts supersede: unit -> position -> reason."""
    superseded: dict[str, dict[int, str]] = {}
    for part in read_retry_parts(cache, identity_sha256, units) if units else []:
        reasons = superseded.setdefault(part.record.unit, {})
        for position, reason in part.record.supersedes:
            # The retry that reads a rest can reject its first sample, and a later retry can supersede that reject. The
            # unit's own part rejected the position as `rest_of_shard`, so that reason stays.
            if reasons.get(position) != REST_OF_SHARD:
                reasons[position] = reason
    return superseded
