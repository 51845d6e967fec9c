"""From shards to units, and the plan of a cache: `_plan/NNNNN.parquet`, append-only.

A run lists the sources, subtracts what is planned and creates a further file if anything is left; of two runs that
do so at once one wins, and the other reads again.
"""

import hashlib
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.beside import (
    Beside,
    as_listed,
    differences,
    extension,
    is_image,
    match,
    packed,
    some,
    stem,
    unpacked,
)
from pipeline.errors import CacheError, SourceError
from pipeline.limits import shown
from pipeline.records import PICTURE_EXTENSIONS, TEXT_EXTENSIONS, VERIFY, Shard, Unit, canonical_json
from pipeline.storage import Folder

PICTURES_PER_UNIT = 256
RANGE_BYTES = 128 << 20  # of a Parquet file, about
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
    ]
)


def unit_name(stem: str, identity: object) -> str:
    """A file-name-safe stem, a dash, and 16 hex digits of the sha256 of what the unit reads (canonical JSON)."""
    safe = re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_")[:64] or "unit"
    return f"{safe}-{hashlib.sha256(canonical_json(identity)).hexdigest()[:16]}"


def units_of(shards: Sequence[Shard], beside: Beside | None = None) -> list[Unit]:
    """The units of these shards: tars, Parquet files, pictures, each in the order of the paths; others are passed over.

    A Parquet file beside a tar of its name is img2dataset's metadata, and no unit.
    beside: the texts of images, where they are known already, or others than captions and metadata come along.
    """
    texts = (beside or match(shards, TEXT_EXTENSIONS)).texts
    tars = [tar_unit(shard) for shard in shards if extension(shard.path) == "tar"]
    of_tars = {stem(unit.path) for unit in tars}
    parquets = [s for s in shards if extension(s.path) == "parquet" and stem(s.path) not in of_tars]
    ranges = [unit for shard in parquets for unit in parquet_units(shard)]
    pictures = [shard for shard in shards if is_image(shard.path)]
    by_root = itertools.groupby(sorted(pictures, key=lambda s: (s.root, stem(s.path), s.path)), key=lambda s: s.root)
    groups = [group for _, below in by_root for group in picture_groups(list(below))]
    return tars + ranges + [folder_unit(group, texts) for group in groups]


def passed_over(shards: Sequence[Shard], texts: Iterable[str] = TEXT_EXTENSIONS) -> Counter[str]:
    """How many of the files are of no use, by extension: not those that may stand beside a picture or a tar.

    texts: extensions of the files beside a picture that come along.
    """
    known = {"tar", "parquet", *PICTURE_EXTENSIONS, *TEXT_EXTENSIONS, *texts}
    return Counter(shown(extension(shard.path)) for shard in shards if extension(shard.path) not in known)


def name_of(unit: Unit) -> str:
    """The name that a unit must have for what it reads."""
    if unit.kind == "folder":
        return unit_name(unit.path, list(unit.paths))
    return unit_name(PurePosixPath(unit.path).stem, [unit.path, list(unit.range) if unit.range else None])


def tar_unit(shard: Shard) -> Unit:
    return Unit(
        name=unit_name(PurePosixPath(shard.path).stem, [shard.path, None]),
        kind="tar",
        url=shard.url,
        path=shard.path,
        bytes=shard.bytes,
        etag=shard.etag,
    )


def parquet_units(shard: Shard) -> list[Unit]:
    """A unit for each range k of n, n from the file's size alone."""
    count = max(1, math.ceil(shard.bytes / RANGE_BYTES))
    stem = PurePosixPath(shard.path).stem
    return [
        Unit(
            name=unit_name(stem, [shard.path, [k, count]]),
            kind="parquet",
            url=shard.url,
            path=shard.path,
            range=(k, count),
            bytes=shard.bytes,
            etag=shard.etag,
        )
        for k in range(count)
    ]


def picture_groups(pictures: list[Shard]) -> Iterator[list[Shard]]:
    """Up to 256 pictures each, in order; pictures that differ in their extension only stay together."""
    group: list[Shard] = []
    for _, twins in itertools.groupby(pictures, key=lambda shard: stem(shard.path)):
        same = list(twins)
        if group and len(group) + len(same) > PICTURES_PER_UNIT:
            yield group
            group = []
        group += same
    if group:
        yield group


def folder_unit(pictures: list[Shard], texts: Mapping[str, Sequence[Shard]]) -> Unit:
    root, paths = pictures[0].root, tuple(shard.path for shard in pictures)
    folder = paths[0].split("/", 1)[0]
    files = packed(pictures, texts)
    return Unit(
        name=unit_name(folder, list(paths)),
        kind="folder",
        url=root,
        path=folder,
        paths=paths,
        bytes=sum(shard.bytes for shard in pictures),
        etag=hashlib.sha256(files.encode()).hexdigest(),
        files=files,
    )


def hashes(cache: Folder) -> dict[str, str]:
    """The sha256 of each file of the plan. Every run keeps them, so that `verify` can tell a file that has changed."""
    return {name: hashlib.sha256(cache.read(f"{FOLDER}/{name}")).hexdigest() for name in names_in(cache)}


def names_in(cache: Folder) -> list[str]:
    """The files of the plan, in order."""
    return [name for name in cache.names(FOLDER) if re.fullmatch(r"\d{5}\.parquet", name)]


def read(cache: Folder) -> list[Unit]:
    """All planned units, in the order in which they were planned."""
    return read_files(cache, names_in(cache))


def read_files(cache: Folder, names: Sequence[str]) -> list[Unit]:
    """The units in these files of the plan."""
    units: list[Unit] = []
    for name in names:
        for row in _rows(cache, f"{FOLDER}/{name}"):
            units.append(
                Unit(
                    name=row["unit"],
                    kind=row["kind"],
                    url=row["url"],
                    path=row["path"],
                    range=tuple(row["range"]) if row["range"] else None,
                    paths=tuple(row["paths"] or ()),
                    bytes=row["bytes"],
                    etag=row["etag"],
                    files=row["files"] or "",
                )
            )
    return units


def _rows(cache: Folder, name: str) -> list[dict[str, Any]]:
    data = cache.read(name)
    try:
        # without threads: pyarrow 26's pool, just started, aborts a process that ends at once (2 of 25 with torch)
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        return cast(list[dict[str, Any]], table.cast(SCHEMA).to_pylist())
    except Exception as error:  # Arrow's, of whatever damaged bytes lead it to
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CacheError(f"{cache.at(name)} cannot be read as a plan: {said:.200}; {VERIFY}") from error


def write(cache: Folder, number: int, units: Iterable[Unit]) -> bool:
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
        }
        for unit in units
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return cache.create(f"{FOLDER}/{number:05d}.parquet", sink.getvalue())


def extend(
    cache: Folder, shards: Sequence[Shard], texts: Collection[str] = TEXT_EXTENSIONS
) -> tuple[list[Unit], list[str]]:
    """Plan what is not planned yet. Returns all units, and what was noticed: a line each.

    texts: extensions of the files beside a picture that come along.
    Raises SourceError where there is nothing to plan at all.
    """
    beside = match(shards, texts)
    while True:
        names = names_in(cache)
        planned = read_files(cache, names)
        new, noticed = unplanned(shards, planned, beside)
        if not new:
            if not planned:
                raise SourceError("the source is empty: there are no tar shards, Parquet files or pictures in it")
            return planned, noticed
        number = int(names[-1][:5]) + 1 if names else 0
        if write(cache, number, new):
            return planned + new, noticed
        if names_in(cache) == names:
            raise CacheError(f"{cache.at(FOLDER)}/{number:05d}.parquet is no file, but its name is taken; move it away")


def changed_files(listed: Mapping[str, Shard], planned: Iterable[Unit], beside: Beside) -> Iterator[str]:
    """The paths of images, and of texts beside images, that are not what was planned; images that are gone are none."""
    for unit in planned:
        pictures = [listed[path] for path in unit.paths if path in listed]
        if not pictures or (len(pictures) == len(unit.paths) and packed(pictures, beside.texts) == unit.files):
            continue
        for before in unpacked(unit):
            if before.image.path in listed:
                yield from differences(before, as_listed(listed[before.image.path], beside.texts))


def unplanned(shards: Sequence[Shard], planned: Sequence[Unit], beside: Beside) -> tuple[list[Unit], list[str]]:
    """The units that are to be added for these shards, and a line for every shard that has changed since."""
    files = {unit.path: unit for unit in planned if unit.kind != "folder"}
    tars = {stem(unit.path) for unit in planned if unit.kind == "tar"}
    pictures = {path for unit in planned for path in unit.paths}
    stems = {stem(path) for path in pictures}
    new: list[Shard] = []
    noticed: list[str] = []
    if changed := sorted(set(changed_files({shard.path: shard for shard in shards}, planned, beside))):
        noticed.append(
            f"{len(changed):,} images or texts beside them were edited, added or removed since they were planned: "
            f"{some(changed)}; the cache keeps what they were"
        )
    if beside.unused:
        noticed.append(
            f"{len(beside.unused):,} texts belong to no image, or to several, or another text counts in their place: "
            f"{some(beside.unused)}"
        )
    for shard in shards:
        if before := files.get(shard.path):
            if (before.bytes, before.etag) != (shard.bytes, shard.etag):
                noticed.append(f"{shard.url} has changed since it was planned; the cache keeps what it was")
        elif shard.path not in pictures:
            if is_image(shard.path) and stem(shard.path) in stems:
                noticed.append(f"{shard.url} is left out: the cache has another picture of its name; rename it")
            elif extension(shard.path) != "parquet" or stem(shard.path) not in tars:
                new.append(shard)
    return units_of(new, beside), noticed
