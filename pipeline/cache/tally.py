"""Exact running statistics of latents: every value counts once, in float64, whatever the order of the work.

A tally is made of the values as they are stored. Two tallies merge by the pairwise update of Chan, Golub and LeVeque
(1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"); merging in a fixed order makes
the result the same to the last bit.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.formats.record import BucketTally
from pipeline.records import Row, Store


def bucket_name(height: int, width: int) -> str:
    """The name of a bucket: "HxW" of its images, in pixels."""
    return f"{height}x{width}"


def tally_rows(rows: Sequence[Row], store: Store = "mode") -> dict[str, BucketTally]:
    """The statistics of a part's rows, by bucket. Rows of a bucket must stand in their final order."""
    tally = tally_moments if store == "moments" else tally_latents
    buckets: dict[str, list[Tensor]] = {}
    for row in rows:
        buckets.setdefault(bucket_name(*row.image.bucket), []).append(row.latent)
    return {name: tally(buckets[name]) for name in sorted(buckets)}


def count_texts(rows: Iterable[Row], names: Sequence[str]) -> Counter[str]:
    """How many of the rows have each of these texts."""
    return Counter(name for row in rows for name in names if row.image.columns.get(name) is not None)


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


def tally_moments(moments: Sequence[Tensor]) -> BucketTally:
    """The statistics of equally large moments [2C, h, w]: of the means, and the mean of the variances."""
    tally = tally_latents([moment.chunk(2)[0] for moment in moments])
    logvars = [moment.chunk(2)[1] for moment in moments]
    tally.variance = [
        float(torch.stack([logvar[channel] for logvar in logvars]).double().exp().numpy().mean())
        for channel in range(len(tally.mean))
    ]
    return tally


def merge(tallies: Iterable[BucketTally]) -> BucketTally | None:
    """The statistics of all together, merged from left to right; None of none."""
    total: BucketTally | None = None
    for tally in tallies:
        total = tally if total is None else merge_two(total, tally)
    return total


def merge_two(a: BucketTally, b: BucketTally) -> BucketTally:
    """The statistics of both together; neither is changed."""
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
    """Means of both together, of which `share` is b's."""
    if a is None or b is None:
        return None
    return [left + (right - left) * share for left, right in zip(a, b, strict=True)]


def compute_std(tally: BucketTally) -> list[float]:
    """Standard deviation of the population, a channel; of moments, of the latents that are drawn from them."""
    inside = tally.variance or [0.0] * len(tally.m2)
    return [math.sqrt(m2 / tally.values + variance) for m2, variance in zip(tally.m2, inside, strict=True)]


def pool_channels(tally: BucketTally) -> tuple[float, float]:
    """Mean and standard deviation of all values, whichever their channel (every channel has as many)."""
    mean = math.fsum(tally.mean) / len(tally.mean)
    spread = math.fsum((m - mean) ** 2 for m in tally.mean) * tally.values
    inside = math.fsum(tally.variance or ()) * tally.values
    return mean, math.sqrt((math.fsum(tally.m2) + spread + inside) / (tally.values * len(tally.mean)))
