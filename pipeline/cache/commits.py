"""What is written of a unit when all its parts stand: `_commits` and `_rejects`, and how they are repaired."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from pipeline.cache.parts import (
    DATA,
    EMPTY,
    WRITERS,
    _unit_name,
    data_twin,
    find_part,
    inspect_part,
    is_retry_part,
    list_part_files,
    stem_of,
)
from pipeline.canonical_json import VERIFY_HINT, canonical_json, parse_json_object, with_checksum
from pipeline.errors import CacheError
from pipeline.formats.record import PartInfo
from pipeline.records import Container
from pipeline.storage.folder import Folder

COMMITS, REJECTS = "_commits", "_rejects"
_NO_FACTS: Mapping[str, object] = {"seconds": {}, "compute": {}, "versions": {}, "run": None}


def write_commit(cache: Folder, standing: Sequence[PartInfo], facts: Mapping[str, object] = _NO_FACTS) -> None:
    """Write what parts say together: a unit's rejects by name, then that it is done; of a retry's part, that it stands.

    facts: what does not follow from the parts (seconds, compute, versions, run).
    """
    name = commit_name(standing)
    rejects = f"{REJECTS}/{name}.jsonl"
    lines = rejects_as_jsonl(standing)
    others = bool(lines) and not cache.create(rejects, lines)
    committed = cache.create(f"{COMMITS}/{name}.json", canonical_json(commit_content(standing, facts)))
    if committed and others and cache.read_if_there(rejects) != lines:
        cache.replace(rejects, lines)  # they were of parts that were lost, or of a writer who saw others


def commit_name(standing: Sequence[PartInfo]) -> str:
    """What `_commits` calls these parts: by their unit, or a retry's part by itself."""
    record = standing[0].record
    return record.stem if record.round else record.unit


def rejects_as_jsonl(standing: Sequence[PartInfo]) -> bytes:
    """The content of a unit's file in `_rejects`; empty where nothing was rejected."""
    rejects = [{"shard": p.record.source, **asdict(reject)} for p in standing for reject in p.record.rejects]
    return b"".join(canonical_json(reject) + b"\n" for reject in rejects)


def commit_content(standing: Sequence[PartInfo], facts: Mapping[str, object]) -> dict[str, Any]:
    """The content of a file in `_commits`."""
    return with_checksum({"unit": standing[0].record.unit, "parts": [part.to_dict() for part in standing], **facts})


def rewrite_commit(
    cache: Folder, standing: Sequence[PartInfo], facts: Mapping[str, object] = _NO_FACTS
) -> dict[str, Any]:
    """Write `_rejects` and `_commits` of these parts again; seconds and versions they do not tell.

    Returns what `_commits` has now.
    """
    name = commit_name(standing)
    lines, rejects = rejects_as_jsonl(standing), f"{REJECTS}/{name}.jsonl"
    if lines or cache.read_if_there(rejects):
        cache.replace(rejects, lines)
    data = canonical_json(commit_content(standing, facts))
    cache.replace(f"{COMMITS}/{name}.json", data)
    return parse_json_object(data, name)


def repair_commit(
    cache: Folder, name: str, content: dict[str, Any], full: Set[str], identity: str, container: Container, again: bool
) -> dict[str, Any]:
    """What `_commits` has under a name, written again where it does not say what stands.

    That is where a part without rows was committed before its twin with rows came. full: the files with rows that
    stand, without their extensions. again: also where a file has another sha256 (a store on which a late writer may
    overwrite).
    """
    named = [part["file"] for part in content["parts"]]
    parts = [inspect_part(cache, file, identity) for file in named] if again else []
    changed = [p for p, said in zip(parts, content["parts"], strict=False) if p and p.sha256 != said["sha256"]]
    if not changed and not any(data_twin(file) in full for file in named):
        return content
    facts = {key: content[key] for key in _NO_FACTS if key in content}
    return rewrite_commit(cache, inspect_committed(cache, name, identity, container), facts)


def inspect_committed(cache: Folder, name: str, identity: str, container: Container) -> list[PartInfo]:
    """The parts that `_commits` has under this name, as they stand now."""
    if is_retry_part(name):
        names = (f"{DATA}/{name}{WRITERS[container].SUFFIX}", f"{EMPTY}/{name}.json")
        return [part for part in (inspect_part(cache, file, identity) for file in names) if part is not None][:1]
    parts: list[PartInfo] = []
    while not parts or not parts[-1].record.last:
        part = find_part(cache, name, len(parts), identity, container)
        if part is None:
            raise CacheError(f"part {len(parts)} of {cache.at(name)} is gone, but was committed: the cache is damaged")
        parts.append(part)
    return parts


def commit_names(cache: Folder) -> set[str]:
    """What `_commits` has: the names of finished units, and of the parts that `retry` wrote."""
    return {stem_of(name) for name in cache.names(COMMITS) if name.endswith(".json")}


def read_commits(cache: Folder, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """These commits by name, in this order. Raises CacheError for one that names no parts."""
    for name, data in cache.read_each(COMMITS, (f"{name}.json" for name in names)):
        content = parse_json_object(data, cache.at(f"{COMMITS}/{name}"))
        parts = content.get("parts")
        if not isinstance(parts, list) or not all(
            isinstance(p, dict) and {"file", "sha256"} <= p.keys() for p in parts
        ):
            raise CacheError(f"{cache.at(COMMITS)}/{name} names no parts: it is damaged; {VERIFY_HINT}")
        yield stem_of(name), content


def started_units(cache: Folder) -> set[str]:
    """The names of the units of which anything stands: a part, or that they are done."""
    return {_unit_name(file) for file in list_part_files(cache)} | finished_units(cache)


def finished_units(cache: Folder) -> set[str]:
    """The names of the units that are done."""
    return {name for name in commit_names(cache) if not is_retry_part(name)}
