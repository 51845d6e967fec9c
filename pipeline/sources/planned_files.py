"""The files and sources of planned units."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from pipeline.readers.image_files import ImageFiles, unpack_files, unpack_metadata
from pipeline.records import TAR_GROUP, ListedFile, PinnedFile, PlannedFile, Unit, join_url, path_below_root
from pipeline.sources.sidecars import pack_metadata, pin_files
from pipeline.storage.reading import fetch_file_version

_THREADS = 8  # that ask for the versions of files, because stores are slow to answer


def list_input_files(unit: Unit) -> Sequence[PinnedFile]:
    """Return the planned files of a unit, without the texts beside images."""
    if not unit.paths:
        return (unit,)
    return [files.image for files in unpack_files(unit)]


def estimate_bytes_per_image(units: Iterable[Unit]) -> float:
    """Return the average size of the images in the units of folders; 0 if there are none.

    Only these units name their images before they are read.
    """
    folders = [unit for unit in units if unit.kind == "folder"]
    images = sum(len(unit.paths) for unit in folders)
    return sum(unit.bytes for unit in folders) / images if images else 0.0


def find_source_roots(units: Iterable[Unit]) -> dict[str, str]:
    """Return the root of each source by its name. The root in the last unit of a source counts."""
    return {unit.source_name: unit.root for unit in units}


def move_to_root(unit: Unit, root: str) -> Unit:
    """Return the unit with another root of its source."""
    return unit if unit.root == root else replace(unit, root=root)


def mark_left_out(units: Sequence[Unit]) -> list[Unit]:
    """Return the units of a plan. Groups of tars name those of their tars that are units of their own."""
    if not any(unit.kind == TAR_GROUP for unit in units):
        return list(units)
    tars = frozenset(unit.path for unit in units if unit.kind == "tar")
    return [
        replace(unit, left_out=left_out)
        if unit.kind == TAR_GROUP and (left_out := tars.intersection(unit.paths))
        else unit
        for unit in units
    ]


def fetch_current_version(unit: Unit, options: Mapping[str, Any]) -> Unit:
    """Return the unit with the size and ETag that its input has now. Images of a folder are not pinned by a unit.

    Of a group, the tars that are not left out are looked up. Raises StorageError if one of them is missing.
    """

    def fetch(path: str) -> tuple[int, str]:
        return fetch_file_version(join_url(unit.root, path_below_root(path)), options)

    if unit.kind == "folder":
        return unit
    if not unit.paths:
        size, etag = fetch(unit.path)
        return replace(unit, bytes=size, etag=etag)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch-versions") as pool:
        paths = [path for path in unit.paths if path not in unit.left_out]
        versions = dict(zip(paths, pool.map(fetch, paths), strict=True))
    return _map_files(
        unit, lambda file: PlannedFile(file.path, *versions[file.path]) if file.path in versions else file
    )


def with_etags(unit: Unit, listed: Mapping[str, ListedFile]) -> Unit:
    """Return the unit with the listed ETags of its files. A file whose size has changed keeps the planned ETag."""

    def update(file: PlannedFile) -> PlannedFile:
        listed_file = listed.get(file.path)
        return replace(file, etag=listed_file.etag) if listed_file and listed_file.bytes == file.bytes else file

    return _map_files(unit, update)


def without_etags(unit: Unit) -> Unit:
    """Return the unit without ETags, so that only the sizes of its files are checked."""
    return _map_files(unit, lambda file: replace(file, etag=""))


def _map_files(unit: Unit, change: Callable[[PlannedFile], PlannedFile]) -> Unit:
    """Return the unit with changed files."""
    if unit.metadata:
        unit = replace(unit, metadata=pack_metadata(map(change, unpack_metadata(unit))))
    if not unit.paths:
        return replace(unit, etag=change(PlannedFile(unit.path, unit.bytes, unit.etag)).etag)
    files = [ImageFiles(change(planned.image), tuple(map(change, planned.texts))) for planned in unpack_files(unit)]
    return replace(unit, **pin_files(files))
