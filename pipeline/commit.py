"""The write step: a part's file, published once, and what is written of a unit when all its parts stand.

Whatever a create answers, what stands under the name is the truth, and its record, read from it, is the one that
counts. Nothing here removes or overwrites a part.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any, cast

from pipeline import write_parquet, write_tar
from pipeline.errors import CacheError, StorageError
from pipeline.layout import Layout
from pipeline.records import VERIFY, Container, Record, Row, Standing, canonical_json, json_object, sealed
from pipeline.storage import Folder

DATA, EMPTY, COMMITS, REJECTS = "data", "_empty", "_commits", "_rejects"

_RETRIED = re.compile(r"-\d{5}r\d+$")
_NO_FACTS: Mapping[str, object] = {"seconds": {}, "compute": {}, "versions": {}, "run": None}

WRITERS: Mapping[Container, Any] = {"parquet": write_parquet, "webdataset": write_tar}


def schema_as_json(layout: Layout) -> list[dict[str, str]]:
    """What cache.json says of a row's columns, or of a sample's members."""
    return list(WRITERS[layout.container].schema_as_json(layout))


def publish(cache: Folder, record: Record, rows: Sequence[Row], layout: Layout) -> Standing:
    """Write a part's file, unless somebody was first: then theirs is the one that counts.

    A part with rows and one without have different names, and two writers may disagree (by their limits, say): then the
    one with rows counts, as readers see it.
    """
    writer = WRITERS[layout.container]
    full, bare = f"{DATA}/{record.stem}{writer.SUFFIX}", f"{EMPTY}/{record.stem}.json"
    if not rows:
        if theirs := inspect(cache, full, record.identity):
            return theirs
        mine = _create(cache, bare, record.to_json(), record)
        return inspect(cache, full, record.identity) or mine
    theirs = inspect(cache, bare, record.identity)
    return theirs or _create(cache, full, writer.part(rows, record, layout), record)


def _create(cache: Folder, name: str, data: bytes, record: Record) -> Standing:
    try:
        if cache.create(name, data):
            return Standing(record, name, len(data), hashlib.sha256(data).hexdigest())
    except StorageError:  # it may stand there all the same, and only the answer was lost
        if (standing := inspect(cache, name, record.identity)) is None:
            raise
        return standing
    if (standing := inspect(cache, name, record.identity)) is None:
        raise StorageError(f"{cache.at(name)} was there when it was to be written, and has gone since")
    return standing


def find(cache: Folder, unit: str, number: int, identity: str, container: Container = "parquet") -> Standing | None:
    """The part of this number as it stands in the cache; None where it is still to be made. unit: its name."""
    stem = f"{unit}-{number:05d}"
    for name in (f"{DATA}/{stem}{WRITERS[container].SUFFIX}", f"{EMPTY}/{stem}.json"):
        standing = inspect(cache, name, identity)
        if standing is not None:
            return standing
    return None


def inspect(cache: Folder, name: str, identity: str) -> Standing | None:
    """A part as it stands under a name; None where nothing does. Raises CacheError for what belongs elsewhere."""
    data = cache.read_if_there(name)
    if data is None:
        return None
    record = record_in(data, cache.at(name))
    if record.identity != identity:
        raise CacheError(f"{cache.at(name)} belongs to a cache with another identity; move it away")
    if place_of(record) != stem_of(name):
        raise CacheError(f"{cache.at(name)} holds the part {place_of(record)}: it was copied or renamed; move it away")
    return Standing(record, name, len(data), hashlib.sha256(data).hexdigest())


def place_of(record: Record) -> str:
    """Where a part belongs, without the extension."""
    return f"{DATA if record.rows else EMPTY}/{record.stem}"


def stem_of(name: str) -> str:
    """A name without its extension."""
    return name.rpartition(".")[0]


def record_in(data: bytes, name: str) -> Record:
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


def finish(cache: Folder, standing: Sequence[Standing], facts: Mapping[str, object] = _NO_FACTS) -> None:
    """Write what parts say together: a unit's rejects by name, then that it is done; of a retry's part, that it stands.

    facts: what does not follow from the parts (seconds, compute, versions, run).
    """
    name = name_of(standing)
    rejects = f"{REJECTS}/{name}.jsonl"
    lines = reject_lines(standing)
    others = bool(lines) and not cache.create(rejects, lines)
    committed = cache.create(f"{COMMITS}/{name}.json", canonical_json(commit_of(standing, facts)))
    if committed and others and cache.read_if_there(rejects) != lines:
        cache.replace(rejects, lines)  # they were of parts that were lost, or of a writer who saw others


def name_of(standing: Sequence[Standing]) -> str:
    """What `_commits` calls these parts: by their unit, or a retry's part by itself."""
    record = standing[0].record
    return record.stem if record.round else record.unit


def reject_lines(standing: Sequence[Standing]) -> bytes:
    """The content of a unit's file in `_rejects`; empty where nothing was rejected."""
    rejects = [{"shard": p.record.source, **asdict(reject)} for p in standing for reject in p.record.rejects]
    return b"".join(canonical_json(reject) + b"\n" for reject in rejects)


def commit_of(standing: Sequence[Standing], facts: Mapping[str, object]) -> dict[str, Any]:
    """The content of a file in `_commits`."""
    return sealed({"unit": standing[0].record.unit, "parts": [part.to_dict() for part in standing], **facts})


def rebuild(cache: Folder, standing: Sequence[Standing], facts: Mapping[str, object] = _NO_FACTS) -> None:
    """Write `_rejects` and `_commits` of these parts again; seconds and versions they do not tell."""
    name = name_of(standing)
    lines, rejects = reject_lines(standing), f"{REJECTS}/{name}.jsonl"
    if lines or cache.read_if_there(rejects):
        cache.replace(rejects, lines)
    cache.replace(f"{COMMITS}/{name}.json", canonical_json(commit_of(standing, facts)))


def mend(
    cache: Folder, identity: str, container: Container, again: bool = False, on_unit: Callable[[], None] = lambda: None
) -> None:
    """Write `_commits` again where they do not say what stands, and where a retry died before it wrote its own.

    That is where a part without rows was committed before its twin with rows came. again: where a file has another
    sha256, too (a store on which a late writer may overwrite). on_unit is called for each commit.
    """
    told = commits(cache)
    standing = files(cache)
    full = {stem_of(name) for name in standing if name.startswith(f"{DATA}/")}
    for name, content in told.items():
        on_unit()
        named = [part["file"] for part in content["parts"]]
        parts = [inspect(cache, file, identity) for file in named] if again else []
        changed = [p for p, said in zip(parts, content["parts"], strict=False) if p and p.sha256 != said["sha256"]]
        if changed or any(twin_of(file) in full for file in named):
            facts = {key: content[key] for key in _NO_FACTS if key in content}
            rebuild(cache, as_they_stand(cache, name, identity, container), facts)
    hidden = shadowed(standing)
    for file in standing:
        stem = stem_of(file).partition("/")[2]
        if file not in hidden and is_retry(stem) and stem not in told and (part := inspect(cache, file, identity)):
            finish(cache, [part])


def as_they_stand(cache: Folder, name: str, identity: str, container: Container) -> list[Standing]:
    """The parts that `_commits` has under this name, as they stand now."""
    if is_retry(name):
        names = (f"{DATA}/{name}{WRITERS[container].SUFFIX}", f"{EMPTY}/{name}.json")
        return [part for part in (inspect(cache, file, identity) for file in names) if part is not None][:1]
    parts: list[Standing] = []
    while not parts or not parts[-1].record.last:
        part = find(cache, name, len(parts), identity, container)
        if part is None:
            raise CacheError(f"part {len(parts)} of {cache.at(name)} is gone, but was committed: the cache is damaged")
        parts.append(part)
    return parts


def files(cache: Folder) -> list[str]:
    """The files with parts, `_empty/` before `data/`, each sorted by name."""
    return [f"{folder}/{name}" for folder in (EMPTY, DATA) for name in cache.names(folder)]


def shadowed(names: Iterable[str]) -> set[str]:
    """Those of `_empty/` that do not count, because the same part stands in `data/`, with rows."""
    full = {stem_of(name) for name in names if name.startswith(f"{DATA}/")}
    return {name for name in names if twin_of(name) in full}


def twin_of(name: str) -> str | None:
    """What the part of a file in `_empty/` is called in `data/`, without the extension; None of other files."""
    return f"{DATA}/{stem_of(name).removeprefix(f'{EMPTY}/')}" if name.startswith(f"{EMPTY}/") else None


def is_retry(stem: str) -> bool:
    """Whether this names a part that `retry` wrote."""
    return _RETRIED.search(stem) is not None


def retried(cache: Folder, identity: str, units: Set[str] | None = None) -> list[Standing]:
    """The parts that `retry` wrote, in the order of their names. units: only of these, by their names."""
    names = files(cache)
    hidden = shadowed(names)
    wanted = (name for name in names if is_retry(stem_of(name)) and name not in hidden)
    found = (inspect(cache, name, identity) for name in wanted if units is None or _unit_of(name) in units)
    return [part for part in found if part is not None]


def _unit_of(retried: str) -> str:
    """The unit of a part that `retry` wrote, by its file."""
    return _RETRIED.sub("", stem_of(retried).partition("/")[2])


def superseded(cache: Folder, identity: str, units: Set[str]) -> dict[str, dict[int, str]]:
    """What parts of `retry` have of these units: why it was rejected, by unit and position."""
    found: dict[str, dict[int, str]] = {}
    for part in retried(cache, identity, units) if units else []:
        found.setdefault(part.record.unit, {}).update(part.record.supersedes)
    return found


def commits(cache: Folder) -> dict[str, dict[str, Any]]:
    """What `_commits` has: of each finished unit, by its name, and of each part that `retry` wrote, by the part's."""
    found = {}
    for name, data in cache.read_all(COMMITS).items():
        if name.endswith(".json"):
            content = found[stem_of(name)] = json_object(data, cache.at(f"{COMMITS}/{name}"))
            parts = content.get("parts")
            if not isinstance(parts, list) or not all(
                isinstance(p, dict) and {"file", "sha256"} <= p.keys() for p in parts
            ):
                raise CacheError(f"{cache.at(COMMITS)}/{name} names no parts: it is damaged; {VERIFY}")
    return found


def begun(cache: Folder) -> set[str]:
    """The names of the units of which anything stands: a part, or that they are done."""
    stems = (stem_of(file).partition("/")[2] for file in files(cache))
    return {_RETRIED.sub("", stem) if is_retry(stem) else stem.rpartition("-")[0] for stem in stems} | finished(cache)


def finished(cache: Folder) -> set[str]:
    """The names of the units that are done."""
    stems = (stem_of(name) for name in cache.names(COMMITS) if name.endswith(".json"))
    return {stem for stem in stems if not is_retry(stem)}
