"""The statistics of a part's latents, from the values as they are stored, in float64.

`pipeline.cache.tally_sums` adds up the statistics of many parts.
"""

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
