"""Estimate the bytes of a cache's data files for each stored form, by making parts of the samples in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.cache.parts import PART_FORMATS
from pipeline.encoder import DTYPES
from pipeline.estimate.images import Opened, Opening
from pipeline.estimate.sampling import Stratum
from pipeline.flow import EncodeSpec
from pipeline.part_writer import PartBuffer, make_record
from pipeline.records import EncodedImage, PreparedImage, Store, Unit

STORES: tuple[Store, ...] = ("mode", "sample", "moments")
_EMPTY = b"\0" * 32  # in place of the digest of a sample


@dataclass(frozen=True, slots=True)
class LatentSize:
    """The size of a latent: channels of its mode, and pixels per value along a side."""

    channels: int
    factor: int

    def shape(self, bucket: tuple[int, int], store: Store) -> tuple[int, int, int]:
        """Return the shape of a latent as it is stored. bucket: height and width of the image in pixels."""
        channels = self.channels * (2 if store == "moments" else 1)
        return channels, bucket[0] // self.factor, bucket[1] // self.factor


@dataclass(frozen=True, slots=True)
class Overhead:
    """The bytes of a part beside its latents: `fixed`, and `row` for each row."""

    fixed: float
    row: float


def measure_overhead(opening: Opening, spec: EncodeSpec, latent: LatentSize) -> Overhead:
    """Return the bytes of parts beside their latents, from parts of the samples of each input."""
    found = []
    for items in opening.inputs:
        full, half = (_measure_part(chosen, spec, latent) for chosen in (items, items[::2]))
        if full and half and full[0] > half[0]:
            row = (full[1] - half[1]) / (full[0] - half[0])
            found.append(Overhead(full[1] - row * full[0], row))
        elif full:
            found.append(Overhead(float(full[1]), 0.0))
    if not found:
        return Overhead(0.0, 0.0)
    return Overhead(sum(item.fixed for item in found) / len(found), sum(item.row for item in found) / len(found))


def _measure_part(items: Sequence[Opened], spec: EncodeSpec, latent: LatentSize) -> tuple[int, int] | None:
    """Return the rows of a part of these samples, and its bytes beside the latents; None without rows."""
    buffer = PartBuffer()
    generator = torch.Generator().manual_seed(0)
    for position, item in enumerate(items):
        buffer.digests[position] = _EMPTY
        result = item.result
        if isinstance(result, PreparedImage):
            shape = latent.shape(result.bucket, spec.layout.store)
            values = [torch.randn(shape, generator=generator).to(DTYPES[spec.dtype]) for _ in spec.layout.latent_names]
            buffer.add_encoded(result, EncodedImage(values[0], False, *values[1:]))
        else:
            buffer.add(result)
    buffer.sort()
    if not buffer.rows:
        return None
    unit = Unit(name="unit-0123456789abcdef", kind="tar", path=buffer.rows[0].image.shard)
    record = make_record(unit, 0, buffer, True, spec)
    rows, latent_bytes = len(buffer.rows), sum(row.latent_bytes for row in buffer.rows)
    content, _ = PART_FORMATS[spec.layout.container].serialize_part(buffer.take_rows(), record, spec.layout)
    return rows, len(content) - latent_bytes


def count_parts(strata: Sequence[Stratum], rows: Sequence[float], rows_per_part: int) -> int:
    """Return about how many parts have rows. rows: of each kind of inputs."""
    parts = 0
    for stratum, found in zip(strata, rows, strict=True):
        parts += min(math.ceil(found), stratum.units * max(1, math.ceil(found / stratum.units / rows_per_part)))
    return parts


def estimate_sizes(
    opening: Opening, spec: EncodeSpec, latent: LatentSize, overhead: Overhead, parts: int
) -> dict[str, dict[str, int]]:
    """Return the bytes of all parts for each store and dtype."""
    rows = [(item.result.bucket, item.weight) for item in opening.all if isinstance(item.result, PreparedImage)]
    other = parts * overhead.fixed + overhead.row * sum(weight for _, weight in rows)
    latents = len(spec.layout.latent_names)

    def count(store: Store, dtype: torch.dtype) -> int:
        values = sum(weight * math.prod(latent.shape(bucket, store)) for bucket, weight in rows)
        return round(other + latents * values * dtype.itemsize)

    return {store: {name: count(store, dtype) for name, dtype in DTYPES.items()} for store in STORES}
