"""Divide input files into units. One task reads one unit."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType

from pipeline.canonical_json import canonical_json
from pipeline.readers.manifest import ROWS_PER_UNIT
from pipeline.readers.tar_boundaries import pack_ranges
from pipeline.readers.tar_group import SMALL_TAR_BYTES
from pipeline.records import (
    IMAGE_EXTENSIONS,
    SHARD_ENDINGS,
    TAR_GROUP,
    TEXT_EXTENSIONS,
    ListedFile,
    Unit,
    extension,
    get_shard_kind,
    get_shard_stem,
    is_image,
    source_name,
    stem,
)
from pipeline.sources.large_tars import Boundaries
from pipeline.sources.sidecars import (
    NO_METADATA,
    MetadataIndex,
    SidecarIndex,
    collect_image_files,
    match_sidecars,
    pin_files,
)
from pipeline.text import printable

UNIT_BYTES = 1 << 30  # of images: about as many as a usual tar has
# Each image of a folder is a request of its own, so larger units would hardly save any, and small folders would occupy
# fewer workers.
IMAGES_PER_UNIT = 256
# of a group of small tars: about as many images as a unit of a folder has
TARS_PER_GROUP = 64
GROUP_BYTES = 32 << 20
_NAMED = 4  # files in a note
RANGE_BYTES = {"parquet": 128 << 20, "zip": UNIT_BYTES}  # approximate size of a range of a file
SHARD_KINDS = tuple(dict.fromkeys(SHARD_ENDINGS.values()))
TABLE_LOG_FOLDERS = frozenset({"_delta_log", "_change_data", "_temporary"})


def make_unit_name(name: str, identity: object) -> str:
    """Return a file-name-safe stem, a dash, and 16 hex digits of the sha256 of `identity` as canonical JSON."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:64] or "unit"
    return f"{safe}-{hashlib.sha256(canonical_json(identity)).hexdigest()[:16]}"


def make_units(
    files: Sequence[ListedFile],
    sidecars: SidecarIndex | None = None,
    boundaries: Boundaries = MappingProxyType({}),
    tar_groups: Sequence[Sequence[ListedFile]] = (),
) -> list[Unit]:
    """Return the units of these files: of groups of tars, of each kind of shard, of manifests, then of images.

    Each kind is in the order of the paths.

    Other files are skipped. A Parquet file beside a tar with the same name is img2dataset's metadata and not a unit. A
    file of `is_table_log` or `is_result_cache` is not a unit either.
    sidecars: the texts and metadata, if they are already known or include more than captions. boundaries: of the tars
    that are divided (`sources.large_tars`). tar_groups: of `group_small_tars`.
    """
    sidecars = sidecars or match_sidecars(files, TEXT_EXTENSIONS)
    files = select_inputs(files)
    tables = sidecars.metadata
    grouped = {file.path for group in tar_groups for file in group}
    files = [file for file in files if file.path not in grouped] if grouped else files
    shards = [
        unit
        for kind in SHARD_KINDS
        for file in files
        for unit in make_shard_units(file, kind, tables, boundaries.get(file.path, ()))
    ]
    manifests = [unit for file in files for unit in make_manifest_units(file)]
    images = [file for file in files if is_image(file.path)]
    by_root = itertools.groupby(sorted(images, key=lambda s: (s.root, stem(s.path), s.path)), key=lambda s: s.root)
    groups = [group for _, below in by_root for group in group_images(list(below))]
    small_tars = [make_unit_of_files(TAR_GROUP, group, sidecars) for group in tar_groups]
    return small_tars + shards + manifests + [make_unit_of_files("folder", group, sidecars) for group in groups]


def is_table_log(file: ListedFile) -> bool:
    """Whether a Parquet file is internal to Delta Lake or Spark: logs, changes, and uncommitted rows."""
    return get_shard_kind(file.path) == "parquet" and not TABLE_LOG_FOLDERS.isdisjoint(file.path.split("/")[1:-1])


def is_result_cache(file: ListedFile) -> bool:
    """Whether an Arrow file is one in which Hugging Face `datasets` keeps the result of a transform."""
    return get_shard_kind(file.path) == "arrow" and PurePosixPath(file.path).name.startswith("cache-")


def describe_special_shards(files: Sequence[ListedFile]) -> list[str]:
    """Return a line for each kind of shard that is passed over, and for shards that may be copies of one another."""
    lines = []
    kinds = [get_shard_kind(file.path) for file in files]
    if "parquet" in kinds and (count := sum(map(is_table_log, files))):
        lines.append(f"passed over {count} Parquet files of Delta Lake's and Spark's own, in _delta_log and the like")
    if "arrow" in kinds and (count := sum(map(is_result_cache, files))):
        lines.append(f"passed over {count} Arrow files with results of transforms of datasets (cache-*.arrow)")
    archives = [file.path for file, kind in zip(files, kinds, strict=True) if kind in ("tar", "zip")]
    extensions = {path[len(get_shard_stem(path)) :] for path in archives}
    counts = Counter(map(get_shard_stem, archives if len(extensions) > 1 else ()))
    if twins := [path for path in archives if counts[get_shard_stem(path)] > 1]:
        names = ", ".join(map(printable, sorted(twins)[:_NAMED])) + (" ..." if len(twins) > _NAMED else "")
        lines.append(
            f"archives that differ only in their extension, and are all encoded: {len(twins)} ({names}); if one is a "
            "compressed copy of the other, --exclude one of them"
        )
    return lines


def select_inputs(files: Sequence[ListedFile]) -> list[ListedFile]:
    """Return the files that units are made of."""
    kinds = {get_shard_kind(file.path) for file in files}
    tars = files if "parquet" in kinds else ()  # a set of a million names takes 150 MB
    tar_stems = {get_shard_stem(file.path) for file in tars if get_shard_kind(file.path) == "tar"}

    def is_input(file: ListedFile) -> bool:
        kind = get_shard_kind(file.path)
        if kind == "parquet":
            return get_shard_stem(file.path) not in tar_stems and not is_table_log(file)
        return (bool(kind) and not is_result_cache(file)) or is_image(file.path) or file.manifest is not None

    return [file for file in files if is_input(file)]


def group_inputs(files: Sequence[ListedFile]) -> dict[str, list[ListedFile]]:
    """Return the files that units are made of, by the kind of their units. Kinds without files are left out."""
    groups: dict[str, list[ListedFile]] = {}
    for file in select_inputs(files):
        kind = get_shard_kind(file.path) if file.manifest is None else "manifest"
        groups.setdefault(kind or "folder", []).append(file)
    return groups


def count_other_files(files: Sequence[ListedFile], texts: Iterable[str] = TEXT_EXTENSIONS) -> Counter[str]:
    """Count the files that are not used, by extension. Files that may belong to an image or a tar do not count.

    texts: extensions of the files beside an image that are copied.
    """
    known = {*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, *texts}
    others = (file.path for file in files if file.manifest is None and not get_shard_kind(file.path))
    return Counter(printable(extension(path)) for path in others if extension(path) not in known)


def derive_unit_name(unit: Unit) -> str:
    """Return the name that follows from the inputs of a unit."""
    if unit.paths:
        return make_unit_name(unit.path, list(unit.paths))
    return make_unit_name(PurePosixPath(unit.path).stem, [unit.path, list(unit.range) if unit.range else None])


def make_shard_units(
    file: ListedFile, kind: str, metadata: MetadataIndex = NO_METADATA, boundaries: Sequence[int] = ()
) -> list[Unit]:
    """Return the units of a file of this kind; none if it is of another kind, or a manifest.

    A tar is one unit, or one per range of its bytes if it has boundaries. Zips and Parquet files have one unit per
    range k of n. n follows from the file's size alone.
    metadata: the tables with further columns of tars and zips.
    """
    if get_shard_kind(file.path) != kind or file.manifest is not None:
        return []
    name = stem(file.path).rpartition("/")[2]
    byte_ranges = pack_ranges(boundaries)
    if kind in RANGE_BYTES:
        byte_ranges = [""] * max(1, math.ceil(file.bytes / RANGE_BYTES[kind]))
    is_divided = bool(boundaries) or kind in RANGE_BYTES
    ranges = [(k, len(byte_ranges)) if is_divided else None for k in range(len(byte_ranges))]
    return [
        Unit(
            name=make_unit_name(name, [file.path, list(file_range) if file_range else None]),
            kind=kind,
            path=file.path,
            range=file_range,
            bytes=file.bytes,
            etag=file.etag,
            files=byte_range,
            root=file.root,
            metadata=metadata.pin([file.path]) if kind in ("tar", "zip") else "",
        )
        for file_range, byte_range in zip(ranges, byte_ranges, strict=True)
    ]


def make_manifest_units(file: ListedFile) -> list[Unit]:
    """Return one unit per range of rows of a manifest; none if the file is not a manifest."""
    if file.manifest is None:
        return []
    count = max(1, math.ceil(file.manifest.rows / ROWS_PER_UNIT))
    return [
        Unit(
            name=make_unit_name(PurePosixPath(file.path).stem, [file.path, [k, count]]),
            kind="manifest",
            path=file.path,
            range=(k, count),
            bytes=file.bytes,
            etag=file.etag,
            files=file.manifest.image_root,
            root=file.root,
        )
        for k in range(count)
    ]


def group_images(images: list[ListedFile]) -> Iterator[list[ListedFile]]:
    """Yield groups of up to 256 images and 1 GiB, in order. Images that differ only in their extension stay together.

    An image of more bytes is a group of its own.
    """
    group: list[ListedFile] = []
    size = 0
    for _, twins in itertools.groupby(images, key=lambda file: stem(file.path)):
        same = list(twins)
        more = sum(file.bytes for file in same)
        if group and (len(group) + len(same) > IMAGES_PER_UNIT or size + more > UNIT_BYTES):
            yield group
            group, size = [], 0
        group += same
        size += more
    if group:
        yield group


def group_small_tars(files: Iterable[ListedFile], metadata: MetadataIndex) -> Iterator[list[ListedFile]]:
    """Yield groups of small tars of one source with the same metadata, in the order of the paths.

    A group has 64 tars, or as many as have 32 MiB. The tars that are left over, which do not fill a group, are in none:
    so a few tars are shared by many workers, and a group never changes if tars are added.
    """
    tars = (file for file in files if get_shard_kind(file.path) == "tar" and file.manifest is None)
    small = (file for file in tars if file.bytes <= SMALL_TAR_BYTES)
    for _, alike in itertools.groupby(small, key=lambda file: (file.root, metadata.pin([file.path]))):
        group: list[ListedFile] = []
        size = 0
        for file in alike:
            if size + file.bytes > GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(file)
            size += file.bytes
            if len(group) == TARS_PER_GROUP:
                yield group
                group, size = [], 0


def make_unit_of_files(kind: str, files: Sequence[ListedFile], sidecars: SidecarIndex) -> Unit:
    """Return the unit of these images (`folder`) or tars (`tars`). sidecars: their texts and metadata."""
    root, paths = files[0].root, tuple(file.path for file in files)
    source = source_name(paths[0])
    return Unit(
        name=make_unit_name(source, list(paths)),
        kind=kind,
        path=source,
        paths=paths,
        root=root,
        metadata=sidecars.metadata.pin(paths),
        **pin_files([collect_image_files(file, sidecars.texts) for file in files]),
    )
