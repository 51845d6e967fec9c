"""The statistics of a part's latents, from the values as they are stored, in float64.

`pipeline.cache.tally_sums` adds up the statistics of many parts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.formats.part_record import BucketTally
from pipeline.records import Row, Store

BLOCK = 1 << 17  # values that are in memory in float64
_UNDIVIDED = 128  # values that numpy adds without dividing them


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
    """Return the statistics of latents [C, h, w] of one size."""
    return _tally_channels(latents, latents[0].shape[0])


def tally_moments(moments: Sequence[Tensor]) -> BucketTally:
    """Return the statistics of moments [2C, h, w] of one size: of the means, with the mean of the variances."""
    channels = moments[0].shape[0] // 2
    tally = _tally_channels(moments, channels)

    def add_variances(start: int, stop: int) -> np.ndarray:
        return _add(_read_values(moments, slice(channels, None), start, stop).exp().numpy())

    tally.variance = (_add_pairwise(add_variances, 0, tally.values, channels) / tally.values).tolist()
    return tally


def _tally_channels(latents: Sequence[Tensor], channels: int) -> BucketTally:
    """Return the statistics of the first channels of latents [C, h, w] of one size."""
    count = len(latents) * latents[0][0].numel()
    lowest, highest = np.full(channels, np.inf), np.full(channels, -np.inf)

    def add_values(start: int, stop: int) -> np.ndarray:
        values = _read_values(latents, slice(channels), start, stop).numpy()
        np.minimum(lowest, values.min(axis=1), out=lowest)
        np.maximum(highest, values.max(axis=1), out=highest)
        return _add(values)

    mean = _add_pairwise(add_values, 0, count, channels) / count

    def add_squares(start: int, stop: int) -> np.ndarray:
        return _add((_read_values(latents, slice(channels), start, stop).numpy() - mean[:, None]) ** 2)

    return BucketTally(
        samples=len(latents),
        values=count,
        mean=mean.tolist(),
        m2=_add_pairwise(add_squares, 0, count, channels).tolist(),
        min=lowest.tolist(),
        max=highest.tolist(),
    )


def _add_pairwise(add: Callable[[int, int], np.ndarray], start: int, stop: int, channels: int) -> np.ndarray:
    """Return the sum of each channel's values at the positions from `start` to `stop`, in float64.

    It equals numpy's sum of one array to the last bit, because it divides the array as numpy does: into halves, the
    first one a multiple of 8. But only BLOCK values are in memory. add: returns the sum of such a block.
    """
    count = stop - start
    if count <= max(_UNDIVIDED, BLOCK // channels):
        return add(start, stop)
    middle = start + count // 2 // 8 * 8
    sums: np.ndarray = _add_pairwise(add, start, middle, channels) + _add_pairwise(add, middle, stop, channels)
    return sums


def _add(values: np.ndarray) -> np.ndarray:
    """Return the sum of each row. Each is added alone: numpy may add several in another order."""
    return np.array([row.sum() for row in values])


def _read_values(latents: Sequence[Tensor], channels: slice, start: int, stop: int) -> Tensor:
    """Return values by channel, float64 [C, stop - start]. A channel's values are those of all latents in order."""
    size = latents[0][0].numel()
    first, last = start // size, -(-stop // size)
    blocks = [latent[channels].flatten(1) for latent in latents[first:last]]
    blocks[-1] = blocks[-1][:, : stop - (last - 1) * size]
    blocks[0] = blocks[0][:, start - first * size :]
    return torch.cat(blocks, dim=1).double()
