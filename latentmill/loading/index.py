"""The row groups of a cache: where they are, their bucket and their rows. From it, an epoch is planned without reading.

A row group is what is read by one request: consecutive rows of one bucket in one file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from latentmill.cache import Cache

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Index:
    """The row groups of a cache. Row r of the cache is row r of the concatenation of its files, sorted by name.

    files: "data/<part>.parquet" or ".tar", sorted. sizes: bytes of each file. buckets: (height, width) in pixels,
    sorted. row_bytes: of each bucket, the bytes of the latents of a row. fingerprint: sha256 over the files, their
    bytes and the rows of their groups; readers with equal ones plan the same epochs.

    Of each group, in the order of the rows: file, bucket: their indexes. rows: their number. start, stop: the first
    byte in the file, and the byte after the last.
    """

    files: tuple[str, ...]
    sizes: Int64s
    buckets: tuple[tuple[int, int], ...]
    row_bytes: Int64s
    file: Int32s
    bucket: Int32s
    rows: Int64s
    start: Int64s
    stop: Int64s
    fingerprint: str

    @property
    def starts(self) -> Int64s:
        """The number of the first row of each group."""
        return np.cumsum(self.rows) - self.rows

    @property
    def row_count(self) -> int:
        """The number of rows of the cache."""
        return int(self.rows.sum())


def read_index(cache: "Cache", files: Sequence[str] | None = None) -> Index:
    """Return the row groups of a cache.

    files: those to read, sorted; None: all that the cache has now. What index.parquet has of them is taken from there,
    if it has the right size. Other files are asked one by one, in a few threads.
    Raises CacheError, which names the file, if one of them is no part of the cache, and StorageError.
    """
    raise NotImplementedError
