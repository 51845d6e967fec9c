"""Indexes of caches that do not exist, for tests of the order."""

import hashlib
from collections.abc import Sequence

import numpy as np

from latentmill.loading.index import Index


def make_index(groups: Sequence[tuple[int, int]], buckets: int = 2, row_bytes: int = 8192) -> Index:
    """Return the index of one file with these groups: the bucket and the rows of each."""
    bucket, rows = np.array(groups or np.zeros((0, 2)), np.int64).reshape(-1, 2).T
    stop = np.cumsum(rows * row_bytes)
    return Index(
        files=("data/00000.parquet",),
        sizes=np.array([rows.sum() * row_bytes]),
        buckets=tuple((512, 512 + 64 * number) for number in range(buckets)),
        row_bytes=np.full(buckets, row_bytes),
        file=np.zeros(len(rows), np.int32),
        bucket=bucket.astype(np.int32),
        rows=rows,
        start=stop - rows * row_bytes,
        stop=stop,
        fingerprint=hashlib.sha256(str(list(groups)).encode()).hexdigest(),
    )


def split_rows(rows: Sequence[int], group_rows: int) -> list[tuple[int, int]]:
    """Return the groups of some rows of each bucket, of at most `group_rows` rows, the buckets in turns."""
    parts = [
        (start, bucket, min(group_rows, count - start))
        for bucket, count in enumerate(rows)
        for start in range(0, count, group_rows)
    ]
    return [(bucket, count) for _, bucket, count in sorted(parts)]
