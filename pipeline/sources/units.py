"""Divide input files into units. One task reads one unit."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from pipeline.canonical_json import canonical_json
from pipeline.readers.manifest import ROWS_PER_UNIT
from pipeline.records import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, ListedFile, Unit, extension, is_image, source_name, stem
from pipeline.sources.sidecars import (
    NO_METADATA,
    MetadataIndex,
    SidecarIndex,
    collect_image_files,
    match_sidecars,
    pin_files,
)
from pipeline.text import printable

IMAGES_PER_UNIT = 256
RANGE_BYTES = 128 << 20  # approximate size of a range of a Parquet file
TABLE_LOG_FOLDERS = frozenset({"_delta_log", "_change_data", "_temporary"})


def make_unit_name(name: str, identity: object) -> str:
    """Return a file-name-safe stem, a dash, and 16 hex digits of the sha256 of `identity` as canonical JSON."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:64] or "unit"
    return f"{safe}-{hashlib.sha256(canonical_json(identity)).hexdigest()[:16]}"


def make_units(files: Sequence[ListedFile], sidecars: SidecarIndex | None = None) -> list[Unit]:
    """Return the units of these files: tars, Parquet files, manifests, images, each in the order of the paths.

    Other files are skipped. A Parquet file beside a tar with the same name is img2dataset's metadata and not a unit. A
    file of `is_table_log` is not a unit either.
    sidecars: the texts and metadata, if they are already known or include more than captions.
    """
    sidecars = sidecars or match_sidecars(files, TEXT_EXTENSIONS)
    files = select_inputs(files)
    tars = [make_tar_unit(file, sidecars.metadata) for file in files if extension(file.path) == "tar"]
    manifests = [unit for file in files for unit in make_manifest_units(file)]
    parquets = [file for file in files if extension(file.path) == "parquet" and file.manifest is None]
    ranges = [unit for file in parquets for unit in make_parquet_units(file)]
    images = [file for file in files if is_image(file.path)]
    by_root = itertools.groupby(sorted(images, key=lambda s: (s.root, stem(s.path), s.path)), key=lambda s: s.root)
    groups = [group for _, below in by_root for group in group_images(list(below))]
    return tars + ranges + manifests + [make_folder_unit(group, sidecars) for group in groups]


def is_table_log(file: ListedFile) -> bool:
    """Whether a Parquet file is internal to Delta Lake or Spark: logs, changes, and uncommitted rows."""
    return extension(file.path) == "parquet" and not TABLE_LOG_FOLDERS.isdisjoint(file.path.split("/")[1:-1])


def select_inputs(files: Sequence[ListedFile]) -> list[ListedFile]:
    """Return the files that units are made of."""
    tar_stems = {stem(file.path) for file in files if extension(file.path) == "tar"}

    def is_input(file: ListedFile) -> bool:
        kind = extension(file.path)
        if kind == "parquet":
            return stem(file.path) not in tar_stems and not is_table_log(file)
        return kind == "tar" or is_image(file.path) or file.manifest is not None

    return [file for file in files if is_input(file)]


def count_other_files(files: Sequence[ListedFile], texts: Iterable[str] = TEXT_EXTENSIONS) -> Counter[str]:
    """Count the files that are not used, by extension. Files that may belong to an image or a tar do not count.

    texts: extensions of the files beside an image that are copied.
    """
    known = {"tar", "parquet", *IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, *texts}
    others = (file for file in files if file.manifest is None and extension(file.path) not in known)
    return Counter(printable(extension(file.path)) for file in others)


def derive_unit_name(unit: Unit) -> str:
    """Return the name that follows from the inputs of a unit."""
    if unit.kind == "folder":
        return make_unit_name(unit.path, list(unit.paths))
    return make_unit_name(PurePosixPath(unit.path).stem, [unit.path, list(unit.range) if unit.range else None])


def make_tar_unit(file: ListedFile, metadata: MetadataIndex = NO_METADATA) -> Unit:
    """Return the unit of a tar. metadata: the tables with further columns."""
    return Unit(
        name=make_unit_name(PurePosixPath(file.path).stem, [file.path, None]),
        kind="tar",
        url=file.url,
        path=file.path,
        bytes=file.bytes,
        etag=file.etag,
        root=file.root,
        metadata=metadata.pin([file.path]),
    )


def make_parquet_units(file: ListedFile) -> list[Unit]:
    """Return one unit per range k of n of a Parquet file. n follows from the file's size alone."""
    count = max(1, math.ceil(file.bytes / RANGE_BYTES))
    name = PurePosixPath(file.path).stem
    return [
        Unit(
            name=make_unit_name(name, [file.path, [k, count]]),
            kind="parquet",
            url=file.url,
            path=file.path,
            range=(k, count),
            bytes=file.bytes,
            etag=file.etag,
            root=file.root,
        )
        for k in range(count)
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
            url=file.url,
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
    """Yield groups of up to 256 images, in order. Images that differ only in their extension stay together."""
    group: list[ListedFile] = []
    for _, twins in itertools.groupby(images, key=lambda file: stem(file.path)):
        same = list(twins)
        if group and len(group) + len(same) > IMAGES_PER_UNIT:
            yield group
            group = []
        group += same
    if group:
        yield group


def make_folder_unit(images: list[ListedFile], sidecars: SidecarIndex) -> Unit:
    """Return the unit of these images. sidecars: their texts and metadata."""
    root, paths = images[0].root, tuple(file.path for file in images)
    source = source_name(paths[0])
    return Unit(
        name=make_unit_name(source, list(paths)),
        kind="folder",
        url=root,
        path=source,
        paths=paths,
        root=root,
        metadata=sidecars.metadata.pin(paths),
        **pin_files([collect_image_files(image, sidecars.texts) for image in images]),
    )
