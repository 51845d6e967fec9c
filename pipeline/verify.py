"""Whether a cache is what it says it is: every file against its record, the records against the plan and each other.

Nothing is believed: rows are read and counted, their statistics made again, hashes compared. What is found is told file
by file, with what to do. Two further proofs need more than the cache: `pipeline.reencode` has them.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline import commit, identity, plan, report, runs, stats, tally, write_parquet, write_tar
from pipeline.cache import Cache, to_tensor
from pipeline.errors import LatentmillError
from pipeline.overlap import in_order
from pipeline.records import BucketTally, Record, Standing, Unit, canonical_json, sealed
from pipeline.storage import Folder

AT_ONCE = 4  # files that are held and read
AGAIN = "move it away with _commits/{unit}.json, if that is there, and run the encode command again"
REBUILD = "latentmill verify --rebuild writes it again"
RESTORE = "restore it from a copy: nothing else in the cache says what stood there"
REWRITE = "the encode command writes it again"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file of a cache, and what to do."""

    file: str
    what: str
    do: str


@dataclass(slots=True)
class Checked:
    """A part's file, as it was found. keys: a 64-bit hash of each row's key. standing: None where it has no record."""

    file: str
    standing: Standing | None = None
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """All that was found.

    units: those of the plan, by name. rebuildable: the units whose parts are sound, but not what is said of them.
    """

    problems: list[Problem] = field(default_factory=list)
    units: dict[str, Unit] = field(default_factory=dict)
    parts: list[Standing] = field(default_factory=list)
    rebuildable: list[str] = field(default_factory=list)


def verify(cache: Cache, on_file: Callable[[], None] = lambda: None) -> Found:
    """Check everything in a cache. on_file is called after each file with rows."""
    found = Found()
    found.problems += check_content(cache)
    if found.problems:  # what everything else is held against cannot be trusted
        return found
    check_plan(cache.folder, found)
    files = [f"{below}/{name}" for below in (commit.EMPTY, commit.DATA) for name in cache.folder.names(below)]
    checked: list[Checked] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for one in in_order(pool, lambda file: check_part(cache, file, found.units), files, window=AT_ONCE):
            checked.append(one)
            on_file()
    for one in checked:
        found.problems += one.problems
    found.parts = [one.standing for one in checked if one.standing is not None]
    sound = [one.standing for one in checked if one.standing is not None and not one.problems]
    found.problems += check_keys(checked)
    check_units(cache.folder, found, sound)
    if not any(problem.do != REBUILD for problem in found.problems):  # else they differ as a matter of course
        found.problems += check_statistics(cache, found.parts)
    found.problems += check_runs(cache.folder)
    return found


def check_content(cache: Cache) -> Iterator[Problem]:
    """cache.json: its own sha256, and whether what it says twice agrees."""
    content = dict(cache.content)
    try:
        config = identity.raw_config(cache.config)
    except ValueError as error:
        yield Problem(identity.NAME, f"the VAE's configuration cannot be: {error}", RESTORE)
        return
    data = cache.folder.read(identity.NAME)
    if content.get("sha256") != sealed(content)["sha256"] or data != identity.as_bytes(content):
        yield Problem(identity.NAME, "it was changed after it was written: it does not have its own sha256", RESTORE)
    vae = content["vae"]
    constants = {name: vae["config"].get(name) for name in vae if name not in ("reference", "config")}
    if constants != {name: vae[name] for name in constants}:
        yield Problem(identity.NAME, "the constants of the VAE are not those of its configuration", RESTORE)
    if config != content["identity"]["config"]:
        yield Problem(identity.NAME, "the VAE's configuration is not the one of the identity", RESTORE)
    if content["schema"] != commit.schema_as_json(cache.layout):
        yield Problem(identity.NAME, "the schema is not the one of the identity and the columns", RESTORE)


def check_plan(folder: Folder, found: Found) -> None:
    """The plan's files: as the runs saw them, each unit named after what it reads, none twice."""
    vouched: dict[str, set[str]] = {}
    for data in folder.read_all(runs.FOLDER):
        for name, sha256 in _json(data).get("plan", {}).items():
            vouched.setdefault(name, set()).add(sha256)
    for name in folder.names(plan.FOLDER):
        file = f"{plan.FOLDER}/{name}"
        data = folder.read(file)
        if name in vouched and hashlib.sha256(data).hexdigest() not in vouched[name]:
            found.problems.append(Problem(file, "it is not the file that the runs worked by", RESTORE))
        try:
            units = plan.read_files(folder, [name])
        except Exception as error:  # pyarrow's, of whatever a damaged file leads it to
            found.problems.append(Problem(file, f"it cannot be read: {type(error).__name__}", RESTORE))
            continue
        for unit in units:
            if unit.name != plan.name_of(unit):
                found.problems.append(
                    Problem(file, f"the unit {unit.name} does not read what it is named after", RESTORE)
                )
            if unit.name in found.units:
                found.problems.append(Problem(file, f"the unit {unit.name} is planned twice", RESTORE))
            found.units[unit.name] = unit
    for name in sorted(vouched.keys() - set(folder.names(plan.FOLDER))):
        found.problems.append(Problem(f"{plan.FOLDER}/{name}", "it is gone, but runs worked by it", RESTORE))


def check_part(cache: Cache, file: str, units: Mapping[str, Unit]) -> Checked:
    """One file of data/ or _empty/: its record against its name, the plan, and its rows."""
    checked = Checked(file)
    try:
        data = cache.folder.read(file)
        record = commit.record_in(data, file)
    except LatentmillError as error:
        checked.problems.append(Problem(file, str(error), "move it away: it is no part of this cache, or damaged"))
        return checked
    checked.standing = Standing(record, file, len(data), hashlib.sha256(data).hexdigest())
    again = AGAIN.format(unit=record.unit)
    checked.problems += [Problem(file, what, again) for what in contradictions(record, file, cache, units)]
    if file.startswith(commit.DATA + "/"):
        try:
            wrong, checked.keys = check_rows(record, data, file, cache)
        except Exception as error:  # libraries', of whatever damaged bytes lead them to
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            wrong = [f"its rows cannot be read: {said:.200}"]
        checked.problems += [Problem(file, what, again) for what in wrong]
    return checked


def contradictions(record: Record, file: str, cache: Cache, units: Mapping[str, Unit]) -> Iterator[str]:
    """What in a record cannot be so."""
    below = commit.DATA if record.rows else commit.EMPTY
    suffix = commit.WRITERS[cache.layout.container].SUFFIX if record.rows else ".json"
    if file != f"{below}/{record.stem}{suffix}":
        yield f"its record is of {below}/{record.stem}{suffix}: it was copied or renamed"
    if record.identity != cache.content["identity_sha256"]:
        yield "it belongs to a cache with another identity"
    unit = units.get(record.unit)
    if unit is None:
        yield f"its unit {record.unit} is not in the plan"
    elif (record.source, record.source_bytes, record.range) != (unit.path, unit.bytes, unit.range):
        yield "its record and the plan name different inputs"
    size = cache.content["identity"]["rows_per_part"]
    if record.samples != record.rows + record.filtered + len(record.rejects):
        yield f"of {record.samples} samples it accounts for {record.rows + record.filtered + len(record.rejects)}"
    if record.round:
        if record.samples != len(record.supersedes):
            yield f"it supersedes {len(record.supersedes)} rejects by {record.samples} samples"
    elif record.first != record.part * size or record.samples > size or (record.samples < size and not record.last):
        yield f"a part of {size} samples cannot have {record.samples} from position {record.first} on"
    if sum(one.samples for one in record.tally.values()) != record.rows:
        yield "its statistics are of another number of rows"


def check_rows(record: Record, data: bytes, file: str, cache: Cache) -> tuple[list[str], np.ndarray]:
    """What is wrong with a part's rows, against its record; and a hash of each row's key."""
    layout, wrong = cache.layout, list[str]()
    if layout.container == "parquet":
        schema = pq.read_schema(io.BytesIO(data)).remove_metadata()
        if not schema.equals(write_parquet.schema_of(layout).remove_metadata()):
            wrong.append("its columns are not those of cache.json")
        rows = write_parquet.read_rows(io.BytesIO(data))
    else:
        rows = write_tar.read_rows(io.BytesIO(data), texts=layout.columns.texts)
    latents: dict[str, list[Any]] = {}
    keys = []
    for row in rows:
        keys.append(int.from_bytes(hashlib.blake2b(row["key"].encode(), digest_size=8).digest(), "little"))
        latent = to_tensor(row)
        latents.setdefault(tally.bucket_name(row["height"], row["width"]), []).append(latent)
        if row["shard"] != record.source:
            wrong.append(f"the row {row['key']} is of {row['shard']}, the part of {record.source}")
        if not bool(latent.isfinite().all()):
            wrong.append(f"the latent of {row['key']} is not finite")
        if row["dtype"] != cache.content["identity"]["dtype"]:
            wrong.append(f"the latent of {row['key']} is {row['dtype']}")
    if len(keys) != record.rows:
        wrong.append(f"it has {len(keys)} rows, its record says {record.rows}")
    make = tally.tally_moments if layout.store == "moments" else tally.tally_latents
    counted = {name: make(latents[name]) for name in sorted(latents)}
    if not wrong and not _equal(counted, record.tally):
        wrong.append("the statistics of its rows are not those of its record")
    return wrong[:3], np.array(keys, np.uint64)


def _equal(a: Mapping[str, BucketTally], b: Mapping[str, BucketTally]) -> bool:
    """Whether statistics agree, but for the order of additions on another machine."""
    if a.keys() != b.keys():
        return False
    for name in a:
        left, right = a[name].to_dict(), b[name].to_dict()
        if left.keys() != right.keys():
            return False
        for what in left:
            pairs = zip(np.atleast_1d(left[what]), np.atleast_1d(right[what]), strict=False)
            if np.size(left[what]) != np.size(right[what]):
                return False
            if not all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in pairs):
                return False
    return True


def check_keys(checked: Iterable[Checked]) -> Iterator[Problem]:
    """Rows with one key in one input, whichever of its files they are in."""
    by_source: dict[str, list[Checked]] = {}
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
                    unit = one.standing.record.unit if one.standing else ""
                    yield Problem(one.file, f"rows of {source} stand here a second time", AGAIN.format(unit=unit))
                seen = np.concatenate([seen, one.keys])


def check_units(folder: Folder, found: Found, sound: Sequence[Standing]) -> None:
    """Each unit: all parts, one of each, and `_commits` and `_rejects` that say the same."""
    by_unit: dict[str, list[Standing]] = {}
    for part in found.parts:
        by_unit.setdefault(part.record.unit, []).append(part)
    whole = {part.file for part in sound}
    finished = commit.finished(folder)
    for name in sorted(finished - found.units.keys()):
        found.problems.append(Problem(f"{commit.COMMITS}/{name}.json", "its unit is not in the plan", "move it away"))
    rejected = {PurePosixPath(name).stem for name in folder.names(commit.REJECTS)}
    for name in sorted(rejected - found.units.keys()):
        found.problems.append(Problem(f"{commit.REJECTS}/{name}.jsonl", "its unit is not in the plan", "move it away"))
    unfinished = 0
    for name, unit in found.units.items():
        parts = sorted((p for p in by_unit.get(name, []) if not p.record.round), key=lambda p: p.record.part)
        complete = [p.record.part for p in parts] == list(range(len(parts))) and parts and parts[-1].record.last
        if not complete and name not in finished:
            unfinished += 1
            continue
        problems = list(check_unit(folder, unit, parts, whole))
        found.problems += problems
        if complete and problems and all(p.do == REBUILD for p in problems) and all(p.file in whole for p in parts):
            found.rebuildable.append(name)
    if unfinished:
        what = f"{unfinished} of {len(found.units)} units are not done"
        found.problems.append(Problem(plan.FOLDER, what, "the encode command goes on"))


def check_unit(folder: Folder, unit: Unit, parts: Sequence[Standing], whole: Collection[str]) -> Iterator[Problem]:
    """A unit's `_commits` and `_rejects` against its parts. whole: the files that nothing is known against."""
    file = f"{commit.COMMITS}/{unit.name}.json"
    again = f"move {file} away, and run the encode command again"
    numbers = [part.record.part for part in parts]
    for number in range(max(numbers, default=-1) + 1):
        if numbers.count(number) != 1:
            name = f"{unit.name}-{number:05d}"
            yield Problem(f"{commit.DATA}/{name}", f"part {number} is there {numbers.count(number)} times", again)
    if (numbers and sum(part.record.last for part in parts) != 1) or (parts and not parts[-1].record.last):
        yield Problem(file, f"the unit's last part is gone, or is not the last: there are {len(numbers)}", again)
    data = folder.read_if_there(file)
    content = {} if data is None else _json(data)
    if data is None:
        yield Problem(file, "it is gone, or was never written", REBUILD)
    elif content != sealed(content) or data != canonical_json(content):
        yield Problem(file, "it was changed after it was written", REBUILD)
    else:
        yield from check_commit(file, content, parts, whole)
    lines = commit.reject_lines(unit, parts)
    if (folder.read_if_there(f"{commit.REJECTS}/{unit.name}.jsonl") or b"") != lines:
        yield Problem(f"{commit.REJECTS}/{unit.name}.jsonl", "it does not say what the unit's records say", REBUILD)


def check_commit(
    file: str, content: Mapping[str, Any], parts: Sequence[Standing], whole: Collection[str]
) -> Iterator[Problem]:
    """A commit that is whole itself, against the files that it names."""
    standing = {part.file: part for part in parts}
    committed = {part["file"]: part for part in content["parts"]}
    again = "{file}: move it and " + file + " away, and run the encode command again"
    for name in sorted(committed.keys() - standing.keys()):
        yield Problem(name, "it is gone, or no part of this cache any more, but was committed", again.format(file=name))
    for name in sorted(standing.keys() - committed.keys()):
        yield Problem(name, "it was not there when its unit was done", f"move {name} away")
    for name in sorted(standing.keys() & committed.keys()):
        part = standing[name]
        if part.sha256 != committed[name]["sha256"]:
            if name in whole:
                yield Problem(name, "its bytes are not those that were committed", again.format(file=name))
        elif json.loads(canonical_json(part.to_dict())) != committed[name]:
            yield Problem(file, f"it does not say what {name} says", REBUILD)


def check_statistics(cache: Cache, parts: Sequence[Standing]) -> Iterator[Problem]:
    """stats.json and README.md, against what they are made from."""
    made = stats.summary([stats.part_of(part.to_dict()) for part in parts])
    data = cache.folder.read_if_there(stats.NAME)
    if data is None:
        yield Problem(stats.NAME, "it is not there: no run has come to its end", REWRITE)
        return
    if data != stats.as_bytes(made):
        yield Problem(stats.NAME, "it is not what the records say together", REWRITE)
    card = cache.folder.read_if_there(report.NAME)
    versions = {_json(data).get("versions", {}).get("latentmill", "") for data in cache.folder.read_all(runs.FOLDER)}
    if card not in [report.card(cache, made, version) for version in versions]:
        yield Problem(report.NAME, "it is not the card of this cache", REWRITE)


def check_runs(folder: Folder) -> Iterator[Problem]:
    """The records of runs: informative, but not to be changed either."""
    for name in folder.names(runs.FOLDER):
        data = folder.read(f"{runs.FOLDER}/{name}")
        content = _json(data)
        if not content or data != runs.as_bytes(content):
            yield Problem(f"{runs.FOLDER}/{name}", "it was changed after it was written", "nothing: it informs only")


def rebuild(cache: Cache, found: Found) -> list[str]:
    """Write `_commits` and `_rejects` again of the units where the parts are sound. Returns the units' names."""
    for name in found.rebuildable:
        parts = [part for part in found.parts if part.record.unit == name and not part.record.round]
        commit.rebuild(cache.folder, found.units[name], sorted(parts, key=lambda part: part.record.part))
    return found.rebuildable


def _json(data: bytes) -> dict[str, Any]:
    """An object; an empty one for what is none."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
