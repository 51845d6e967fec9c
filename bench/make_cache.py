"""Write a cache of random latents with the product's writers: for benchmarks and tests of reading, without a model.

python -m bench.make_cache FOLDER --channels 16 --side 512 --rows 10000
"""

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latentmill.cache_info import CacheInfo, ColumnInfo, ComputeInfo, Identity, VaeInfo
from latentmill.canonical_json import canonical_json
from pipeline.cache import stats
from pipeline.cache.identity import choose_rows_per_part, create_or_load, select_raw_fields
from pipeline.cache.part_info import PartInfo, PartSummary
from pipeline.cache.parts import PART_FORMATS, describe_schema
from pipeline.cache.preprocessing import describe_transform
from pipeline.cache.tally import tally_rows
from pipeline.formats.part_record import PartRecord, format_part_stem
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images.transform import Transform
from pipeline.records import PreparedImage, Row
from pipeline.storage.folder import Folder
from vae import AutoencoderKLConfig

DOWNSCALE = 8
WEIGHTS = hashlib.sha256(b"random").hexdigest()  # of no VAE
CAPTION = "a photograph of a red boat on a calm lake at dawn, with mountains and two birds above, picture {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """What a cache has. buckets: its rows by (height, width) in pixels; each part has some of all of them.

    columns: a function of the number of a row that returns its passed-through values. constants: further fields of the
    VAE's configuration.
    """

    buckets: Mapping[tuple[int, int], int]
    channels: int = 4
    container: Any = "parquet"
    store: Any = "mode"
    dtype: Any = "float16"
    flip: Any = "none"
    parts: int = 1
    schema: pa.Schema = field(default_factory=lambda: pa.schema([("txt", pa.string()), ("json", pa.string())]))
    columns: Any = field(default=lambda number: {"txt": CAPTION.format(number)})
    constants: Mapping[str, Any] = field(default_factory=lambda: {"scaling_factor": 0.3611, "shift_factor": 0.1159})


def write_cache(folder: Path, spec: CacheSpec) -> None:
    """Write a cache with cache.json, its parts and stats.json. Equal specs give equal latents."""
    layout = OutputSchema(
        container=spec.container,
        store=spec.store,
        columns=PassthroughColumns(spec.schema, tuple(name for name in ("txt", "json") if name in spec.schema.names)),
        has_flipped=spec.flip == "both",
    )
    info = _make_info(spec, layout)
    create_or_load(Folder(str(folder)), info)
    (folder / "data").mkdir()
    summaries = [_write_part(folder, spec, layout, info, part) for part in range(spec.parts)]
    stats.write_stats(Folder(str(folder)), stats.summarize_parts(summaries))


def _make_info(spec: CacheSpec, layout: OutputSchema) -> CacheInfo:
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=spec.channels,
        **spec.constants,
    )
    sides = [side for bucket in spec.buckets for side in bucket]
    identity = Identity(
        weights=WEIGHTS,
        config=select_raw_fields(config),
        preprocessing=describe_transform(replace(Transform(resolution=min(sides)), flip=spec.flip)),
        store=spec.store,
        dtype=spec.dtype,
        precision="fp32",
        tile_above=None,
        rows_per_part=choose_rows_per_part(config, min(sides), spec.dtype, spec.store, spec.flip),
        seed=0,
        container=spec.container,
        columns=None,
        image_column=None,
        key_column=None,
    )
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return CacheInfo(
        format=1,
        identity=identity,
        identity_sha256=identity.sha256,
        compute=ComputeInfo(backend="torch", device="cpu", batch_size=1, threads=1, form="plain"),
        vae=VaeInfo(reference="random", config=config.to_dict(), **{name: config.get(name) for name in names}),
        schema=tuple(ColumnInfo(**column) for column in describe_schema(layout)),
        columns=layout.columns.to_info(),
    )


def _write_part(folder: Path, spec: CacheSpec, layout: OutputSchema, info: CacheInfo, part: int) -> PartSummary:
    source = f"shards/{part:05d}.tar"
    rows = list(_make_rows(spec, part, source))
    tally = tally_rows(rows, spec.store)
    record = PartRecord(
        format=1,
        identity=info.identity_sha256,
        unit=f"{part:05d}-{hashlib.sha256(canonical_json([source, None])).hexdigest()[:16]}",
        part=0,
        last=True,
        source=source,
        source_bytes=1,
        range=None,
        first=0,
        samples=len(rows),
        rows=len(rows),
        filtered={},
        enlarged=0,
        inputs="0" * 64,
        rejects=(),
        tally=tally,
    )
    part_format = PART_FORMATS[spec.container]
    file = f"data/{format_part_stem(record.unit, 0)}{part_format.SUFFIX}"
    data, groups = part_format.serialize_part(rows, record, layout)
    (folder / file).write_bytes(data)
    return PartInfo(record, file, len(data), hashlib.sha256(data).hexdigest(), groups).summary


def _make_rows(spec: CacheSpec, part: int, source: str) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(part)
    number = part * sum(spec.buckets.values()) // spec.parts
    for height, width in sorted(spec.buckets):
        count = spec.buckets[height, width]
        share = count * (part + 1) // spec.parts - count * part // spec.parts
        if not share:
            continue
        channels = spec.channels * (2 if spec.store == "moments" else 1)
        shape = (share, 2 if spec.flip == "both" else 1, channels, height // DOWNSCALE, width // DOWNSCALE)
        latents = torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
        for index in range(share):
            yield Row(_make_image(spec, number, source, height, width), latents, index)
            number += 1


def _make_image(spec: CacheSpec, number: int, source: str, height: int, width: int) -> PreparedImage:
    """Return an image with a geometry that differs from row to row."""
    resized_height, resized_width = height + number % 3, width + number % 7
    return PreparedImage(
        shard=source,
        position=number,
        key=f"{number:09d}",
        columns=dict.fromkeys(spec.schema.names) | spec.columns(number),
        pixels=Tensor.expand(torch.zeros(1, 1, 3, dtype=torch.uint8), height, width, 3),
        original_height=2 * resized_height + 1,
        original_width=2 * resized_width + number % 2,
        resized_height=resized_height,
        resized_width=resized_width,
        crop_top=number % 3 // 2,
        crop_left=number % 7 // 2,
        enlarged=False,
        flipped=spec.flip == "random" and number % 2 == 1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--container", default="parquet")
    parser.add_argument("--store", default="mode")
    args = parser.parse_args()
    write_cache(
        args.folder,
        CacheSpec(
            buckets={(args.side, args.side): args.rows},
            channels=args.channels,
            parts=args.parts,
            container=args.container,
            store=args.store,
        ),
    )


if __name__ == "__main__":
    main()
