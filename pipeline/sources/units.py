"""Divide shards into units. One task reads one unit."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from pipeline.canonical_json import canonical_json
from pipeline.limits import printable
from pipeline.readers.sidecars import SidecarIndex, collect_image_files, match_sidecars, pin_files
from pipeline.records import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, Shard, Unit, extension, is_image, source_name, stem

IMAGES_PER_UNIT = 256
RANGE_BYTES = 128 << 20  # approximate size of a range of a Parquet file
TABLE_LOG_FOLDERS = frozenset({"_delta_log", "_change_data", "_temporary"})


def make_unit_name(name: str, identity: object) -> str:
    """Return a file-name-safe stem, a dash, and 16 hex digits of the sha256 of `identity` as canonical JSON."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:64] or "unit"
    return f"{safe}-{hashlib.sha256(canonical_json(identity)).hexdigest()[:16]}"


def make_units(shards: Sequence[Shard], sidecars: SidecarIndex | None = None) -> list[Unit]:
    """Return the units of these shards: tars, Parquet files, images, each in the order of the paths.

    Other files are skipped. A Parquet file beside a tar with the same name is img2dataset's metadata and not a unit. A
    file of `is_table_log` is not a unit either.
    sidecars: the texts of images, if they are already known or include more than captions and metadata.
    """
    texts = (sidecars or match_sidecars(shards, TEXT_EXTENSIONS)).texts
    shards = select_inputs(shards)
    tars = [make_tar_unit(shard) for shard in shards if extension(shard.path) == "tar"]
    parquets = [shard for shard in shards if extension(shard.path) == "parquet"]
    ranges = [unit for shard in parquets for unit in make_parquet_units(shard)]
    images = [shard for shard in shards if is_image(shard.path)]
    by_root = itertools.groupby(sorted(images, key=lambda s: (s.root, stem(s.path), s.path)), key=lambda s: s.root)
    groups = [group for _, below in by_root for group in group_images(list(below))]
    return tars + ranges + [make_folder_unit(group, texts) for group in groups]


def is_table_log(shard: Shard) -> bool:
    """Whether a Parquet file is internal to Delta Lake or Spark: logs, changes, and uncommitted rows."""
    return extension(shard.path) == "parquet" and not TABLE_LOG_FOLDERS.isdisjoint(shard.path.split("/")[1:-1])


def select_inputs(shards: Sequence[Shard]) -> list[Shard]:
    """Return the files that units are made of."""
    tar_stems = {stem(shard.path) for shard in shards if extension(shard.path) == "tar"}

    def is_input(shard: Shard) -> bool:
        kind = extension(shard.path)
        if kind == "parquet":
            return stem(shard.path) not in tar_stems and not is_table_log(shard)
        return kind == "tar" or is_image(shard.path)

    return [shard for shard in shards if is_input(shard)]


def count_other_files(shards: Sequence[Shard], texts: Iterable[str] = TEXT_EXTENSIONS) -> Counter[str]:
    """Count the files that are not used, by extension. Files that may belong to an image or a tar do not count.

    texts: extensions of the files beside an image that are copied.
    """
    known = {"tar", "parquet", *IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, *texts}
    return Counter(printable(extension(shard.path)) for shard in shards if extension(shard.path) not in known)


def derive_unit_name(unit: Unit) -> str:
    """Return the name that follows from the inputs of a unit."""
    if unit.kind == "folder":
        return make_unit_name(unit.path, list(unit.paths))
    return make_unit_name(PurePosixPath(unit.path).stem, [unit.path, list(unit.range) if unit.range else None])


def make_tar_unit(shard: Shard) -> Unit:
    """Return the unit of a tar."""
    return Unit(
        name=make_unit_name(PurePosixPath(shard.path).stem, [shard.path, None]),
        kind="tar",
        url=shard.url,
        path=shard.path,
        bytes=shard.bytes,
        etag=shard.etag,
        root=shard.root,
    )


def make_parquet_units(shard: Shard) -> list[Unit]:
    """Return one unit per range k of n of a Parquet file. n follows from the file's size alone."""
    count = max(1, math.ceil(shard.bytes / RANGE_BYTES))
    name = PurePosixPath(shard.path).stem
    return [
        Unit(
            name=make_unit_name(name, [shard.path, [k, count]]),
            kind="parquet",
            url=shard.url,
            path=shard.path,
            range=(k, count),
            bytes=shard.bytes,
            etag=shard.etag,
            root=shard.root,
        )
        for k in range(count)
    ]


def group_images(images: list[Shard]) -> Iterator[list[Shard]]:
    """Yield groups of up to 256 images, in order. Images that differ only in their extension stay together."""
    group: list[Shard] = []
    for _, twins in itertools.groupby(images, key=lambda shard: stem(shard.path)):
        same = list(twins)
        if group and len(group) + len(same) > IMAGES_PER_UNIT:
            yield group
            group = []
        group += same
    if group:
        yield group


def make_folder_unit(images: list[Shard], texts: Mapping[str, Sequence[Shard]]) -> Unit:
    """Return the unit of these images. texts: of each image that has any, by the image's path."""
    root, paths = images[0].root, tuple(shard.path for shard in images)
    source = source_name(paths[0])
    return Unit(
        name=make_unit_name(source, list(paths)),
        kind="folder",
        url=root,
        path=source,
        paths=paths,
        root=root,
        **pin_files([collect_image_files(image, texts) for image in images]),
    )
