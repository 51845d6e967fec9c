"""What is written of a unit when all its parts stand: `_commits` and `_rejects`, and how they are repaired."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from pipeline.cache.parts import DATA, EMPTY, WRITERS, _unit_of, files, find, inspect, is_retry, stem_of, twin_of
from pipeline.canonical_json import VERIFY, canonical_json, json_object, sealed
from pipeline.errors import CacheError
from pipeline.formats.record import Standing
from pipeline.records import Container
from pipeline.storage.store import Folder

COMMITS, REJECTS = "_commits", "_rejects"
_NO_FACTS: Mapping[str, object] = {"seconds": {}, "compute": {}, "versions": {}, "run": None}


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


def rebuild(cache: Folder, standing: Sequence[Standing], facts: Mapping[str, object] = _NO_FACTS) -> dict[str, Any]:
    """Write `_rejects` and `_commits` of these parts again; seconds and versions they do not tell.

    Returns what `_commits` has now.
    """
    name = name_of(standing)
    lines, rejects = reject_lines(standing), f"{REJECTS}/{name}.jsonl"
    if lines or cache.read_if_there(rejects):
        cache.replace(rejects, lines)
    data = canonical_json(commit_of(standing, facts))
    cache.replace(f"{COMMITS}/{name}.json", data)
    return json_object(data, name)


def mended(
    cache: Folder, name: str, content: dict[str, Any], full: Set[str], identity: str, container: Container, again: bool
) -> dict[str, Any]:
    """What `_commits` has under a name, written again where it does not say what stands.

    That is where a part without rows was committed before its twin with rows came. full: the files with rows that
    stand, without their extensions. again: also where a file has another sha256 (a store on which a late writer may
    overwrite).
    """
    named = [part["file"] for part in content["parts"]]
    parts = [inspect(cache, file, identity) for file in named] if again else []
    changed = [p for p, said in zip(parts, content["parts"], strict=False) if p and p.sha256 != said["sha256"]]
    if not changed and not any(twin_of(file) in full for file in named):
        return content
    facts = {key: content[key] for key in _NO_FACTS if key in content}
    return rebuild(cache, as_they_stand(cache, name, identity, container), facts)


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


def names(cache: Folder) -> set[str]:
    """What `_commits` has: the names of finished units, and of the parts that `retry` wrote."""
    return {stem_of(name) for name in cache.names(COMMITS) if name.endswith(".json")}


def read_each(cache: Folder, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """These commits by name, in this order. Raises CacheError for one that names no parts."""
    for name, data in cache.read_each(COMMITS, (f"{name}.json" for name in names)):
        content = json_object(data, cache.at(f"{COMMITS}/{name}"))
        parts = content.get("parts")
        if not isinstance(parts, list) or not all(
            isinstance(p, dict) and {"file", "sha256"} <= p.keys() for p in parts
        ):
            raise CacheError(f"{cache.at(COMMITS)}/{name} names no parts: it is damaged; {VERIFY}")
        yield stem_of(name), content


def begun(cache: Folder) -> set[str]:
    """The names of the units of which anything stands: a part, or that they are done."""
    return {_unit_of(file) for file in files(cache)} | finished(cache)


def finished(cache: Folder) -> set[str]:
    """The names of the units that are done."""
    return {name for name in names(cache) if not is_retry(name)}
