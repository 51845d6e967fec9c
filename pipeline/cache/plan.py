"""From shards to units, and the plan of a cache: `_plan/NNNNN.parquet`, append-only.

A run lists the sources, subtracts what is planned and creates a further file if anything is left; of two runs that
do so at once one wins, and the other reads again. A later file supersedes what earlier ones say of an input.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import commits
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError, SourceError
from pipeline.readers.sidecars import SidecarIndex, files_of, match_sidecars, pin_files, unpack_files
from pipeline.records import TEXT_EXTENSIONS, File, Shard, Unit, extension, is_image, stem
from pipeline.sources import changes
from pipeline.sources.listing import Source, abbreviate
from pipeline.sources.units import make_parquet_units, make_tar_unit, make_units, select_inputs
from pipeline.storage.folder import Folder

FOLDER = "_plan"
SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("kind", pa.string()),
        ("url", pa.string()),
        ("path", pa.string()),
        ("range", pa.list_(pa.int32())),
        ("paths", pa.list_(pa.string())),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("files", pa.string()),
        ("root", pa.string()),
    ]
)


def hash_plan_files(cache: Folder) -> dict[str, str]:
    """The sha256 of each file of the plan. Every run keeps them, so that `verify` can tell a file that has changed."""
    return {name: hashlib.sha256(cache.read(f"{FOLDER}/{name}")).hexdigest() for name in list_plan_files(cache)}


def list_plan_files(cache: Folder) -> list[str]:
    """The files of the plan, in order."""
    return [name for name in cache.names(FOLDER) if re.fullmatch(r"\d{5}\.parquet", name)]


def read_plan(cache: Folder) -> list[Unit]:
    """All planned units, in the order in which they were planned first."""
    return read_plan_files(cache, list_plan_files(cache))


def read_plan_files(cache: Folder, names: Sequence[str]) -> list[Unit]:
    """The units in these files of the plan, as they were planned last, each in its source where that was last."""
    files = [[_unit(row) for row in _rows(cache, f"{FOLDER}/{name}")] for name in names]
    roots = changes.source_roots(itertools.chain.from_iterable(files))
    return [changes.move_to_root(unit, roots[unit.source]) for unit in latest_units(files)]


def latest_units(files: Iterable[Iterable[Unit]]) -> Iterator[Unit]:
    """The units of the plan's files: of those that read the same input, the ones of the last file that has any."""
    latest: dict[str, list[Unit]] = {}
    for units in files:
        here: dict[str, list[Unit]] = {}
        for unit in units:
            here.setdefault(input_of(unit), []).append(unit)
        latest.update(here)
    return (unit for units in latest.values() for unit in units)


def input_of(unit: Unit) -> str:
    """What later rows of the plan supersede: a file by its path, images of a folder by the unit's name."""
    return unit.name if unit.kind == "folder" else unit.path


def _unit(row: Mapping[str, Any]) -> Unit:
    """A row of the plan as a unit."""
    return Unit(
        name=row["unit"],
        kind=row["kind"],
        url=row["url"],
        path=row["path"],
        range=tuple(row["range"]) if row["range"] else None,
        paths=tuple(row["paths"] or ()),
        bytes=row["bytes"],
        etag=row["etag"],
        files=row["files"] or "",
        root=row["root"],
    )


def _rows(cache: Folder, name: str) -> list[dict[str, Any]]:
    data = cache.read(name)
    try:
        # without threads: pyarrow 26's pool, just started, aborts a process that ends at once (2 of 25 with torch)
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        return cast(list[dict[str, Any]], table.cast(SCHEMA).to_pylist())
    except Exception as error:  # Arrow's, of whatever damaged bytes lead it to
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CacheError(f"{cache.at(name)} cannot be read as a plan: {said:.200}; {VERIFY_HINT}") from error


def write_plan_file(cache: Folder, number: int, units: Iterable[Unit]) -> bool:
    """Create the plan's file of this number; False where another run was first."""
    rows = [
        {
            "unit": unit.name,
            "kind": unit.kind,
            "url": unit.url,
            "path": unit.path,
            "range": unit.range,
            "paths": list(unit.paths),
            "bytes": unit.bytes,
            "etag": unit.etag,
            "files": unit.files or None,
            "root": unit.root,
        }
        for unit in units
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return cache.create(f"{FOLDER}/{number:05d}.parquet", sink.getvalue())


def extend_plan(
    cache: Folder,
    shards: Sequence[Shard],
    named: Sequence[Source] = (),
    new_source: bool = False,
    same_source: bool = False,
    texts: Collection[str] = TEXT_EXTENSIONS,
) -> tuple[list[Unit], list[str]]:
    """Plan what is not planned yet. Returns all units, and what was noticed: a line for each kind.

    named: the sources that list the shards. new_source: they are new ones, whatever planned files they resemble.
    same_source: a file of a planned path and size is what was planned, whatever its ETag.
    texts: extensions of the files beside an image that come along.
    Raises SourceError if there is nothing to plan at all, and if the sources are not those that were planned.
    """
    beside = match_sidecars(shards, texts)
    while True:
        names = list_plan_files(cache)
        planned = read_plan_files(cache, names)
        new, units, noticed = compare_with_plan(cache, shards, beside, planned, named, new_source, same_source)
        if not new:
            if not planned:
                raise SourceError("the source is empty: there are no tar shards, Parquet files or images in it")
            return units, noticed
        number = int(names[-1][:5]) + 1 if names else 0
        if write_plan_file(cache, number, new):
            return list(latest_units([units, new])), noticed
        if list_plan_files(cache) == names:
            raise CacheError(f"{cache.at(FOLDER)}/{number:05d}.parquet is no file, but its name is taken; move it away")


def compare_with_plan(
    cache: Folder,
    shards: Sequence[Shard],
    beside: SidecarIndex,
    planned: Sequence[Unit],
    named: Sequence[Source],
    new_source: bool,
    same_source: bool,
) -> tuple[list[Unit], list[Unit], list[str]]:
    """Hold the sources against the plan. Returns the units to be added, the planned ones as they are now, and notes."""
    listed = {shard.path: shard for shard in shards}
    named = named or [Source(name, root, root, ()) for name, root in {_source_of(s): None for s in shards}]
    before = list(planned)
    planned, noticed = changes.relocate_units(planned, listed, named, same_source)
    files = {file.path: file for unit in planned for file in changes.input_files(unit)}
    again, more = replan_changed(cache, planned, listed, beside, same_source)
    noticed += more
    if beside.unused:
        what = "texts that belong to no image, or to several, or in whose place another one counts"
        noticed.append(f"{what}: {len(beside.unused):,} ({abbreviate(beside.unused)})")
    if gone := changes.find_missing(files, listed, named):
        noticed.append(
            f"planned inputs that are gone: {len(gone):,} ({abbreviate(gone)}); what was encoded of them stays"
        )
    if same_source:
        told = {input_of(unit) for unit in again}
        now = [changes.with_etags(unit, listed) for unit in planned]
        again += [unit for unit, old in zip(now, before, strict=True) if unit != old and input_of(unit) not in told]
    new, more = find_unplanned(shards, planned, files)
    noticed += more
    fresh = select_inputs(new)
    twice = changes.find_duplicates(fresh, listed, files, changes.source_roots(planned)) if fresh else {}
    if not new_source:
        names = {source.name for source in named}
        lost = set(gone)
        missing = {
            p: f for p, f in files.items() if p in lost or (p not in listed and changes.source_name(p) not in names)
        }
        still = {changes.source_name(path) for path in files if path in listed}
        noticed += changes.check_renamed(fresh, missing, twice, still)
    if twice:
        pairs = abbreviate([f"{path} is {other}" for path, other in twice.items()])
        noticed.append(f"files that are in two sources, and are read once: {len(twice):,} ({pairs})")
    return again + make_units([shard for shard in fresh if shard.path not in twice], beside), planned, noticed


def _source_of(shard: Shard) -> tuple[str, str]:
    return changes.source_name(shard.path), shard.root


def replan_changed(
    cache: Folder, planned: Sequence[Unit], listed: Mapping[str, Shard], beside: SidecarIndex, same_source: bool
) -> tuple[list[Unit], list[str]]:
    """New units for inputs that have changed and of which nothing is in the cache, and notes of all that have."""
    changed = changes.find_changed(planned, listed, beside, same_source)
    if not changed:
        return [], []
    begun, finished = commits.started_units(cache), commits.finished_units(cache)
    kept = {input_of(unit) for unit in planned if unit.name in begun}
    anew = {input_of(unit): unit for unit in planned if unit.name in changed and input_of(unit) not in kept}
    said: dict[str, set[str]] = {"kept": set(), "anew": set(), "half": set()}
    for unit in planned:
        what = "anew" if input_of(unit) in anew else "kept" if unit.name in finished else "half"
        said[what].update(changed.get(unit.name, ()))
    ends = {
        "kept": "the cache keeps what they were",
        "anew": "nothing of them was encoded yet, and they are planned anew",
        "half": "a part of them is encoded, the rest of a tar or a Parquet file is too if its samples are the same. "
        "If its unit fails: put them back as they were, or move away all that data/, _empty/, _commits/ and "
        "_rejects/ have of their units, and run this again",
    }
    notes = [
        f"inputs that have changed since they were planned: {len(paths):,} ({abbreviate(paths)}); {ends[what]}"
        for what, paths in said.items()
        if paths
    ]
    return [new for unit in anew.values() for new in units_as_listed(unit, listed, beside)], notes


def units_as_listed(unit: Unit, listed: Mapping[str, Shard], beside: SidecarIndex) -> list[Unit]:
    """What a unit's input gives as it is now. Of a folder: with the same images, those that are gone as they were."""
    if unit.kind == "tar":
        return [make_tar_unit(listed[unit.path])]
    if unit.kind == "parquet":
        return make_parquet_units(listed[unit.path])
    now = [
        files_of(listed[before.image.path], beside.texts) if before.image.path in listed else before
        for before in unpack_files(unit)
    ]
    return [replace(unit, **pin_files(now))]


def find_unplanned(
    shards: Sequence[Shard], planned: Sequence[Unit], files: Mapping[str, File]
) -> tuple[list[Shard], list[str]]:
    """The files that are not planned, and a note of those that must not be. files: all planned ones, by path."""
    tars = {stem(unit.path) for unit in planned if unit.kind == "tar"}
    stems = {stem(path) for unit in planned for path in unit.paths}
    new: list[Shard] = []
    namesakes: list[str] = []
    for shard in shards:
        if shard.path not in files:
            if is_image(shard.path) and stem(shard.path) in stems:
                namesakes.append(shard.path)
            elif extension(shard.path) != "parquet" or stem(shard.path) not in tars:
                new.append(shard)
    if not namesakes:
        return new, []
    left_out = f"images that are left out: {len(namesakes):,} ({abbreviate(namesakes)})"
    return new, [f"{left_out}; the cache has another image of their name: rename them"]
