"""The write step: a part's file, published once, and what is written of a unit when all its parts stand.

Whatever a create answers, what stands under the name is the truth, and its record, read from it, is the one that
counts. Nothing here removes or overwrites a part.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, cast

from pipeline.errors import REST_OF_SHARD, CacheError, StorageError
from pipeline.formats import parquet, webdataset
from pipeline.formats.record import PartInfo, Record
from pipeline.formats.schema import OutputSchema
from pipeline.records import Container, Row
from pipeline.storage.folder import Folder
from pipeline.storage.reading import READ_AHEAD, open_stream

DATA, EMPTY = "data", "_empty"

_RETRIED = re.compile(r"-\d{5}r\d+$")

WRITERS: Mapping[Container, Any] = {"parquet": parquet, "webdataset": webdataset}


def schema_as_json(layout: OutputSchema) -> list[dict[str, str]]:
    """What cache.json says of a row's columns, or of a sample's members."""
    return list(WRITERS[layout.container].schema_as_json(layout))


def publish_part(cache: Folder, record: Record, rows: Sequence[Row], layout: OutputSchema) -> PartInfo:
    """Write a part's file, unless somebody was first: then theirs is the one that counts.

    A part with rows and one without have different names, and two writers may disagree (by their limits, say): then the
    one with rows counts, as readers see it.
    """
    writer = WRITERS[layout.container]
    full, bare = f"{DATA}/{record.stem}{writer.SUFFIX}", f"{EMPTY}/{record.stem}.json"
    if not rows:
        if theirs := inspect_part(cache, full, record.identity):
            return theirs
        mine = _create(cache, bare, record.to_json(), record)
        return inspect_part(cache, full, record.identity) or mine
    theirs = inspect_part(cache, bare, record.identity)
    return theirs or _create(cache, full, writer.serialize_part(rows, record, layout), record)


def _create(cache: Folder, name: str, data: bytes, record: Record) -> PartInfo:
    try:
        if cache.create(name, data):
            return PartInfo(record, name, len(data), hashlib.sha256(data).hexdigest())
    except StorageError:  # it may stand there all the same, and only the answer was lost
        if (standing := inspect_part(cache, name, record.identity)) is None:
            raise
        return standing
    if (standing := inspect_part(cache, name, record.identity)) is None:
        raise StorageError(f"{cache.at(name)} was there when it was to be written, and has gone since")
    return standing


def find_part(
    cache: Folder, unit: str, number: int, identity: str, container: Container = "parquet", round: int = 0
) -> PartInfo | None:
    """The part of this number as it stands in the cache; None where it is still to be made. unit: its name.

    round: of the retry that wrote it.
    """
    stem = f"{unit}-{number:05d}" + (f"r{round}" if round else "")
    for name in (f"{DATA}/{stem}{WRITERS[container].SUFFIX}", f"{EMPTY}/{stem}.json"):
        standing = inspect_part(cache, name, identity)
        if standing is not None:
            return standing
    return None


def inspect_part(cache: Folder, name: str, identity: str) -> PartInfo | None:
    """A part as it stands under a name; None where nothing does. Raises CacheError for what belongs elsewhere."""
    data = cache.read_if_there(name)
    if data is None:
        return None
    record = read_record(data, cache.at(name))
    if record.identity != identity:
        raise CacheError(f"{cache.at(name)} belongs to a cache with another identity; move it away")
    if expected_stem(record) != stem_of(name):
        raise CacheError(
            f"{cache.at(name)} holds the part {expected_stem(record)}: it was copied or renamed; move it away"
        )
    return PartInfo(record, name, len(data), hashlib.sha256(data).hexdigest())


def expected_stem(record: Record) -> str:
    """Where a part belongs, without the extension."""
    return f"{DATA if record.rows else EMPTY}/{record.stem}"


def stem_of(name: str) -> str:
    """A name without its extension."""
    return name.rpartition(".")[0]


def read_record(data: bytes, name: str) -> Record:
    """The record that a part's file holds. Raises CacheError, which names the file, where there is none."""
    if not name.endswith(".json"):
        for writer in WRITERS.values():
            if name.endswith(writer.SUFFIX):
                return cast(Record, writer.read_record(data, name))
        raise CacheError(f"{name} is not a part of a latentmill cache")
    try:
        return Record.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{name} cannot be read as the record of a part") from error


def list_part_files(cache: Folder) -> list[str]:
    """The files with parts, `_empty/` before `data/`, each sorted by name."""
    return [f"{folder}/{name}" for folder in (EMPTY, DATA) for name in cache.names(folder)]


def hash_files(cache: Folder, files: Iterable[str]) -> dict[str, str]:
    """The sha256 of each of these files, read a block at a time."""
    found = {}
    for file in files:
        sha256 = hashlib.sha256()
        with open_stream(cache.at(file), cache.options) as stream:
            while block := stream.read(READ_AHEAD):
                sha256.update(block)
        found[file] = sha256.hexdigest()
    return found


def find_empty_duplicates(names: Iterable[str]) -> set[str]:
    """Those of `_empty/` that do not count, because the same part stands in `data/`, with rows."""
    full = {stem_of(name) for name in names if name.startswith(f"{DATA}/")}
    return {name for name in names if data_twin(name) in full}


def data_twin(name: str) -> str | None:
    """What the part of a file in `_empty/` is called in `data/`, without the extension; None of other files."""
    return f"{DATA}/{stem_of(name).removeprefix(f'{EMPTY}/')}" if name.startswith(f"{EMPTY}/") else None


def is_retry_part(stem: str) -> bool:
    """Whether this names a part that `retry` wrote."""
    return _RETRIED.search(stem) is not None


def retry_parts(cache: Folder, identity: str, units: Set[str] | None = None) -> list[PartInfo]:
    """The parts that `retry` wrote, in the order of their names. units: only of these, by their names."""
    names = list_part_files(cache)
    hidden = find_empty_duplicates(names)
    wanted = (name for name in names if is_retry_part(stem_of(name)) and name not in hidden)
    found = (inspect_part(cache, name, identity) for name in wanted if units is None or _unit_name(name) in units)
    return [part for part in found if part is not None]


def parts_of_unit(cache: Folder, unit: str, identity: str) -> list[PartInfo]:
    """All parts of a unit that stand, also those that `retry` wrote. unit: its name."""
    names = list_part_files(cache)
    hidden = find_empty_duplicates(names)
    found = (inspect_part(cache, name, identity) for name in names if _unit_name(name) == unit and name not in hidden)
    return [part for part in found if part is not None]


def _unit_name(file: str) -> str:
    """The unit of a part, by its file."""
    stem = stem_of(file).partition("/")[2]
    return _RETRIED.sub("", stem) if is_retry_part(stem) else stem.rpartition("-")[0]


def superseded_by_retry(cache: Folder, identity: str, units: Set[str]) -> dict[str, dict[int, str]]:
    """What parts of `retry` have of these units: why it was rejected, by unit and position."""
    found: dict[str, dict[int, str]] = {}
    for part in retry_parts(cache, identity, units) if units else []:
        mine = found.setdefault(part.record.unit, {})
        for position, reason in part.record.supersedes:
            if (
                mine.get(position) != REST_OF_SHARD
            ):  # what a retry rejected again, and a later one has, is no other part's
                mine[position] = reason
    return found
