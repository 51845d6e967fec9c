"""Whether a cache is what it says it is: every file against its record, the records against the plan and each other.

Nothing is believed: rows are read and counted, their statistics made again, hashes compared. What is found is told file
by file, with what to do. Two further proofs need more than the cache: `pipeline.maintenance.reencode` has them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipeline.cache import card as card_module
from pipeline.cache import commits, identity, plan, runs, stats
from pipeline.cache.card import NAME
from pipeline.cache.parts import DATA, EMPTY, data_twin, find_empty_duplicates, is_retry_part, schema_as_json, stem_of
from pipeline.cache.reader import Cache
from pipeline.canonical_json import canonical_json, with_checksum
from pipeline.errors import CacheError, LatentmillError
from pipeline.formats.record import PartInfo
from pipeline.maintenance.verify_part import PartCheck, Problem, check_part, redo_hint
from pipeline.prefetch import in_order
from pipeline.records import Unit
from pipeline.sources.units import unit_name_of
from pipeline.storage.folder import Folder

AT_ONCE = 4  # files with rows that are held and read
SMALL_AT_ONCE = 16  # other files: stores are slow to answer
REBUILD = "latentmill verify --rebuild writes it again"
RESTORE = "restore it from a copy: nothing else in the cache says what stood there"
REWRITE = "the encode command writes it again"
AWAY = "move it away"


SUFFIXES: Mapping[str, tuple[str, ...]] = {
    DATA: (".parquet", ".tar"),
    EMPTY: (".json",),
    commits.COMMITS: (".json",),
    commits.REJECTS: (".jsonl",),
    plan.FOLDER: (".parquet",),
    runs.FOLDER: (".json", ".log"),
}


@dataclass(slots=True)
class Findings:
    """All that was found.

    units: those of the plan, by name. rebuildable: the units whose parts are sound, but not what is said of them.
    """

    problems: list[Problem] = field(default_factory=list)
    units: dict[str, Unit] = field(default_factory=dict)
    parts: list[PartInfo] = field(default_factory=list)
    rebuildable: list[str] = field(default_factory=list)

    @property
    def parts_of_units(self) -> dict[str, list[PartInfo]]:
        """The parts by unit, in their order; without those that `retry` wrote."""
        by_unit: dict[str, list[PartInfo]] = {}
        for part in sorted(self.parts, key=lambda part: part.record.part):
            if not part.record.round:
                by_unit.setdefault(part.record.unit, []).append(part)
        return by_unit


@dataclass(frozen=True, slots=True)
class CommitStatements:
    """What stands under a name in `_commits` and in `_rejects`; None where nothing does."""

    name: str
    commit: bytes | None
    rejects: bytes | None


def verify_cache(cache: Cache, on_file: Callable[[], None] = lambda: None) -> Findings:
    """Check everything in a cache. on_file is called after each file with rows."""
    found = Findings()
    found.problems += parse_part_info(identity.NAME, RESTORE, check_content(cache))
    if found.problems:  # what everything else is held against cannot be trusted
        return found
    check_plan(cache.folder, found)
    listed = {below: cache.folder.listed(below) for below in reversed([*SUFFIXES])}  # commits before parts
    found.problems += check_unexpected_files(listed)
    names = {below: [name for name in listed[below][0] if name.endswith(end)] for below, end in SUFFIXES.items()}
    files = [f"{below}/{name}" for below in (EMPTY, DATA) for name in names[below]]
    hidden = find_empty_duplicates(files)
    what = "its part stands in data/ too, with rows, and that one counts"
    found.problems += [Problem(file, what, f"{AWAY}, and run the encode command again") for file in sorted(hidden)]
    files = [file for file in files if file not in hidden]
    checked: list[PartCheck] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for one in in_order(pool, lambda file: check_part(cache, file, found.units), files, window=AT_ONCE):
            checked.append(one)
            on_file()
    for one in checked:
        found.problems += one.problems
    found.parts = [one.standing for one in checked if one.standing is not None]
    sound = [one.standing for one in checked if one.standing is not None and not one.problems]
    found.problems += check_keys(checked)
    committed = {PurePosixPath(name).stem for name in names[commits.COMMITS]}
    rejected = {PurePosixPath(name).stem for name in names[commits.REJECTS]}

    def said(names: Iterable[str]) -> Iterator[CommitStatements]:
        with ThreadPoolExecutor(SMALL_AT_ONCE) as pool:
            read = partial(read_commit_statements, cache.folder, committed, rejected)
            yield from in_order(pool, read, names, window=SMALL_AT_ONCE)

    found.problems += check_names(found.units, committed, rejected)
    check_units(said(found.units), found, sound)
    found.problems += check_retries(said, committed, rejected, found, sound)
    if not any(problem.do != REBUILD for problem in found.problems):  # else they differ as a matter of course
        found.problems += parse_part_info(stats.NAME, REWRITE, check_statistics(cache, found.parts))
    found.problems += check_runs(cache.folder)
    return found


def parse_part_info(file: str, do: str, check: Iterable[Problem]) -> list[Problem]:
    """A check's problems; or one, where a file's content leads the check astray."""
    try:
        return list(check)
    except LatentmillError:
        raise
    except Exception as error:  # of whatever kind JSON of another shape leads to
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Problem(file, f"it cannot be understood: {said:.200}", do)]


def read_commit_statements(folder: Folder, committed: Set[str], rejected: Set[str], name: str) -> CommitStatements:
    """What is said under a name: only files that are listed are asked for."""
    return CommitStatements(
        name,
        folder.read_if_there(f"{commits.COMMITS}/{name}.json") if name in committed else None,
        folder.read_if_there(f"{commits.REJECTS}/{name}.jsonl") if name in rejected else None,
    )


def check_unexpected_files(listed: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> Iterator[Problem]:
    """What is in a cache's folders and is no file of it, by its name: some readers would take it for one.

    listed: of each folder the files, and what else is there.
    """
    for below, suffixes in SUFFIXES.items():
        files, others = listed[below]
        for name in files:
            if not name.endswith(suffixes):
                yield Problem(f"{below}/{name}", "it is no file of a cache", AWAY)
        for name in others:
            if not name.startswith("."):
                yield Problem(f"{below}/{name}", "it is a folder, or a link that leads nowhere", AWAY)


def check_content(cache: Cache) -> Iterator[Problem]:
    """cache.json: its own sha256, and whether what it says twice agrees."""
    content = dict(cache.content)
    try:
        config = identity.raw_config(cache.config)
    except ValueError as error:
        yield Problem(identity.NAME, f"the VAE's configuration cannot be: {error}", RESTORE)
        return
    data = cache.folder.read(identity.NAME)
    if content.get("sha256") != with_checksum(content)["sha256"] or data != identity.encode_json(content):
        yield Problem(identity.NAME, "it was changed after it was written: it does not have its own sha256", RESTORE)
    vae = content["vae"]
    constants = {name: vae["config"].get(name) for name in identity.CONSTANTS}
    if constants != {name: value for name, value in vae.items() if name not in ("reference", "config")}:
        yield Problem(identity.NAME, "the constants of the VAE are not those of its configuration", RESTORE)
    if config != content["identity"]["config"]:
        yield Problem(identity.NAME, "the VAE's configuration is not the one of the identity", RESTORE)
    if content["schema"] != schema_as_json(cache.layout):
        yield Problem(identity.NAME, "the schema is not the one of the identity and the columns", RESTORE)


def check_plan(folder: Folder, found: Findings) -> None:
    """The plan's files: as the runs saw them, each unit named after what it reads, none twice as it is."""
    vouched: dict[str, set[str]] = {}
    for run in runs.read_runs(folder).values():
        if isinstance(worked_by := run.get("plan"), dict):
            for name, sha256 in worked_by.items():
                vouched.setdefault(name, set()).add(str(sha256))
    names, files = plan.list_plan_files(folder), list[list[Unit]]()
    for name in names:
        file = f"{plan.FOLDER}/{name}"
        if name in vouched and hashlib.sha256(folder.read(file)).hexdigest() not in vouched[name]:
            found.problems.append(Problem(file, "it is not the file that the runs worked by", RESTORE))
        found.problems += parse_part_info(file, RESTORE, check_plan_file(folder, name, found, files))
    found.units = {unit.name: unit for unit in plan.latest_units(files)}
    gone = sorted(vouched.keys() - set(names))
    for name in gone:
        found.problems.append(Problem(f"{plan.FOLDER}/{name}", "it is gone, but runs worked by it", RESTORE))
    if not gone and not found.units:
        found.problems.append(Problem(plan.FOLDER, "there are no units in it", RESTORE))


def check_plan_file(folder: Folder, name: str, found: Findings, files: list[list[Unit]]) -> Iterator[Problem]:
    """The units in a file of the plan; they are put into `files`. A later file may plan a unit anew, in another way."""
    file = f"{plan.FOLDER}/{name}"
    try:
        units = plan.read_plan_files(folder, [name])
    except CacheError as error:
        yield Problem(file, str(error), RESTORE)
        return
    files.append(units)
    here: set[str] = set()
    for unit in units:
        if unit.name != unit_name_of(unit):
            yield Problem(file, f"the unit {unit.name} does not read what it is named after", RESTORE)
        if unit.name in here or found.units.get(unit.name) == unit:
            yield Problem(file, f"the unit {unit.name} is planned twice", RESTORE)
        here.add(unit.name)
        found.units[unit.name] = unit


def check_keys(checked: Iterable[PartCheck]) -> Iterator[Problem]:
    """Rows with one key in one input, whichever of its files they are in."""
    by_source: dict[str, list[PartCheck]] = {}
    for one in checked:
        if one.standing is not None and len(one.keys):
            by_source.setdefault(one.standing.record.source, []).append(one)
    for source, files in by_source.items():
        keys = np.concatenate([one.keys for one in files])
        twice = len(keys) - len(np.unique(keys))
        if twice:
            seen = np.zeros(0, np.uint64)
            for one in files:
                if len(np.unique(one.keys)) < len(one.keys) or np.isin(one.keys, seen).any():
                    yield Problem(one.file, f"rows of {source} stand here a second time", redo_hint(one.file))
                seen = np.concatenate([seen, one.keys])


def check_names(units: Collection[str], committed: Set[str], rejected: Set[str]) -> Iterator[Problem]:
    """Files of `_commits` and `_rejects` whose units are not planned."""
    for name in sorted(name for name in committed if name not in units and not is_retry_part(name)):
        yield Problem(f"{commits.COMMITS}/{name}.json", "its unit is not in the plan", AWAY)
    for name in sorted(name for name in rejected if name not in units and not is_retry_part(name)):
        yield Problem(f"{commits.REJECTS}/{name}.jsonl", "its unit is not in the plan", AWAY)


def check_units(said: Iterable[CommitStatements], found: Findings, sound: Sequence[PartInfo]) -> None:
    """Each unit: all parts, one of each, and `_commits` and `_rejects` that say the same. said: in the units' order."""
    by_unit = found.parts_of_units
    whole = {part.file for part in sound}
    named = {problem.file for problem in found.problems}  # what is wrong with these has been said
    stems = {PurePosixPath(stem_of(file)).name for file in named}
    units = {stem.rpartition("-")[0] for stem in stems}
    unfinished = 0
    for one in said:
        name = one.name
        parts = by_unit.get(name, [])
        complete = [p.record.part for p in parts] == list(range(len(parts))) and parts and parts[-1].record.last
        if not complete and one.commit is None:
            unfinished += 1
            continue
        problems = list(check_part_numbers(name, parts, stems, name in units))
        problems += check_commit(one, parts, whole, named)
        problems += check_rejects(one, parts) if complete else []
        found.problems += problems
        if complete and problems and all(p.do == REBUILD for p in problems) and all(p.file in whole for p in parts):
            found.rebuildable.append(name)
    if unfinished:
        what = f"{unfinished} of {len(found.units)} units are not done"
        found.problems.append(Problem(plan.FOLDER, what, "the encode command goes on"))


def check_part_numbers(unit: str, parts: Sequence[PartInfo], stems: Set[str], is_named: bool) -> Iterator[Problem]:
    """A finished unit's parts: each number once, the last one last.

    stems: of the files of which something has been said. is_named: whether one of the unit's is among them.
    """
    file = f"{commits.COMMITS}/{unit}.json"
    do = f"move {file} away, and run the encode command again"
    counts = Counter(part.record.part for part in parts)
    for number in range(max(counts, default=-1) + 1):
        stem = f"{unit}-{number:05d}"
        if counts[number] != 1 and stem not in stems:
            yield Problem(f"{DATA}/{stem}", f"part {number} is there {counts[number]} times", do)
    if parts and not is_named and [part.record.last for part in parts] != [False] * (len(parts) - 1) + [True]:
        yield Problem(file, f"the unit's last part is gone, or is not the last: there are {len(parts)}", do)


def check_retries(
    read: Callable[[Iterable[str]], Iterable[CommitStatements]],
    committed: Set[str],
    rejected: Set[str],
    found: Findings,
    sound: Sequence[PartInfo],
) -> Iterator[Problem]:
    """The parts that `retry` wrote: each with its own commit, and in place of rejects that there are."""
    whole = {part.file for part in sound}
    named = {problem.file for problem in found.problems}
    retries = {commits.commit_name([part]): part for part in found.parts if part.record.round}
    for one in read(sorted(retries.keys() | set(filter(is_retry_part, committed)))):
        part = retries.get(one.name)
        problems = check_commit(one, [part] if part else [], whole, named)
        problems += check_rejects(one, [part]) if part else []
        yield from problems
        if part and problems and all(problem.do == REBUILD for problem in problems) and part.file in whole:
            found.rebuildable.append(one.name)
    for name in sorted(set(filter(is_retry_part, rejected)) - retries.keys()):
        yield Problem(f"{commits.REJECTS}/{name}.jsonl", "its part is gone", AWAY)
    left = {
        (part.record.unit, reject.position, reject.reason) for part in found.parts for reject in part.record.rejects
    }
    for part in sorted(retries.values(), key=lambda part: part.record.round):
        mine = {(part.record.unit, position, why) for position, why in part.record.supersedes}
        if not mine <= left and part.file not in named:
            yield Problem(part.file, "it supersedes rejects that there are not, or not any more", redo_hint(part.file))
        left -= mine


def check_rejects(said: CommitStatements, parts: Sequence[PartInfo]) -> list[Problem]:
    """What `_rejects` has under a name, against the parts."""
    if (said.rejects or b"") == commits.rejects_as_jsonl(parts):
        return []
    return [Problem(f"{commits.REJECTS}/{said.name}.jsonl", "it does not say what the unit's records say", REBUILD)]


def check_commit(
    said: CommitStatements, parts: Sequence[PartInfo], whole: Collection[str], named: Collection[str]
) -> list[Problem]:
    """What `_commits` has under a name, against the parts. whole: the files that nothing is known against."""
    file = f"{commits.COMMITS}/{said.name}.json"
    if said.commit is None:
        return [Problem(file, "it is gone, or was never written", REBUILD)]
    found = parse_part_info(file, REBUILD, _against_parts(file, said.name, said.commit, parts, whole))
    return [problem for problem in found if problem.file not in named]


def _against_parts(
    file: str, name: str, data: bytes, parts: Sequence[PartInfo], whole: Collection[str]
) -> Iterator[Problem]:
    content = _json(data)
    if content != with_checksum(content) or data != canonical_json(content):
        yield Problem(file, "it was changed after it was written", REBUILD)
        return
    command = "latentmill retry" if is_retry_part(name) else "the encode command again"
    standing = {part.file: part for part in parts}
    committed = {part["file"]: part for part in content["parts"]}
    if not committed:
        yield Problem(file, "it names no parts", f"move it away, and run {command}")
    if len(committed) != len(content["parts"]) or any(part.record.unit != content["unit"] for part in parts):
        yield Problem(file, "it names parts twice, or another unit", REBUILD)
    full = {stem_of(name) for name in standing}
    twins = {name for name in committed if data_twin(name) in full}
    if twins:
        yield Problem(file, "it names parts without rows that stand in data/, with rows", "the encode command mends it")
    for gone in sorted(committed.keys() - standing.keys() - twins):
        what = "it is gone, or no part of this cache any more, but was committed"
        yield Problem(gone, what, f"move it, if it is there, and {file} away, and run {command}")
    said = {data_twin(name) for name in twins}
    for new in sorted(name for name in standing.keys() - committed.keys() if stem_of(name) not in said):
        yield Problem(new, "it was not there when its unit was done", AWAY)
    for both in sorted(standing.keys() & committed.keys()):
        part = standing[both]
        if part.sha256 != committed[both]["sha256"]:
            if both in whole:
                what = "its bytes are not those that were committed"
                yield Problem(both, what, f"move it and {file} away, and run {command}")
        elif json.loads(canonical_json(part.to_dict())) != committed[both]:
            yield Problem(file, f"it does not say what {both} says", REBUILD)


def check_statistics(cache: Cache, parts: Sequence[PartInfo]) -> Iterator[Problem]:
    """stats.json and README.md, against what they are made from."""
    made = stats.summarize_tallies(stats.parse_part(part.to_dict()) for part in parts)
    data = cache.folder.read_if_there(stats.NAME)
    if data is None:
        yield Problem(stats.NAME, "it is not there: no run has come to its end", REWRITE)
        return
    if data != stats.encode_json(made):
        yield Problem(stats.NAME, "it is not what the records say together", REWRITE)
    card = cache.folder.read_if_there(NAME)
    told = [run.get("versions") for run in runs.read_runs(cache.folder).values()]
    versions = {str(one.get("latentmill")) for one in told if isinstance(one, dict)}
    if card not in [card_module.render_card(cache, made, version) for version in versions]:
        yield Problem(NAME, "it is not the card of this cache", REWRITE)


def check_runs(folder: Folder) -> Iterator[Problem]:
    """The records of runs, and their logs: informative, but not to be changed either."""
    for name in filter(lambda name: name.endswith(".json"), folder.names(runs.FOLDER)):
        data = folder.read(f"{runs.FOLDER}/{name}")
        if not _is_run(data):
            yield Problem(f"{runs.FOLDER}/{name}", "it was changed after it was written", f"{AWAY}: it informs only")
    for run, content in runs.read_runs(folder).items():
        # of a run that was killed, the log may be newer than the record
        known, log = content["ended"] and content.get("log"), f"{runs.FOLDER}/{run}.log"
        said = folder.read_if_there(log) if known else None
        if said is not None and hashlib.sha256(said).hexdigest() != known:
            yield Problem(log, "it was changed after it was written", f"{AWAY}: it informs only")


def rebuild_records(cache: Cache, found: Findings) -> list[str]:
    """Write `_commits` and `_rejects` again of the units where the parts are sound. Returns the units' names."""
    by_name = found.parts_of_units | {commits.commit_name([part]): [part] for part in found.parts if part.record.round}
    for name in found.rebuildable:
        commits.rewrite_commit(cache.folder, by_name[name])
    return found.rebuildable


def _is_run(data: bytes) -> bool:
    """Whether this is a run's record as it was written."""
    try:
        content = json.loads(data)
        return bool(data == runs.encode_json(content))
    except (ValueError, RecursionError, TypeError, AttributeError):
        return False


def _json(data: bytes) -> dict[str, Any]:
    """An object; an empty one for what is none."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
