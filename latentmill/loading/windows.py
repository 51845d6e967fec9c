"""The windows of an epoch: rows that are permuted with one another, and are whole batches of one bucket.

The groups of each bucket are permuted, and their rows form a sequence, one bucket after the other. It is cut into
windows. Four consecutive windows of a bucket are a stretch, and the stretches of all buckets are permuted. So buckets
alternate, and most neighbors in the sequence stay neighbors: they share a group, which is then read once.
"""

from dataclasses import dataclass

import numpy as np

from latentmill.loading.epoch_draws import GROUPS, ROLL, STRETCHES, TAILS, Draws, Int64s
from latentmill.loading.index import Index

LANES = 4  # windows that a consumer has open, and windows of a stretch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSequence:
    """The rows of an epoch, bucket by bucket, in the order of their permuted groups.

    A row is told by its ordinal: its index in `left`, or its number in the cache if `left` is None.
    left: the rows of the cache that the epoch still has, sorted; None for all. groups: those with such rows, in order.
    first: position of the first row of each. origin: ordinal of the first row of each. bounds: of each bucket, the
    first position; and the number of rows as the last value.
    """

    left: Int64s | None
    groups: Int64s
    first: Int64s
    origin: Int64s
    bounds: Int64s

    def find_groups(self, positions: Int64s) -> Int64s:
        """Return the index in `groups` of the group at each position."""
        return np.searchsorted(self.first, positions, side="right") - 1

    def find_ordinals(self, positions: Int64s) -> Int64s:
        """Return the ordinal of the row at each position."""
        group = self.find_groups(positions)
        return self.origin[group] + positions - self.first[group]

    def find_rows(self, ordinals: Int64s) -> Int64s:
        """Return the number in the cache of each ordinal."""
        return ordinals if self.left is None else self.left[ordinals]


def arrange_groups(index: Index, draws: Draws, left: Int64s | None) -> RowSequence:
    """Return the sequence of the rows of an epoch."""
    if left is None:
        counts, origin = index.rows, index.starts
    else:
        origin = np.searchsorted(left, index.starts).astype(np.int64)
        counts = np.diff(origin, append=len(left))
    groups, bounds = list[Int64s](), [0]
    for bucket in range(len(index.buckets)):
        members = np.flatnonzero((index.bucket == bucket) & (counts > 0))
        groups.append(members[draws.permute(len(members), GROUPS, bucket)])
        bounds.append(bounds[-1] + int(counts[members].sum()))
    order = np.concatenate([np.zeros(0, np.int64), *groups])
    first = np.cumsum(counts[order]) - counts[order]
    return RowSequence(left=left, groups=order, first=first, origin=origin[order], bounds=np.array(bounds))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """The windows of an epoch, in the order in which their batches are numbered.

    Of each window, bucket: its index. start: its position in the sequence. rows, batches: their number. The rows
    beyond its batches are left out. first: number of its first batch. count: of all batches.
    """

    bucket: Int64s
    start: Int64s
    rows: Int64s
    batches: Int64s
    first: Int64s
    count: int

    def find(self, batches: Int64s) -> Int64s:
        """Return the window of each batch, by its number."""
        return np.searchsorted(self.first, batches, side="right") - 1


def cut_windows(sequence: RowSequence, draws: Draws, batch_size: int, window: int, with_tails: bool) -> Windows:
    """Cut a sequence into windows of at most a quarter of `window` rows, but at least a batch.

    The rows of a bucket that fill no batch are in one of its windows, so that other rows are left out each epoch.
    with_tails: they are a batch of fewer rows.
    """
    quarter = max(1, window // LANES // batch_size)  # batches
    parts, stretches, stretch_count = list[Int64s](), list[Int64s](), 0
    for bucket, (begin, end) in enumerate(zip(sequence.bounds[:-1], sequence.bounds[1:], strict=True)):
        full, tail = divmod(int(end - begin), batch_size)
        if full + (with_tails and tail > 0) == 0:
            continue
        count = max(1, -(-full // quarter))
        batches = full // count + (np.arange(count) < full % count)
        rows = batches * batch_size
        chosen = count - 1 - draws.below(count, TAILS, bucket)
        rows[chosen] += tail
        batches[chosen] += with_tails and tail > 0
        starts = begin + np.cumsum(rows) - rows
        parts.append(np.stack([np.full(count, bucket), starts, rows, batches]))
        stretches.append(stretch_count + np.arange(count) // LANES)
        stretch_count = int(stretches[-1][-1]) + 1
    table = np.concatenate([np.zeros((4, 0), np.int64), *parts], axis=1)
    table = table[:, _arrange_windows(sequence, draws, table[1], stretches, stretch_count)]
    bucket, start, rows, batches = table
    ends = np.cumsum(batches)
    total = int(ends[-1]) if len(ends) else 0
    return Windows(bucket=bucket, start=start, rows=rows, batches=batches, first=ends - batches, count=total)


def _arrange_windows(
    sequence: RowSequence, draws: Draws, starts: Int64s, stretches: list[Int64s], stretch_count: int
) -> Int64s:
    """Return the order of the windows: their stretches permuted; without randomness, by their first row in the cache.

    It begins at a random window, so that the last batches, which may be left out, are not those of a stretch's end.
    """
    if not len(starts) or not draws.is_random:
        return np.argsort(sequence.find_ordinals(starts), kind="stable")
    place = np.empty(stretch_count, np.int64)
    place[draws.permute(stretch_count, STRETCHES)] = np.arange(stretch_count)
    order = np.argsort(place[np.concatenate(stretches)], kind="stable")
    return np.roll(order, draws.below(len(order), ROLL))
