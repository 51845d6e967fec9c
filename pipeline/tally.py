"""Exact running statistics of latents: every value counts once, in float64, whatever the order of the work.

A tally is made of the values as they are stored. Two tallies merge by the pairwise update of Chan, Golub and LeVeque
(1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"); merging in a fixed order makes
the result the same to the last bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.records import BucketTally, Row


def bucket_name(height: int, width: int) -> str:
    """The name of a bucket: "HxW" of its pictures, in pixels."""
    return f"{height}x{width}"


def tally_rows(rows: Sequence[Row]) -> dict[str, BucketTally]:
    """The statistics of a part's rows, by bucket. Rows of a bucket must stand in their final order."""
    buckets: dict[str, list[Tensor]] = {}
    for row in rows:
        buckets.setdefault(bucket_name(*row.picture.bucket), []).append(row.latent)
    return {name: tally_latents(buckets[name]) for name in sorted(buckets)}


def tally_latents(latents: Sequence[Tensor]) -> BucketTally:
    """The statistics of equally large latents [C, h, w]: a channel at a time, so that little is held in float64."""
    tally = BucketTally(samples=len(latents), values=0, mean=[], m2=[], min=[], max=[])
    for channel in range(latents[0].shape[0]):
        values = torch.stack([latent[channel] for latent in latents]).double().numpy()
        mean = float(values.mean())
        tally.values = values.size
        tally.mean.append(mean)
        tally.m2.append(float(((values - mean) ** 2).sum()))
        tally.min.append(float(values.min()))
        tally.max.append(float(values.max()))
    return tally


def merge(tallies: Iterable[BucketTally]) -> BucketTally | None:
    """The statistics of all together, merged from left to right; None of none."""
    total: BucketTally | None = None
    for tally in tallies:
        total = tally if total is None else _merge_two(total, tally)
    return total


def _merge_two(a: BucketTally, b: BucketTally) -> BucketTally:
    values = a.values + b.values
    share = b.values / values
    deltas = [right - left for left, right in zip(a.mean, b.mean, strict=True)]
    return BucketTally(
        samples=a.samples + b.samples,
        values=values,
        mean=[left + delta * share for left, delta in zip(a.mean, deltas, strict=True)],
        m2=[x + y + delta * delta * a.values * share for x, y, delta in zip(a.m2, b.m2, deltas, strict=True)],
        min=[min(x, y) for x, y in zip(a.min, b.min, strict=True)],
        max=[max(x, y) for x, y in zip(a.max, b.max, strict=True)],
    )


def by_bucket(records: Iterable[Mapping[str, BucketTally]]) -> dict[str, BucketTally]:
    """The tallies of many records, merged bucket by bucket in the order given."""
    buckets: dict[str, list[BucketTally]] = {}
    for tallies in records:
        for name, tally in tallies.items():
            buckets.setdefault(name, []).append(tally)
    merged = {name: merge(buckets[name]) for name in sorted(buckets)}
    return {name: tally for name, tally in merged.items() if tally is not None}


def std(tally: BucketTally) -> list[float]:
    """Standard deviation of the population, a channel."""
    return [math.sqrt(m2 / tally.values) for m2 in tally.m2]


def over_channels(tally: BucketTally) -> tuple[float, float]:
    """Mean and standard deviation of all values, whichever their channel (every channel has as many)."""
    mean = math.fsum(tally.mean) / len(tally.mean)
    spread = math.fsum((m - mean) ** 2 for m in tally.mean) * tally.values
    return mean, math.sqrt((math.fsum(tally.m2) + spread) / (tally.values * len(tally.mean)))
