"""The write step: a part's file, published once, and what is written of a unit when all its parts stand.

Whatever a create answers, what stands under the name is the truth, and its record, read from it, is the one that
counts. Nothing here removes or overwrites anything.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from pipeline import write_parquet, write_tar
from pipeline.errors import CacheError, StorageError
from pipeline.layout import Layout
from pipeline.records import Container, Record, Row, Standing, Unit, canonical_json, sealed
from pipeline.storage import Folder

DATA, EMPTY, COMMITS, REJECTS = "data", "_empty", "_commits", "_rejects"

_RETRIED = re.compile(r"-\d{5}r\d+\.[a-z]+$")

WRITERS: Mapping[Container, Any] = {"parquet": write_parquet, "webdataset": write_tar}


def schema_as_json(layout: Layout) -> list[dict[str, str]]:
    """What cache.json says of a row's columns, or of a sample's members."""
    return list(WRITERS[layout.container].schema_as_json(layout))


def publish(cache: Folder, record: Record, rows: Sequence[Row], layout: Layout) -> Standing:
    """Write a part's file, unless somebody was first: then theirs is the one that counts."""
    if rows:
        writer = WRITERS[layout.container]
        name, data = f"{DATA}/{record.stem}{writer.SUFFIX}", writer.part(rows, record, layout)
    else:
        name, data = f"{EMPTY}/{record.stem}.json", record.to_json()
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


def find(cache: Folder, unit: Unit, number: int, identity: str, container: Container = "parquet") -> Standing | None:
    """The part of this number as it stands in the cache; None where it is still to be made."""
    stem = f"{unit.name}-{number:05d}"
    for name in (f"{DATA}/{stem}{WRITERS[container].SUFFIX}", f"{EMPTY}/{stem}.json"):
        standing = inspect(cache, name, identity)
        if standing is not None:
            return standing
    return None


def inspect(cache: Folder, name: str, identity: str) -> Standing | None:
    """A part as it stands under a name; None where nothing does. Raises CacheError for a part of another cache."""
    data = cache.read_if_there(name)
    if data is None:
        return None
    record = record_in(data, cache.at(name))
    if record.identity != identity:
        raise CacheError(f"{cache.at(name)} belongs to a cache with another identity; move it away")
    return Standing(record, name, len(data), hashlib.sha256(data).hexdigest())


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


def finish(cache: Folder, unit: Unit, standing: Sequence[Standing], facts: Mapping[str, object]) -> None:
    """Write what the unit's parts say together: its rejects by name, then that it is done.

    facts: what does not follow from the parts (seconds, compute, versions, run).
    """
    lines = reject_lines(unit, standing)
    if lines:
        cache.create(f"{REJECTS}/{unit.name}.jsonl", lines)
    cache.create(f"{COMMITS}/{unit.name}.json", canonical_json(commit_of(unit, standing, facts)))


def reject_lines(unit: Unit, standing: Sequence[Standing]) -> bytes:
    """The content of a unit's file in `_rejects`; empty where nothing was rejected."""
    rejects = [{"shard": unit.path, **asdict(reject)} for part in standing for reject in part.record.rejects]
    return b"".join(canonical_json(reject) + b"\n" for reject in rejects)


def commit_of(unit: Unit, standing: Sequence[Standing], facts: Mapping[str, object]) -> dict[str, Any]:
    """The content of a unit's file in `_commits`."""
    return sealed({"unit": unit.name, "parts": [part.to_dict() for part in standing], **facts})


def rebuild(cache: Folder, unit: Unit, standing: Sequence[Standing]) -> None:
    """Write a unit's `_rejects` and `_commits` again from its parts; seconds and versions these do not tell."""
    lines = reject_lines(unit, standing)
    if lines:
        cache.replace(f"{REJECTS}/{unit.name}.jsonl", lines)
    facts: dict[str, object] = {"seconds": {}, "compute": {}, "versions": {}, "run": None}
    cache.replace(f"{COMMITS}/{unit.name}.json", canonical_json(commit_of(unit, standing, facts)))


def retried(cache: Folder, identity: str) -> list[Standing]:
    """The parts that `retry` wrote, in the order of their names. They are in no unit's `_commits`."""
    names = [f"{folder}/{name}" for folder in (DATA, EMPTY) for name in cache.names(folder) if _RETRIED.search(name)]
    found = (inspect(cache, name, identity) for name in names)
    return [part for part in found if part is not None]


def finished(cache: Folder) -> set[str]:
    """The names of the units that are done."""
    return {name.removesuffix(".json") for name in cache.names(COMMITS)}
