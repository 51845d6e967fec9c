"""The statistics of many parts from their tallies: exact, so they do not depend on the order of the parts.

With n values, the mean m and the sum of squared deviations m2 of each part, the sums over the parts are

    mean      = sum(n * m) / sum(n)
    variance  = (sum(m2) + sum(n * m * m)) / sum(n) - mean ** 2

These sums and differences are computed without rounding. Only the results are rounded, to float64.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa

from pipeline.cache.exact_sums import ExactSums, multiply_exactly
from pipeline.cache.part_table import CHANNEL_FIELDS

MEAN, SQUARE, VARIANCE = range(3)  # the sums of n * mean, of n * mean * mean + m2, and of n * variance


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """The statistics of latents per channel. std: the population's; for moments, that of latents sampled from them."""

    samples: int
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]

    def to_dict(self) -> dict[str, list[float]]:
        """Return the fields for stats.json, without the number of samples."""
        return {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}


class TallySums:
    """The sums of the tallies so far, by bucket.

    buckets: the index of each bucket by its name.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, int] = {}
        self._channels = 0
        self._samples = self._values = np.zeros(0, np.int64)
        self._min = self._max = np.zeros((0, 0))
        self._sums = ExactSums()

    def add(self, rows: pa.Table) -> None:
        """Add the tallies of these parts. rows: with the schema of `pipeline.cache.part_table`.

        Raises ValueError if their numbers of channels differ.
        """
        names = _flatten(rows, "buckets").dictionary_encode().combine_chunks()
        if not len(names):
            return
        samples, values = (_flatten(rows, name).to_numpy() for name in ("samples", "values"))
        mean, m2, low, high = (_flatten(rows, name).to_numpy().reshape(len(names), -1) for name in CHANNEL_FIELDS)
        variance = _flatten(rows, "variance").to_numpy()
        buckets = self._index_buckets(names, mean.shape[1])
        np.add.at(self._samples, buckets, samples)
        np.add.at(self._values, buckets, values)
        np.minimum.at(self._min, buckets, low)
        np.maximum.at(self._max, buckets, high)
        columns = 3 * (buckets[:, None] * self._channels + np.arange(self._channels))
        counts = np.broadcast_to(values[:, None].astype(np.float64), mean.shape)
        sums = multiply_exactly(counts, mean)
        self._add(columns + MEAN, *sums)
        self._add(columns + SQUARE, m2, *(part for each in sums for part in multiply_exactly(each, mean)))
        if len(variance):
            self._add(columns + VARIANCE, *multiply_exactly(counts, variance.reshape(mean.shape)))

    def _index_buckets(self, names: pa.DictionaryArray, channels: int) -> np.ndarray:
        """Return the index of each of these buckets, and make room for new ones."""
        self._channels = self._channels or channels
        if channels != self._channels:
            raise ValueError(f"tallies of {self._channels} and of {channels} channels")
        indexes = [self.buckets.setdefault(name, len(self.buckets)) for name in names.dictionary.to_pylist()]
        more = len(self.buckets) - len(self._samples)
        self._samples, self._values = (np.pad(each, (0, more)) for each in (self._samples, self._values))
        self._min = np.vstack([self._min.reshape(-1, channels), np.full((more, channels), np.inf)])
        self._max = np.vstack([self._max.reshape(-1, channels), np.full((more, channels), -np.inf)])
        result: np.ndarray = np.array(indexes)[names.indices.to_numpy()]
        return result

    def _add(self, columns: np.ndarray, *values: np.ndarray) -> None:
        for each in values:
            self._sums.add(columns.ravel(), each.ravel())

    def describe(self, bucket: str | None = None) -> ChannelStats:
        """Return the statistics of a bucket; None: of all buckets together, of which there is at least one."""
        buckets = sorted(self.buckets.values()) if bucket is None else [self.buckets[bucket]]
        values = int(self._values[buckets].sum())
        described = [self._describe(buckets, [channel], values) for channel in range(self._channels)]
        return ChannelStats(
            samples=int(self._samples[buckets].sum()),
            mean=[mean for mean, _ in described],
            std=[std for _, std in described],
            min=self._min[buckets].min(axis=0).tolist(),
            max=self._max[buckets].max(axis=0).tolist(),
        )

    def pool_channels(self) -> tuple[float, float]:
        """Return the mean and standard deviation over all channels and buckets."""
        values = int(self._values.sum()) * self._channels
        return self._describe(self.buckets.values(), range(self._channels), values)

    def _describe(self, buckets: Iterable[int], channels: Iterable[int], values: int) -> tuple[float, float]:
        """Return the mean and standard deviation of these channels of these buckets together. values: their number."""
        columns = [3 * (bucket * self._channels + channel) for bucket in buckets for channel in channels]
        sums = [sum((self._sums.get(column + kind) for column in columns), Fraction()) for kind in range(3)]
        mean = sums[MEAN] / values
        return float(mean), math.sqrt(float((sums[SQUARE] + sums[VARIANCE]) / values - mean * mean))


def _flatten(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """Return the values of all lists in a column, one after the other."""
    column = rows[name]
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
