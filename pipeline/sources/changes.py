"""Find planned files that are missing or have changed."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.readers.image_files import is_same_file, unpack_files, unpack_metadata
from pipeline.records import ListedFile, PlannedFile, Unit
from pipeline.sources.listing import Source, is_covered
from pipeline.sources.planned_files import list_input_files
from pipeline.sources.sidecars import NO_METADATA, SidecarIndex, collect_image_files


def find_changed(
    planned: Iterable[Unit], listed: Mapping[str, ListedFile], sidecars: SidecarIndex, same_source: bool
) -> dict[str, tuple[str, ...]]:
    """Return the paths of changed files by unit: inputs and the texts beside images. Missing inputs do not count.

    listed: the listed files, by path. same_source: as for `is_same_file`.
    """
    changed: dict[str, tuple[str, ...]] = {}
    for unit in planned:
        if paths := tuple(_find_changed_files(unit, listed, sidecars, same_source)):
            changed[unit.name] = paths
    return changed


def _find_changed_files(
    unit: Unit, listed: Mapping[str, ListedFile], sidecars: SidecarIndex, same_source: bool
) -> Iterator[str]:
    """Yield the paths of a unit's changed files."""
    if unit.paths:
        for files in unpack_files(unit):
            if files.image.path in listed and files.image.path not in unit.left_out:
                current = collect_image_files(listed[files.image.path], sidecars.texts)
                yield from _find_differences((files.image, *files.texts), (current.image, *current.texts), same_source)
    elif unit.path in listed and not is_same_file(unit, listed[unit.path], same_source):
        yield unit.path
    if not unit.metadata and sidecars.metadata == NO_METADATA:
        return
    if inputs := [file.path for file in list_input_files(unit) if file.path in listed]:
        now = replace(unit, metadata=sidecars.metadata.pin(inputs))
        yield from _find_differences(unpack_metadata(unit), unpack_metadata(now), same_source)


def _find_differences(before: Iterable[PlannedFile], now: Iterable[PlannedFile], same_source: bool) -> Iterator[str]:
    """Yield the paths of files that were edited, added or removed."""
    earlier, later = ({file.path: file for file in files} for files in (before, now))
    for path in sorted(earlier.keys() | later.keys()):
        if path not in earlier or path not in later or not is_same_file(earlier[path], later[path], same_source):
            yield path


def find_missing(paths: Iterable[str], listed: Collection[str], sources: Sequence[Source]) -> list[str]:
    """Return the planned paths that the sources cover but do not list. Paths of other sources do not count."""
    return [path for path in paths if path not in listed and is_covered(path, sources)]
