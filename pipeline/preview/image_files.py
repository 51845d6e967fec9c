"""Write decoded images: as single files, or as the rows of WebDataset tars or Parquet files.

The files of a part follow from its rows alone. A file is built in memory, and written whole.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.canonical_json import canonical_json
from pipeline.prefetch import map_in_order
from pipeline.preview.fidelity_table import SCHEMA, Rendered
from pipeline.records import TAR_GROUP, Unit
from pipeline.storage.folder import Folder

ImageFormat = Literal["files", "webdataset", "parquet"]
FILE_BYTES = 64 << 20  # of images in a tar or a Parquet file, and at least one image
WRITERS = 8  # threads that write the files of a part: stores are slow to confirm each of them
PARQUET_SCHEMA = pa.schema(
    [*SCHEMA, ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]  # as `datasets` has images
)


@dataclass(frozen=True, slots=True)
class EncodedPng:
    """A decoded image as PNG. name: of the image, with the folder of its unit; without an extension."""

    image: Rendered
    name: str
    png: bytes


def write_images(out: Folder, form: ImageFormat, part: int, images: Iterable[EncodedPng]) -> list[Rendered]:
    """Write the images of a part, and return them in the same order, with the names of their files."""
    if form == "files":
        return write_single_files(out, images)
    serialize, suffix = SERIALIZERS[form]
    written: list[Rendered] = []
    for number, group in enumerate(split(images)):
        name = f"decoded/{part:05d}-{number:03d}{suffix}"
        group = [replace(png, image=replace(png.image, file=name)) for png in group]
        out.replace(name, serialize(group))
        written += [png.image for png in group]
    return written


def write_single_files(out: Folder, images: Iterable[EncodedPng]) -> list[Rendered]:
    """Write each image as a file of its own."""

    def write(png: EncodedPng) -> Rendered:
        image = replace(png.image, file=f"images/{png.name}.png")
        out.replace(image.file, png.png)
        return image

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
        return list(map_in_order(pool, write, images, window=WRITERS))


def split(images: Iterable[EncodedPng]) -> Iterator[list[EncodedPng]]:
    """Yield the images in groups of up to FILE_BYTES."""
    group, size = list[EncodedPng](), 0
    for png in images:
        if group and size + len(png.png) > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(png)
        size += len(png.png)
    if group:
        yield group


def serialize_tar(images: Sequence[EncodedPng]) -> bytes:
    """Return a WebDataset tar: `<unit>/<key>.png` and `<unit>/<key>.json`, with the fields of `Rendered`, per image."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for png in images:
            stem = png.name.replace(".", "%2E")  # the extension begins at the first dot
            for extension, data in (("png", png.png), ("json", canonical_json(asdict(png.image)))):
                member = tarfile.TarInfo(f"{stem}.{extension}")  # without a time and an owner
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def serialize_parquet(images: Sequence[EncodedPng]) -> bytes:
    """Return a Parquet file with the fields of `Rendered` and a column `image` with the PNG."""
    rows = [{**asdict(png.image), "image": {"bytes": png.png, "path": f"{png.name}.png"}} for png in images]
    sink = io.BytesIO()
    others = SCHEMA.names
    pq.write_table(
        pa.Table.from_pylist(rows, PARQUET_SCHEMA),
        sink,
        compression=dict.fromkeys(others, "zstd") | {"image.bytes": "none", "image.path": "zstd"},
        use_dictionary=others,
        write_statistics=others,
    )
    return sink.getvalue()


SERIALIZERS: Mapping[str, tuple[Callable[[Sequence[EncodedPng]], bytes], str]] = {
    "webdataset": (serialize_tar, ".tar"),
    "parquet": (serialize_parquet, ".parquet"),
}


def name_image(unit: Unit, shard: str, key: str) -> str:
    """Return the name of a row's image: in a folder per unit, and in a group of tars per tar, which may share keys."""
    folder = f"{unit.name}/{make_image_name(shard)}" if unit.kind == TAR_GROUP else unit.name
    return f"{folder}/{make_image_name(key)}"


def make_image_name(key: str) -> str:
    """Return a key as a file name for any disk: percent-encoded. A long one is cut and gets a hash."""
    name = quote(key, safe="")
    return name if len(name) <= 150 else f"{name[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
