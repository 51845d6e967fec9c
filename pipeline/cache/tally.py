"""Exact running statistics of latents: every value counts once, in float64, whatever the order of the work.

A tally is computed from the values as they are stored. Two tallies are merged by the pairwise update of Chan, Golub and
LeVeque (1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"). A fixed order of
merging gives the same result to the last bit.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.formats.part_record import BucketTally
from pipeline.records import Row, Store


def format_bucket(height: int, width: int) -> str:
    """Return the name of a bucket: "HxW", the size of its images in pixels."""
    return f"{height}x{width}"


def tally_rows(rows: Sequence[Row], store: Store = "mode") -> dict[str, BucketTally]:
    """Return the statistics of a part's rows, by bucket. The rows of a bucket must be in their final order."""
    buckets: dict[str, list[Sequence[Tensor]]] = {}
    for row in rows:
        buckets.setdefault(format_bucket(*row.image.bucket), []).append(row.latents)
    return tally_buckets(buckets, store)


def tally_buckets(buckets: Mapping[str, Sequence[Sequence[Tensor]]], store: Store = "mode") -> dict[str, BucketTally]:
    """Return the statistics of each bucket. buckets: the latents of each row, one or two, by the bucket's name.

    Every latent counts, but a row is one sample.
    """
    tally_bucket = tally_moments if store == "moments" else tally_latents
    return {
        name: replace(tally_bucket([latent for row in buckets[name] for latent in row]), samples=len(buckets[name]))
        for name in sorted(buckets)
    }


def count_texts(rows: Iterable[Row], names: Sequence[str]) -> Counter[str]:
    """Return the number of rows that have each of these texts, also if it is 0."""
    found = Counter(name for row in rows for name in names if row.image.columns.get(name) is not None)
    return Counter({name: found[name] for name in names})


def tally_latents(latents: Sequence[Tensor]) -> BucketTally:
    """Return the statistics of latents [C, h, w] of one size.

    One channel is computed at a time, so that only one channel is held in float64.
    """
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


def tally_moments(moments: Sequence[Tensor]) -> BucketTally:
    """Return the statistics of moments [2C, h, w] of one size: of the means, with the mean of the variances."""
    tally = tally_latents([moment.chunk(2)[0] for moment in moments])
    logvars = [moment.chunk(2)[1] for moment in moments]
    tally.variance = [
        float(torch.stack([logvar[channel] for logvar in logvars]).double().exp().numpy().mean())
        for channel in range(len(tally.mean))
    ]
    return tally


def merge(tallies: Iterable[BucketTally]) -> BucketTally | None:
    """Return the statistics of all tallies together, merged from left to right. Returns None if there are none."""
    total: BucketTally | None = None
    for tally in tallies:
        total = tally if total is None else merge_two(total, tally)
    return total


def merge_two(a: BucketTally, b: BucketTally) -> BucketTally:
    """Return the statistics of both tallies together. Neither tally is changed."""
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
        variance=_merge_means(a.variance, b.variance, share),
    )


def _merge_means(a: list[float] | None, b: list[float] | None, share: float) -> list[float] | None:
    """Return the means of both together. share: the fraction of the values that belongs to b."""
    if a is None or b is None:
        return None
    return [left + (right - left) * share for left, right in zip(a, b, strict=True)]


def compute_std(tally: BucketTally) -> list[float]:
    """Return the population standard deviation per channel. For moments, it is that of latents sampled from them."""
    within = tally.variance or [0.0] * len(tally.m2)
    return [math.sqrt(m2 / tally.values + variance) for m2, variance in zip(tally.m2, within, strict=True)]


def pool_channels(tally: BucketTally) -> tuple[float, float]:
    """Return the mean and standard deviation over all channels, which have equally many values."""
    mean = math.fsum(tally.mean) / len(tally.mean)
    between = math.fsum((m - mean) ** 2 for m in tally.mean) * tally.values
    within = math.fsum(tally.variance or ()) * tally.values
    return mean, math.sqrt((math.fsum(tally.m2) + between + within) / (tally.values * len(tally.mean)))
