"""The plan of a cache: the units of all inputs, in the append-only files `_plan/NNNNN.parquet`.

A run lists the sources, and creates one more file if some inputs are not planned yet. If two runs do so at the same
time, one of them creates the file, and the other reads the plan again. The rows of a later file supersede those of
earlier files for the same input.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.cache import commits
from pipeline.cache.plan_files import (
    FOLDER,
    SCHEMA,
    PlannedSizes,
    append_plan_file,
    hash_plan_files,
    identify_input,
    list_plan_files,
    read_plan,
    read_plan_files,
    read_unit_sizes,
    select_latest_units,
    write_plan_file,
)
from pipeline.errors import SourceError
from pipeline.readers.image_files import unpack_files
from pipeline.records import (
    TAR_GROUP,
    TEXT_EXTENSIONS,
    ListedFile,
    PinnedFile,
    Unit,
    get_shard_kind,
    get_shard_stem,
    is_image,
    source_name,
    stem,
)
from pipeline.sources.changes import find_changed, find_missing
from pipeline.sources.duplicates import find_duplicates
from pipeline.sources.garbage import without_garbage_search
from pipeline.sources.large_tars import Divide, leave_whole
from pipeline.sources.listing import Source, abbreviate
from pipeline.sources.planned_files import find_source_roots, list_input_files, with_etags
from pipeline.sources.relocation import relocate_units
from pipeline.sources.renames import check_renamed
from pipeline.sources.sidecars import (
    NO_METADATA,
    MetadataIndex,
    SidecarIndex,
    collect_image_files,
    match_sidecars,
    pin_files,
)
from pipeline.sources.units import group_small_tars, make_manifest_units, make_shard_units, make_units, select_inputs
from pipeline.storage.folder import Folder

__all__ = [
    "FOLDER",
    "SCHEMA",
    "PlannedSizes",
    "extend_plan",
    "hash_plan_files",
    "list_plan_files",
    "read_plan",
    "read_plan_files",
    "read_unit_sizes",
    "select_latest_units",
    "write_plan_file",
]

# Notes about changed inputs, by the state of their units.
CHANGE_NOTES = {
    "finished": "the cache still holds the old version; to encode the new version, use another --to",
    "retried": "`latentmill retry` has encoded rejected samples of them, as they were at that time. `latentmill verify "
    "--recount` finds later changes; to encode these, use another --to",
    "replanned": "none of their samples are encoded yet, and they are planned again",
    "started": "they are partly encoded. The rest of a tar or Parquet file is encoded if its samples are unchanged. "
    "If a unit fails: restore its input, or move away the unit's files in data/, _empty/, _commits/ and _rejects/, and "
    "run this command again",
}


@without_garbage_search()
def extend_plan(
    cache: Folder,
    files: Sequence[ListedFile],
    sources: Sequence[Source] = (),
    new_source: bool = False,
    same_source: bool = False,
    texts: Collection[str] = TEXT_EXTENSIONS,
    metadata: MetadataIndex = NO_METADATA,
    divide: Divide = leave_whole,
    group_tars: bool = False,
) -> tuple[list[Unit], list[str]]:
    """Plan the inputs that are not planned yet. Returns all units, and notes, one line for each kind of finding.

    sources: the sources that list the files. new_source: treat them as new, even if they resemble planned files.
    same_source: treat a file with a planned path and size as unchanged, whatever its ETag.
    texts: the extensions of the text files beside an image that are passed through. metadata: the tables beside them.
    divide: returns the boundaries of tars that are to be planned. group_tars: make groups of small tars.
    Raises SourceError if there is nothing to plan, or if the sources are not the planned ones.
    """
    sidecars = replace(match_sidecars(files, texts), metadata=metadata)
    while True:
        names = list_plan_files(cache)
        planned = read_plan_files(cache, names)
        new, units, notes = compare_with_plan(
            cache, files, sidecars, planned, sources, new_source, same_source, divide, group_tars
        )
        if not new:
            if not planned:
                raise SourceError("the source is empty: it has no tars, zips, Parquet or Arrow files, or images")
            return units, notes
        if append_plan_file(cache, names, new):
            return select_latest_units([units, new] if units else [new]), notes


def compare_with_plan(
    cache: Folder,
    listed_files: Sequence[ListedFile],
    sidecars: SidecarIndex,
    planned: Sequence[Unit],
    sources: Sequence[Source],
    new_source: bool,
    same_source: bool,
    divide: Divide,
    group_tars: bool,
) -> tuple[list[Unit], list[Unit], list[str]]:
    """Compare the sources with the plan. Returns the units to add, the planned units as they are now, and notes."""
    listed = sidecars.metadata.files
    listed.update((file.path, file) for file in listed_files)
    if not sources:
        roots = {(source_name(file.path), file.root): None for file in listed_files}
        sources = [Source(name, root, root, ()) for name, root in roots]
    before = planned
    planned, notes = relocate_units(planned, listed, sources, same_source)
    files = {file.path: file for unit in planned for file in list_input_files(unit)}
    replanned, more = replan_changed(cache, planned, listed, sidecars, same_source, divide)
    notes += more
    if sidecars.unused:
        unused = "texts that belong to no image or to several images, or that another text replaces"
        notes.append(f"{unused}: {len(sidecars.unused):,} ({abbreviate(sidecars.unused)})")
    if missing := find_missing(files, listed, sources):
        examples = f"{len(missing):,} ({abbreviate(missing)})"
        notes.append(f"planned inputs that are missing: {examples}; their encoded samples stay in the cache")
    if same_source:
        inputs = {identify_input(unit) for unit in replanned}
        pairs = zip((with_etags(unit, listed) for unit in planned), before, strict=True)
        replanned += [unit for unit, old in pairs if unit != old and identify_input(unit) not in inputs]
    changed = {identify_input(unit) for unit in replanned}
    replanned += [unit for unit in _move_image_roots(planned, listed) if unit.path not in changed]
    new, more = find_unplanned(listed_files, planned, files)
    notes += more
    inputs_to_add = select_inputs(new)
    duplicates: dict[str, str] = {}
    if inputs_to_add:
        duplicates = find_duplicates(inputs_to_add, listed, files, find_source_roots(planned))
    if inputs_to_add and not new_source:
        names, missing_paths = {source.name for source in sources}, set(missing)
        not_listed = {
            path: file
            for path, file in files.items()
            if path in missing_paths or (path not in listed and source_name(path) not in names)
        }
        names_listed = {source_name(path) for path in files if path in listed}
        notes += check_renamed(inputs_to_add, not_listed, duplicates, names_listed)
    if duplicates:
        examples = abbreviate([f"{path} is {other}" for path, other in duplicates.items()])
        notes.append(f"files that are in two sources, and are read once: {len(duplicates):,} ({examples})")
    inputs_to_add = [file for file in inputs_to_add if file.path not in duplicates]
    groups = list(group_small_tars(inputs_to_add, sidecars.metadata)) if group_tars else []
    added = make_units(inputs_to_add, sidecars, divide(inputs_to_add), groups)
    return replanned + added, planned, notes


def _move_image_roots(planned: Sequence[Unit], listed: Mapping[str, ListedFile]) -> Iterator[Unit]:
    """Yield the units of manifests whose images are in another folder now (`--image-root`), with this folder."""
    for unit in planned:
        manifest = listed[unit.path].manifest if unit.kind == "manifest" and unit.path in listed else None
        if manifest and manifest.image_root and manifest.image_root != unit.files:
            yield replace(unit, files=manifest.image_root)


def replan_changed(
    cache: Folder,
    planned: Sequence[Unit],
    listed: Mapping[str, ListedFile],
    sidecars: SidecarIndex,
    same_source: bool,
    divide: Divide,
) -> tuple[list[Unit], list[str]]:
    """Return new units for changed inputs without encoded samples, and notes about all changed inputs.

    listed: the listed files, by path.
    """
    changed = find_changed(planned, listed, sidecars, same_source)
    if not changed:
        return [], []
    started, finished = commits.list_started_units(cache), commits.list_finished_units(cache)
    started_inputs = {identify_input(unit) for unit in planned if unit.name in started}
    replanned = {
        identify_input(unit): unit
        for unit in planned
        if unit.name in changed and identify_input(unit) not in started_inputs
    }
    retried = find_retried(cache, planned, changed, sidecars)
    paths_by_state: dict[str, set[str]] = {state: set() for state in ("finished", "retried", "replanned", "started")}
    for unit in planned:
        is_replanned = identify_input(unit) in replanned
        state = "replanned" if is_replanned else "finished" if unit.name in finished else "started"
        for path in changed.get(unit.name, ()):
            paths_by_state["retried" if state == "finished" and path in retried else state].add(path)
    notes = [
        f"inputs that have changed since they were planned: {len(paths):,} ({abbreviate(paths)}); {CHANGE_NOTES[state]}"
        for state, paths in paths_by_state.items()
        if paths
    ]
    return [new for unit in replanned.values() for new in replan_unit(unit, listed, sidecars, divide)], notes


def find_retried(
    cache: Folder,
    planned: Sequence[Unit],
    changed: Mapping[str, Collection[str]],
    sidecars: SidecarIndex,
) -> set[str]:
    """Return the files of changed units of which a retry encoded samples. changed: the paths of files by unit."""
    retries = commits.list_retries(cache)
    retried: set[str] = set()
    for unit in planned:
        if unit.name not in changed or unit.name not in retries:
            continue
        positions = {position for position, _ in commits.read_superseded_rejects(cache, retries[unit.name])}
        if positions and unit.kind == TAR_GROUP:
            retried.update(changed[unit.name])
        elif positions and unit.kind == "folder":
            images = {unit.paths[position] for position in positions if position < len(unit.paths)}
            texts = (text.path for image in images for text in sidecars.texts.get(image, ()))
            retried |= images.union(texts)
        elif positions:
            retried.add(unit.path)
    return retried


def replan_unit(unit: Unit, listed: Mapping[str, ListedFile], sidecars: SidecarIndex, divide: Divide) -> list[Unit]:
    """Return the units of a unit's input as it is now.

    A folder unit keeps its images, and a group its tars. Those that are missing now stay as they were planned. A
    manifest keeps the folder of its images unless another one is given.
    """
    if unit.kind == "manifest":
        return [replace(new, files=new.files or unit.files) for new in make_manifest_units(listed[unit.path])]
    if not unit.paths:
        file = listed[unit.path]
        return make_shard_units(file, unit.kind, sidecars.metadata, divide([file]).get(file.path, ()))
    current = [
        collect_image_files(listed[planned.image.path], sidecars.texts) if planned.image.path in listed else planned
        for planned in unpack_files(unit)
    ]
    tables = sidecars.metadata.pin(path for path in unit.paths if path in listed)
    return [replace(unit, metadata=tables, **pin_files(current))]


def find_unplanned(
    listed_files: Sequence[ListedFile], planned: Sequence[Unit], files: Mapping[str, PinnedFile]
) -> tuple[list[ListedFile], list[str]]:
    """Return the files that are not planned yet, and a note about images that cannot be added.

    files: all planned files, by path.
    """
    unplanned = [file for file in listed_files if file.path not in files]
    stems: set[str] = set()
    tars: set[str] = set()
    if any(is_image(file.path) for file in unplanned):
        stems = {stem(path) for unit in planned if unit.kind == "folder" for path in unit.paths}
    if any(get_shard_kind(file.path) == "parquet" for file in unplanned):
        tars = {get_shard_stem(path) for path in files if get_shard_kind(path) == "tar"}
    new: list[ListedFile] = []
    namesakes: list[str] = []
    for file in unplanned:
        if is_image(file.path) and stem(file.path) in stems:
            namesakes.append(file.path)
        elif get_shard_kind(file.path) != "parquet" or get_shard_stem(file.path) not in tars:
            new.append(file)
    if not namesakes:
        return new, []
    skipped = f"images that are skipped: {len(namesakes):,} ({abbreviate(namesakes)})"
    return new, [f"{skipped}; the cache has another image with the same name: rename them"]
