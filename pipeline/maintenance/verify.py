"""Check a cache: every file against its record, and the records against the plan and each other.

Rows are read and counted, their statistics are computed again, and hashes are compared. Each problem names a file and
a remedy. Two further checks need the inputs: see `pipeline.maintenance.reencode`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from latentmill.cache_files import PART_SUFFIXES
from latentmill.error_text import describe_error
from pipeline.cache import commit_log, commits, identity, plan, runs, stats
from pipeline.cache.part_info import PartInfo
from pipeline.cache.parts import (
    DATA,
    EMPTY,
    describe_schema,
    find_twins,
    is_retry_part,
    strip_extension,
    to_data_stem,
)
from pipeline.cache.reader import Cache
from pipeline.canonical_json import REBUILD_HINT, canonical_json, with_checksum
from pipeline.errors import CacheError, LatentmillError
from pipeline.maintenance.verify_columns import check_columns
from pipeline.maintenance.verify_derived import REWRITE, check_index, check_statistics
from pipeline.maintenance.verify_log import check_log
from pipeline.maintenance.verify_part import PartCheck, Problem, check_part, describe_redo, describe_redo_of_repeated
from pipeline.prefetch import map_in_order
from pipeline.records import Unit
from pipeline.sources.units import derive_unit_name
from pipeline.storage.folder import Folder

PART_THREADS = 4  # threads that check parts: each one holds a whole file in memory
SMALL_FILE_THREADS = 16  # threads that read other files: stores are slow to answer
REBUILD = REBUILD_HINT
RESTORE = "restore it from a backup: it cannot be derived from the rest of the cache"
AWAY = "move it away"
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    **PART_SUFFIXES,
    commits.COMMITS: (".json",),
    commits.REJECTS: (".jsonl",),
    commit_log.FOLDER: (".parquet",),
    plan.FOLDER: (".parquet",),
    runs.FOLDER: (".json", ".log"),
}


@dataclass(slots=True)
class CheckResult:
    """The result of a check.

    units: the planned units, by name. parts: the parts with a readable record, sound or not.
    rebuildable: the commits that can be rewritten, by name, because their parts are sound.
    is_log_wrong, is_index_wrong: the commit log or the index differs from the parts.
    """

    problems: list[Problem] = field(default_factory=list)
    units: dict[str, Unit] = field(default_factory=dict)
    parts: list[PartInfo] = field(default_factory=list)
    rebuildable: list[str] = field(default_factory=list)
    is_log_wrong: bool = False
    is_index_wrong: bool = False

    def group_by_unit(self) -> dict[str, list[PartInfo]]:
        """Return the parts of each unit in the order of their numbers, including retry parts."""
        parts_of_units: dict[str, list[PartInfo]] = {}
        for part in sorted(self.parts, key=lambda part: part.record.part):
            parts_of_units.setdefault(part.record.unit, []).append(part)
        return parts_of_units


@dataclass(frozen=True, slots=True)
class CommitFiles:
    """The content of the files with this name in `_commits` and `_rejects`; None if a file does not exist."""

    name: str
    commit: bytes | None
    rejects: bytes | None


def verify_cache(cache: Cache, on_file: Callable[[], None] = lambda: None) -> CheckResult:
    """Check everything in a cache. on_file: called after each part file."""
    result = CheckResult()
    result.problems += run_check(identity.NAME, RESTORE, check_content(cache))
    if result.problems:  # every other check compares with cache.json
        return result
    check_plan(cache.folder, result)
    listed = {folder: cache.folder.list_entries(folder) for folder in reversed([*SUFFIXES])}  # commits before parts
    result.problems += check_unexpected_files(listed)
    names = {folder: [name for name in listed[folder][0] if name.endswith(end)] for folder, end in SUFFIXES.items()}
    files = [f"{folder}/{name}" for folder in (EMPTY, DATA) for name in names[folder]]
    twins = find_twins(files)
    message = "the same part is also in data/, with rows, and only that file counts"
    result.problems += [Problem(file, message, f"{AWAY}, and run the encode command again") for file in sorted(twins)]
    files = [file for file in files if file not in twins]
    checks: list[PartCheck] = []
    with ThreadPoolExecutor(PART_THREADS) as pool:
        check_file = partial(check_part, cache, units=result.units)
        for check in map_in_order(pool, check_file, files, window=PART_THREADS):
            checks.append(check)
            on_file()
    for check in checks:
        result.problems += check.problems
    result.parts = [check.part for check in checks if check.part is not None]
    sound = [check.part for check in checks if check.part is not None and not check.problems]
    result.problems += check_keys(checks)
    result.problems += check_columns(cache.folder, checks)
    committed = {PurePosixPath(name).stem for name in names[commits.COMMITS]}
    rejected = {PurePosixPath(name).stem for name in names[commits.REJECTS]}

    def read(names: Iterable[str]) -> Iterator[CommitFiles]:
        with ThreadPoolExecutor(SMALL_FILE_THREADS) as pool:
            read_files = partial(read_commit_files, cache.folder, committed, rejected)
            yield from map_in_order(pool, read_files, names, window=SMALL_FILE_THREADS)

    result.problems += check_names(result.units, committed, rejected)
    check_units(read(result.units), result, sound)
    result.problems += check_retries(read, committed, rejected, result, sound)
    log_problems = list(check_log(cache.folder, result.parts, committed))
    result.is_log_wrong = bool(log_problems)
    result.problems += log_problems
    if not any(problem.do != REBUILD for problem in result.problems):  # otherwise the statistics must differ
        result.problems += run_check(stats.NAME, REWRITE, check_statistics(cache, result.parts))
        index_problems = list(check_index(cache, result.parts))
        result.is_index_wrong = bool(index_problems)
        result.problems += index_problems
    result.problems += check_runs(cache.folder)
    return result


def run_check(file: str, do: str, check: Iterable[Problem]) -> list[Problem]:
    """Return the problems that a check yields, or a single problem if the content of the file makes the check fail."""
    try:
        return list(check)
    except LatentmillError:
        raise
    except Exception as error:  # of any kind, depending on the shape of the JSON
        return [Problem(file, f"its content is not valid: {describe_error(error):.200}", do)]


def read_commit_files(folder: Folder, committed: Set[str], rejected: Set[str], name: str) -> CommitFiles:
    """Read the files of a commit. Only files that were listed are requested."""
    return CommitFiles(
        name,
        folder.read_if_exists(f"{commits.COMMITS}/{name}.json") if name in committed else None,
        folder.read_if_exists(f"{commits.REJECTS}/{name}.jsonl") if name in rejected else None,
    )


def check_unexpected_files(listed: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> Iterator[Problem]:
    """Find unexpected files in a cache's folders by their names. Some readers would read such files.

    listed: the files of each folder, and its other entries.
    """
    for folder, suffixes in SUFFIXES.items():
        files, others = listed[folder]
        for name in files:
            if not name.endswith(suffixes):
                yield Problem(f"{folder}/{name}", "unexpected file", AWAY)
        for name in others:
            if not name.startswith("."):
                yield Problem(f"{folder}/{name}", "unexpected folder, or a broken link", AWAY)


def check_content(cache: Cache) -> Iterator[Problem]:
    """Check cache.json: its own sha256, and that duplicated values are equal."""
    info = cache.info
    try:
        config = identity.select_raw_fields(cache.config)
    except ValueError as error:
        yield Problem(identity.NAME, f"the VAE's configuration is not valid: {error}", RESTORE)
        return
    data = cache.folder.read(identity.NAME)
    if data != identity.encode_cache_json(with_checksum(info.to_dict())):
        yield Problem(identity.NAME, "it was changed after it was written: its sha256 does not match", RESTORE)
    if not identity.has_constants_of_its_vae(info.vae, cache.config):
        yield Problem(identity.NAME, "the constants of the VAE differ from its configuration", RESTORE)
    if config != info.identity.config:
        yield Problem(identity.NAME, "the VAE's configuration differs from the identity", RESTORE)
    if [asdict(column) for column in info.schema] != describe_schema(cache.layout):
        yield Problem(identity.NAME, "the schema does not match the identity and the columns", RESTORE)


def check_plan(folder: Folder, result: CheckResult) -> None:
    """Check the plan's files: they have the hashes that runs recorded, and name each unit correctly and only once."""
    recorded: dict[str, set[str]] = {}
    for run in runs.read_runs(folder).values():
        if isinstance(hashes := run.get("plan"), dict):
            for name, sha256 in hashes.items():
                recorded.setdefault(name, set()).add(str(sha256))
    names, files = plan.list_plan_files(folder), list[list[Unit]]()
    for name in names:
        file = f"{plan.FOLDER}/{name}"
        if name in recorded and hashlib.sha256(folder.read(file)).hexdigest() not in recorded[name]:
            result.problems.append(Problem(file, "it does not match the checksum that runs recorded", RESTORE))
        result.problems += run_check(file, RESTORE, check_plan_file(folder, name, result, files))
    result.units = {unit.name: unit for unit in plan.select_latest_units(files)}
    missing = sorted(recorded.keys() - set(names))
    for name in missing:
        result.problems.append(Problem(f"{plan.FOLDER}/{name}", "it is missing, but runs recorded it", RESTORE))
    if not missing and not result.units:
        result.problems.append(Problem(plan.FOLDER, "it has no units", RESTORE))


def check_plan_file(folder: Folder, name: str, result: CheckResult, files: list[list[Unit]]) -> Iterator[Problem]:
    """Check the units in a file of the plan, and append them to `files`. A later file may change a unit."""
    file = f"{plan.FOLDER}/{name}"
    try:
        units = plan.read_plan_files(folder, [name])
    except CacheError as error:
        yield Problem(file, str(error), RESTORE)
        return
    files.append(units)
    names: set[str] = set()
    for unit in units:
        if unit.name != derive_unit_name(unit):
            yield Problem(file, f"the name of the unit {unit.name} does not match its input", RESTORE)
        if unit.name in names or result.units.get(unit.name) == unit:
            yield Problem(file, f"the unit {unit.name} is planned twice", RESTORE)
        names.add(unit.name)
        result.units[unit.name] = unit


def check_keys(checks: Iterable[PartCheck]) -> Iterator[Problem]:
    """Find rows of one input that have the same key, in one part or in several."""
    by_source: dict[str, list[PartCheck]] = {}
    for check in checks:
        if check.part is not None and len(check.keys):
            by_source.setdefault(check.part.record.source, []).append(check)
    for source, checks_of_source in by_source.items():
        keys = np.concatenate([check.keys for check in checks_of_source])
        if len(keys) > len(np.unique(keys)):
            earlier_keys = np.zeros(0, np.uint64)
            for check in checks_of_source:
                if len(np.unique(check.keys)) < len(check.keys) or np.isin(check.keys, earlier_keys).any():
                    yield Problem(check.file, f"it repeats rows of {source}", describe_redo_of_repeated(check))
                earlier_keys = np.concatenate([earlier_keys, check.keys])


def check_names(units: Collection[str], committed: Set[str], rejected: Set[str]) -> Iterator[Problem]:
    """Find files in `_commits` and `_rejects` whose units are not planned."""
    for name in sorted(name for name in committed if name not in units and not is_retry_part(name)):
        yield Problem(f"{commits.COMMITS}/{name}.json", "its unit is not in the plan", AWAY)
    for name in sorted(name for name in rejected if name not in units and not is_retry_part(name)):
        yield Problem(f"{commits.REJECTS}/{name}.jsonl", "its unit is not in the plan", AWAY)


def check_units(all_files: Iterable[CommitFiles], result: CheckResult, sound: Sequence[PartInfo]) -> None:
    """Check that each unit has every part once, and that `_commits` and `_rejects` agree with the parts.

    all_files: one per planned unit. sound: the parts without problems.
    """
    parts_of_units = result.group_by_unit()
    sound_files = {part.file for part in sound}
    reported = {problem.file for problem in result.problems}
    stems = {PurePosixPath(strip_extension(file)).name for file in reported}
    units = {stem.rpartition("-")[0] for stem in stems}
    unfinished = 0
    for files in all_files:
        name = files.name
        parts = [part for part in parts_of_units.get(name, []) if not part.record.round]
        numbers = [part.record.part for part in parts]
        is_complete = bool(parts) and numbers == list(range(len(parts))) and parts[-1].record.last
        if not is_complete and files.commit is None:
            unfinished += 1
            continue
        problems = list(check_part_numbers(name, parts, stems, name in units))
        problems += check_commit(files, parts, sound_files, reported)
        problems += check_rejects(files, parts) if is_complete else []
        result.problems += problems
        if is_complete and is_rebuildable(problems, parts, sound_files):
            result.rebuildable.append(name)
    if unfinished:
        message = f"{unfinished} of {len(result.units)} units are not done"
        result.problems.append(Problem(plan.FOLDER, message, "run the encode command again to resume"))


def is_rebuildable(problems: Sequence[Problem], parts: Sequence[PartInfo], sound_files: Collection[str]) -> bool:
    """Return whether a commit has problems, and rewriting it from its sound parts solves all of them."""
    are_records_wrong = bool(problems) and all(problem.do == REBUILD for problem in problems)
    return are_records_wrong and all(part.file in sound_files for part in parts)


def check_part_numbers(unit: str, parts: Sequence[PartInfo], stems: Set[str], is_reported: bool) -> Iterator[Problem]:
    """Check that a finished unit has each part once, and that its last part is the last one.

    stems: the stems of the files that have been reported. is_reported: whether a file of the unit is among them.
    """
    file = f"{commits.COMMITS}/{unit}.json"
    do = f"move {file} away, and run the encode command again"
    counts = Counter(part.record.part for part in parts)
    for number in range(max(counts, default=-1) + 1):
        stem = f"{unit}-{number:05d}"
        if counts[number] != 1 and stem not in stems:
            yield Problem(f"{DATA}/{stem}", f"part {number} exists {counts[number]} times", do)
    if parts and not is_reported and [part.record.last for part in parts] != [False] * (len(parts) - 1) + [True]:
        yield Problem(file, f"the unit's last part is missing, or is not the last: the unit has {len(parts)} parts", do)


def check_retries(
    read: Callable[[Iterable[str]], Iterable[CommitFiles]],
    committed: Set[str],
    rejected: Set[str],
    result: CheckResult,
    sound: Sequence[PartInfo],
) -> Iterator[Problem]:
    """Check the retry parts: each has its own commit, and supersedes existing rejects."""
    sound_files = {part.file for part in sound}
    reported = {problem.file for problem in result.problems}
    retries = {commits.get_commit_name([part]): part for part in result.parts if part.record.round}
    for files in read(sorted(retries.keys() | set(filter(is_retry_part, committed)))):
        part = retries.get(files.name)
        problems = check_commit(files, [part] if part else [], sound_files, reported)
        problems += check_rejects(files, [part]) if part else []
        yield from problems
        if part and is_rebuildable(problems, [part], sound_files):
            result.rebuildable.append(files.name)
    for name in sorted(set(filter(is_retry_part, rejected)) - retries.keys()):
        yield Problem(f"{commits.REJECTS}/{name}.jsonl", "its part is missing", AWAY)
    rejects = {
        (part.record.unit, reject.position, reject.reason) for part in result.parts for reject in part.record.rejects
    }
    for part in sorted(retries.values(), key=lambda part: part.record.round):
        superseded = {(part.record.unit, position, reason) for position, reason in part.record.supersedes}
        if not superseded <= rejects and part.file not in reported:
            message = "it supersedes rejects that do not exist, or that another part supersedes"
            yield Problem(part.file, message, describe_redo(part.file))
        rejects -= superseded


def check_rejects(files: CommitFiles, parts: Sequence[PartInfo]) -> list[Problem]:
    """Compare a file in `_rejects` with the parts."""
    if (files.rejects or b"") == commits.encode_rejects(parts):
        return []
    return [Problem(f"{commits.REJECTS}/{files.name}.jsonl", "it differs from the records of its parts", REBUILD)]


def check_commit(
    files: CommitFiles, parts: Sequence[PartInfo], sound_files: Collection[str], reported: Collection[str]
) -> list[Problem]:
    """Compare a file in `_commits` with the parts. sound_files: without problems. reported: left out of the result."""
    file = f"{commits.COMMITS}/{files.name}.json"
    if files.commit is None:
        return [Problem(file, "it is missing", REBUILD)]
    problems = run_check(file, REBUILD, _compare_with_parts(file, files.name, files.commit, parts, sound_files))
    return [problem for problem in problems if problem.file not in reported]


def _compare_with_parts(
    file: str, name: str, data: bytes, parts: Sequence[PartInfo], sound_files: Collection[str]
) -> Iterator[Problem]:
    content = _parse_object(data)
    if content != with_checksum(content) or data != canonical_json(content):
        yield Problem(file, "it was changed after it was written", REBUILD)
        return
    command = "latentmill retry" if is_retry_part(name) else "the encode command again"
    existing = {part.file: part for part in parts}
    committed = {entry["file"]: entry for entry in content["parts"]}
    if not committed:
        yield Problem(file, "it names no parts", f"move it away, and run {command}")
    if len(committed) != len(content["parts"]) or any(part.record.unit != content["unit"] for part in parts):
        yield Problem(file, "it names a part twice, or another unit", REBUILD)
    stems = {strip_extension(name) for name in existing}
    twins = {name for name in committed if to_data_stem(name) in stems}
    if twins:
        message = "it names parts without rows that also exist in data/, with rows"
        yield Problem(file, message, REBUILD)
    for missing in sorted(committed.keys() - existing.keys() - twins):
        message = "it was committed, but is missing or is not a part of this cache"
        yield Problem(missing, message, f"move it, if it exists, and {file} away, and run {command}")
    twin_stems = {to_data_stem(name) for name in twins}
    for added in sorted(name for name in existing.keys() - committed.keys() if strip_extension(name) not in twin_stems):
        yield Problem(added, "it was added after its unit was finished", AWAY)
    for name in sorted(existing.keys() & committed.keys()):
        part = existing[name]
        if part.sha256 != committed[name]["sha256"]:
            if name in sound_files:
                message = "it differs from the file that was committed"
                yield Problem(name, message, f"move it and {file} away, and run {command}")
        elif json.loads(canonical_json(part.to_commit_entry())) != committed[name]:
            yield Problem(file, f"it differs from the record in {name}", REBUILD)


def check_runs(folder: Folder) -> Iterator[Problem]:
    """Check the records of runs and their logs. They only inform, but must not be changed either."""
    for name in filter(lambda name: name.endswith(".json"), folder.list_files(runs.FOLDER)):
        if not _is_unchanged_run(folder.read(f"{runs.FOLDER}/{name}")):
            yield Problem(f"{runs.FOLDER}/{name}", "it was changed after it was written", f"{AWAY}: it only informs")
    for run, content in runs.read_runs(folder).items():
        # the log of a run that was killed can be newer than the run's record
        sha256, file = content["ended"] and content.get("log"), f"{runs.FOLDER}/{run}.log"
        log = folder.read_if_exists(file) if sha256 else None
        if log is not None and hashlib.sha256(log).hexdigest() != sha256:
            yield Problem(file, "it was changed after it was written", f"{AWAY}: it only informs")


def rebuild_records(cache: Cache, result: CheckResult) -> list[str]:
    """Rewrite the rebuildable files in `_commits` and `_rejects` from their parts. Returns the commits' names."""
    parts_of_commits: dict[str, list[PartInfo]] = {}
    for part in sorted(result.parts, key=lambda part: part.record.part):
        parts_of_commits.setdefault(commits.get_commit_name([part]), []).append(part)
    for name in result.rebuildable:
        commits.rewrite_commit(cache.folder, parts_of_commits[name])
    return result.rebuildable


def _is_unchanged_run(data: bytes) -> bool:
    """Return whether this is the record of a run as it was written."""
    try:
        content = json.loads(data)
        return bool(data == runs.encode_run(content))
    except (ValueError, RecursionError, TypeError, AttributeError):
        return False


def _parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Returns an empty one if the data is anything else."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
