"""The records of finished units in `_commits` and `_rejects`: how they are written, read and repaired.

A unit's commit is written when all parts of the unit exist. A retry part has its own commit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from pipeline.cache.part_info import PartInfo, PartSummary
from pipeline.cache.part_table import check_lengths
from pipeline.cache.parts import (
    DATA,
    EMPTY,
    PART_FORMATS,
    find_part,
    inspect_part,
    is_retry_part,
    list_part_files,
    parse_unit_name,
    strip_extension,
)
from pipeline.canonical_json import VERIFY_HINT, canonical_json, parse_json_object, with_checksum
from pipeline.errors import CacheError
from pipeline.formats.part_record import BucketTally
from pipeline.records import Container
from pipeline.storage.folder import Folder

COMMITS, REJECTS = "_commits", "_rejects"
_NO_FACTS: Mapping[str, object] = {"seconds": {}, "compute": {}, "versions": {}, "run": None, "host": None}


def write_commit(
    cache: Folder, parts: Sequence[PartInfo], facts: Mapping[str, object] = _NO_FACTS
) -> list[Mapping[str, Any]]:
    """Create the rejects of these parts, then their commit. Returns the entries of the parts in it.

    Each of the two files is one request. If another writer's commit exists, it is left as it is.
    parts: all parts of a unit, or one retry part. facts: facts that the parts do not record
    (seconds, compute, versions, run, host).
    """
    content = make_commit(parts, facts)
    name = get_commit_name(parts)
    rejects_file = f"{REJECTS}/{name}.jsonl"
    lines = encode_rejects(parts)
    is_refused = bool(lines) and not cache.create(rejects_file, lines)
    is_committed = cache.create(f"{COMMITS}/{name}.json", canonical_json(content))
    if is_committed and is_refused and cache.read_if_exists(rejects_file) != lines:
        # the existing lines are of parts that were lost, or of a writer that saw other parts
        cache.replace(rejects_file, lines)
    return list(content["parts"])


def get_commit_name(parts: Sequence[PartInfo]) -> str:
    """Return the name of the commit of these parts: the unit's name, or the stem of a retry part."""
    record = parts[0].record
    return record.stem if record.round else record.unit


def encode_rejects(parts: Sequence[PartInfo]) -> bytes:
    """Return the content of a file in `_rejects`, one line per reject. It is empty if nothing was rejected."""
    rejects = [(part.record.source, reject) for part in parts for reject in part.record.describe_rejects()]
    return b"".join(canonical_json({"shard": source, **reject}) + b"\n" for source, reject in rejects)


def make_commit(parts: Sequence[PartInfo], facts: Mapping[str, object]) -> dict[str, Any]:
    """Return the content of a file in `_commits`."""
    return with_checksum({"unit": parts[0].record.unit, "parts": [part.to_commit_entry() for part in parts], **facts})


def rewrite_commit(cache: Folder, parts: Sequence[PartInfo], facts: Mapping[str, object] = _NO_FACTS) -> dict[str, Any]:
    """Replace `_rejects` and `_commits` of these parts, and return the new content of the commit.

    The parts do not record seconds and versions: these come from `facts`, and are empty by default.
    """
    name = get_commit_name(parts)
    lines, rejects_file = encode_rejects(parts), f"{REJECTS}/{name}.jsonl"
    if lines or cache.read_if_exists(rejects_file):
        cache.replace(rejects_file, lines)
    data = canonical_json(make_commit(parts, facts))
    cache.replace(f"{COMMITS}/{name}.json", data)
    return parse_json_object(data, name)


def repair_commit(
    cache: Folder,
    name: str,
    content: dict[str, Any],
    twins: Set[str],
    identity_sha256: str,
    container: Container,
    rehash: bool,
) -> dict[str, Any]:
    """Rewrite a commit that does not name the parts that exist. Returns its content, unchanged or new.

    A commit is rewritten if it names a part without rows, and the same part was then published with rows.
    twins: the files in `_empty/` that also exist in `data/`, with rows.
    rehash: read each file, and rewrite the commit also if a file has another sha256. This is for stores on which a late
    writer can overwrite a file.
    """
    files = [entry["file"] for entry in content["parts"]]
    parts = [inspect_part(cache, file, identity_sha256) for file in files] if rehash else []
    pairs = zip(parts, content["parts"], strict=False)
    has_changed = any(part is not None and part.sha256 != entry["sha256"] for part, entry in pairs)
    if not has_changed and not any(file in twins for file in files):
        return content
    facts = {key: content[key] for key in _NO_FACTS if key in content}
    return rewrite_commit(cache, inspect_committed(cache, name, identity_sha256, container), facts)


def inspect_committed(cache: Folder, name: str, identity_sha256: str, container: Container) -> list[PartInfo]:
    """Read the parts of the commit with this name, as they are now. Raises CacheError if a unit lacks a part."""
    if is_retry_part(name):
        files = (f"{DATA}/{name}{PART_FORMATS[container].SUFFIX}", f"{EMPTY}/{name}.json")
        return [part for part in (inspect_part(cache, file, identity_sha256) for file in files) if part is not None][:1]
    parts: list[PartInfo] = []
    while not parts or not parts[-1].record.last:
        part = find_part(cache, name, len(parts), identity_sha256, container)
        if part is None:
            raise CacheError(
                f"part {len(parts)} of {cache.url_of(name)} was committed, but is missing: the cache is damaged; "
                f"{VERIFY_HINT}"
            )
        parts.append(part)
    return parts


def iterate_commits(cache: Folder) -> Iterator[str]:
    """Yield the names of all commits, in no particular order: finished units, and parts that `retry` wrote."""
    return (strip_extension(name) for name in cache.iterate_names(COMMITS) if name.endswith(".json"))


def list_commits(cache: Folder) -> set[str]:
    """Return the names of `iterate_commits`."""
    return set(iterate_commits(cache))


def read_commits(cache: Folder, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read these commits in this order: name and content. Raises CacheError if a commit names no parts."""
    for name, data in cache.read_each(COMMITS, (f"{name}.json" for name in names)):
        yield strip_extension(name), _parse_commit(cache, name, data)


def read_commit_if_exists(cache: Folder, name: str) -> dict[str, Any] | None:
    """Read the commit with this name. Returns None if there is none. Raises CacheError if it names no parts."""
    data = cache.read_if_exists(f"{COMMITS}/{name}.json")
    return None if data is None else _parse_commit(cache, f"{name}.json", data)


def _parse_commit(cache: Folder, file: str, data: bytes) -> dict[str, Any]:
    content = parse_json_object(data, cache.url_of(f"{COMMITS}/{file}"))
    entries = content.get("parts")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and {"file", "sha256"} <= entry.keys() for entry in entries
    ):
        raise CacheError(f"{cache.url_of(COMMITS)}/{file} names no parts: it is damaged; {VERIFY_HINT}")
    return content


def parse_summaries(cache: Folder, name: str, content: Mapping[str, Any]) -> list[PartSummary]:
    """Return summaries of the parts in a commit. name: of the commit, for the error.

    Raises CacheError if the commit does not describe its parts.
    """
    try:
        for entry in content["parts"]:
            check_lengths([BucketTally(**tally) for tally in entry["tally"].values()])
            if not all(type(entry[count]) is int for count in ("samples", "rows", "enlarged", "bytes")):
                raise TypeError("counts are expected")
            if not all(type(number) is int for group in entry["groups"] for number in group):
                raise TypeError("row groups are expected")
        return [PartSummary.from_commit(entry) for entry in content["parts"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        file = cache.url_of(f"{COMMITS}/{name}.json")
        raise CacheError(f"{file} is corrupt: it does not describe its parts; {VERIFY_HINT}") from error


def read_rejects(cache: Folder) -> Iterator[dict[str, Any]]:
    """Yield the rejects of a cache that no retry part supersedes, unit by unit, as `_rejects` lists them.

    Raises CacheError if a file cannot be parsed.
    """
    names = [name for name in cache.list_files(REJECTS) if name.endswith(".jsonl")]
    for name in names:
        # few files are read: none ahead, and a request for each costs less than a listing of all commits
        data = cache.read(f"{REJECTS}/{name}")
        listed = cache.list_files_of(COMMITS, f"{parse_unit_of_commit(strip_extension(name))}-")
        retries = [stem for stem in map(strip_extension, listed) if is_retry_part(stem)]
        superseded = read_superseded_rejects(cache, retries)
        for line in data.splitlines():
            reject = parse_json_object(line, cache.url_of(f"{REJECTS}/{name}"))
            if not {"shard", "key", "position", "reason"} <= reject.keys():
                raise CacheError(f"{cache.url_of(f'{REJECTS}/{name}')} is damaged; {VERIFY_HINT}")
            if (reject["position"], reject["reason"]) not in superseded:
                yield reject


def list_retries(cache: Folder) -> dict[str, list[str]]:
    """Return the names of the commits of retry parts, by unit."""
    retries: dict[str, list[str]] = {}
    for name in sorted(filter(is_retry_part, iterate_commits(cache))):
        retries.setdefault(parse_unit_of_commit(name), []).append(name)
    return retries


def parse_unit_of_commit(name: str) -> str:
    """Return the unit of the commit with this name."""
    return parse_unit_name(f"{COMMITS}/{name}.json") if is_retry_part(name) else name


def read_superseded_rejects(cache: Folder, retries: Iterable[str]) -> set[tuple[int, str]]:
    """Return the rejects that retry parts of one unit supersede, as position and reason. retries: their commits."""
    entries = [entry for _, content in read_commits(cache, retries) for entry in content["parts"]]
    return {(position, reason) for entry in entries for position, reason in entry.get("supersedes", ())}


def list_started_units(cache: Folder) -> set[str]:
    """Return the names of the units that have a part or a commit."""
    return {parse_unit_name(file) for file in list_part_files(cache)} | list_finished_units(cache)


def list_finished_units(cache: Folder) -> set[str]:
    """Return the names of the units that are done."""
    return {name for name in list_commits(cache) if not is_retry_part(name)}
