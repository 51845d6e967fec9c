"""Move planned units to the current roots of their sources.

A source is identified by its name, so its root may change. A moved source is accepted only if it holds the planned
files.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.errors import SourceError
from pipeline.readers.image_files import is_same_file
from pipeline.records import ListedFile, PinnedFile, Unit, source_name
from pipeline.sources.listing import Listing, Source, abbreviate, find_free_name, format_argument, is_covered, same_root
from pipeline.sources.planned_files import find_source_roots, list_input_files, move_to_root, without_etags
from pipeline.sources.renames import check_renamed


def relocate_units(
    planned: Sequence[Unit],
    listed: Mapping[str, ListedFile],
    sources: Sequence[Source],
    same_source: bool = False,
    require_all: bool = True,
) -> tuple[list[Unit], list[str]]:
    """Return the planned units at the current roots of their sources, and a note for each source that has moved.

    listed: the listed files, by path. same_source: match files by path and size, without their ETags.
    require_all: refuse a moved source that lacks a planned file which its arguments cover.
    Raises SourceError if a source with a planned name holds other files.
    """
    roots, notes = find_source_roots(planned), []
    moved: dict[str, str] = {}
    for source in sources:
        if source.name in roots and source.name not in moved and not same_root(roots[source.name], source.root):
            moved[source.name] = source.root
            notes.append(f"the source {source.name} has moved from {roots[source.name]} to {source.root}")
    if not moved:
        return list(planned), []
    files: dict[str, list[PinnedFile]] = defaultdict(list)
    for unit in planned:
        if unit.source_name in moved:
            files[unit.source_name] += list_input_files(unit)
    for name in moved:
        named = [source for source in sources if source.name == name]
        if not _is_planned_source(files[name], listed, named if require_all else [], same_source):
            _refuse_source(files[name], listed, named[0], roots, same_source)
    return [
        move_to_root(unit, moved[unit.source_name]) if unit.source_name in moved else unit for unit in planned
    ], notes


def relocate_listed_units(planned: Sequence[Unit], listing: Listing, same_source: bool) -> list[Unit]:
    """Return the planned units. Units with a listed file move to the listed root; all others stay as planned.

    same_source: remove the ETags of units with a listed file, so that only sizes are checked when they are read.
    Raises SourceError if no planned file is listed, or if a source with a planned name holds other files.
    """
    listed = {file.path: file for file in listing.files}
    if not any(_has_listed_file(unit, listed) for unit in planned):
        missing = {file.path: file for unit in planned for file in list_input_files(unit)}
        check_renamed(listing.files, missing, offer_new_source=False)
        arguments = " ".join(source.argument for source in listing.sources)
        raise SourceError(f"none of the cache's inputs is at {arguments}")
    relocated, _ = relocate_units(planned, listed, listing.sources, same_source, require_all=False)
    units = []
    for before, unit in zip(planned, relocated, strict=True):
        if not _has_listed_file(unit, listed):
            units.append(before)
        else:
            units.append(without_etags(unit) if same_source else unit)
    return units


def _has_listed_file(unit: Unit, listed: Mapping[str, ListedFile]) -> bool:
    """Whether at least one input file of a unit is listed."""
    return any(file.path in listed for file in list_input_files(unit))


def _is_planned_source(
    files: Sequence[PinnedFile], listed: Mapping[str, ListedFile], sources: Sequence[Source], same_source: bool
) -> bool:
    """Whether a moved source holds the planned files.

    files: the planned files of the source. sources: the arguments that must list every file which they cover.
    All listed files must be unchanged, and an equal ETag must prove at least one of them. With `same_source`, half of
    the listed files must have the planned size.
    """
    found = [file for file in files if file.path in listed]
    unchanged = [file for file in found if is_same_file(file, listed[file.path], same_source)]
    if same_source:
        return bool(unchanged) and 2 * len(unchanged) >= len(found)
    is_proven = any(file.etag and listed[file.path].etag for file in unchanged)
    is_complete = not any(is_covered(file.path, sources) for file in files if file.path not in listed)
    return is_proven and len(unchanged) == len(found) and is_complete


def _refuse_source(
    files: Sequence[PinnedFile],
    listed: Mapping[str, ListedFile],
    source: Source,
    roots: Mapping[str, str],
    same_source: bool,
) -> None:
    """Raise SourceError for a source that has a planned name but holds other files."""
    differing = [f.path for f in files if f.path not in listed or not is_same_file(f, listed[f.path], same_source)]
    if differing:
        reason = f"{len(differing):,} of {len(files):,} planned files are missing or differ ({abbreviate(differing)})"
    else:
        reason = "the files have the planned sizes, but no ETag or time proves that they are the planned ones"
    name = find_free_name(source.name, {*roots, *map(source_name, listed)})
    advice = f"If it is another source, give it a name: {format_argument(name, source.argument)}"
    if not same_source:
        advice += "; if it is the same source, moved or copied without its files' times, use --same-source"
    raise SourceError(
        f"the source {source.name} of this cache is {roots[source.name]}, and {source.root} holds other files: "
        f"{reason}. {advice}"
    )
