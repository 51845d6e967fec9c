"""The order of an epoch: which rows each rank and worker gets at each step. A pure function of the index.

The batches of all windows (`latentmill.loading.windows`) are numbered. Each consumer, a rank or a worker of a rank, has
a contiguous run of them, in four lanes. It takes its next batch from a random lane, so that rows of four windows are
mixed while only these are in memory. All ranks have the same number of steps, known before anything is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentmill.errors import UsageError
from latentmill.loading.epoch_draws import LANE, LIMIT, ROWS, Draws, Int64s
from latentmill.loading.index import Index
from latentmill.loading.windows import LANES, RowSequence, Windows, arrange_groups, cut_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """What decides the order of an epoch, beside the index and the epoch.

    batch_size: rows of a batch. window: rows that are mixed with one another, on each rank or worker. seed: from 0 to
    2^63 - 1. shuffle: False: in the order of the cache. ends: "drop": only full batches, and the same number on each
    rank; the rest of the rows is left out. "pad": every row once; the batches are filled by rows that are not valid.
    world: number of ranks. workers: that each rank reads with; 0: the rank itself reads.
    Raises UsageError for other values.
    """

    batch_size: int
    window: int
    seed: int = 0
    shuffle: bool = True
    ends: Literal["drop", "pad"] = "drop"
    world: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        lowest = {"batch_size": 1, "window": 1, "seed": 0, "world": 1, "workers": 0}
        for name, low in lowest.items():
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < LIMIT:
                raise UsageError(f"{name} must be an integer of at least {low}, not {value!r}")
        if self.ends not in ("drop", "pad"):
            raise UsageError(f"ends must be 'drop' or 'pad', not {self.ends!r}")


class BatchPlan(NamedTuple):
    """A batch before it is read.

    step: within the plan, equal on all ranks. bucket: its index. rows: numbers of its rows in the cache, int64 [B].
    valid: bool [B]; False for rows that only fill the batch.
    """

    step: int
    bucket: int
    rows: Int64s
    valid: NDArray[np.bool_]


class GroupRead(NamedTuple):
    """A row group, and the first and the last step at which a consumer needs it."""

    group: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """The batches of a consumer in its order: step, number and segment of each, [n].

    A segment is a window in a lane. is_filled: whether the last batch repeats another and has no valid row.
    """

    steps: Int64s
    numbers: Int64s
    segments: Int64s
    is_filled: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpochOrder:
    """The order of an epoch, or of the rest of one. Steps are counted from 0. Made by `plan_epoch`."""

    index: Index
    settings: OrderSettings
    draws: Draws
    sequence: RowSequence
    windows: Windows

    @property
    def steps(self) -> int:
        """The number of batches of each rank."""
        spare = self.settings.world - 1 if self.settings.ends == "pad" else 0
        return (self.windows.count + spare) // self.settings.world

    @property
    def left_out(self) -> dict[tuple[int, int], int]:
        """The number of rows that are in no batch, by bucket, for buckets that have some."""
        used = np.minimum(self.windows.first + self.windows.batches, self.steps * self.settings.world)
        batches = np.maximum(0, used - self.windows.first)
        taken = np.bincount(self.windows.bucket, batches, len(self.index.buckets)) * self.settings.batch_size
        rest = np.diff(self.sequence.bounds) - taken.astype(np.int64)
        return {size: int(rows) for size, rows in zip(self.index.buckets, rest, strict=True) if rows > 0}

    def batches(self, rank: int = 0, worker: int = 0, first_step: int = 0) -> Iterator[BatchPlan]:
        """Yield the batches of a worker of a rank, from a step on. Worker w of W has the steps w, w + W, ..."""
        run, size = self._run(rank, worker), self.settings.batch_size
        last = {segment: place for place, segment in enumerate(run.segments.tolist())}
        open_rows: dict[int, Int64s] = {}
        for place in range(int(np.searchsorted(run.steps, first_step)), len(run.steps)):
            segment, number = int(run.segments[place]), int(run.numbers[place])
            window = segment % len(self.windows.first)
            if segment not in open_rows:
                open_rows[segment] = self.sequence.find_rows(self._permute_window(window))
            start = (number - int(self.windows.first[window])) * size
            rows = open_rows[segment][start : start + size]
            valid = np.arange(size) < (0 if run.is_filled and place == len(run.steps) - 1 else len(rows))
            yield BatchPlan(int(run.steps[place]), int(self.windows.bucket[window]), np.resize(rows, size), valid)
            if last[segment] == place:
                del open_rows[segment]

    def reads(self, rank: int = 0, worker: int = 0, first_step: int = 0) -> list[GroupRead]:
        """Return the groups that `batches` needs with the same arguments, by the first step that needs them.

        A group that two windows share is read twice only if they are far apart.
        """
        run = self._run(rank, worker)
        begin = int(np.searchsorted(run.steps, first_step))
        segments = run.segments[begin:]
        if not len(segments):
            return []
        unique, opens, counts = np.unique(segments, return_index=True, return_counts=True)
        closes = len(segments) - 1 - np.unique(segments[::-1], return_index=True)[1]
        needed = list[Int64s]()
        for segment, count in zip(unique.tolist(), counts.tolist(), strict=True):
            window = segment % len(self.windows.first)
            is_whole = count >= self.windows.batches[window]
            numbers = None if is_whole else run.numbers[begin:][segments == segment]
            needed.append(self._groups_of(window, numbers))
        owner = np.repeat(np.arange(len(unique)), [len(groups) for groups in needed])
        reads = _merge(np.concatenate(needed), opens[owner], closes[owner], unique[owner])
        steps = run.steps[begin:].tolist()
        groups = self.sequence.groups
        return sorted((GroupRead(int(groups[g]), steps[a], steps[b]) for g, a, b in reads), key=lambda read: read.first)

    def rows_after(self, steps: int) -> Int64s:
        """Return the rows that no rank had as valid ones at the steps before `steps`, sorted."""
        settings, done = self.settings, [np.zeros(0, np.int64)]
        for rank in range(settings.world):
            for worker in range(max(1, settings.workers)):
                run = self._run(rank, worker)
                real = len(run.steps) - run.is_filled
                done.append(run.numbers[: min(real, int(np.searchsorted(run.steps, steps)))])
        numbers = np.sort(np.concatenate(done))
        is_left = np.ones(int(self.sequence.bounds[-1]), np.bool_)
        windows, begins = np.unique(self.windows.find(numbers), return_index=True)
        for window, part in zip(windows.tolist(), np.split(numbers, begins[1:]), strict=True):
            is_left[self.sequence.find_ordinals(self._find_positions(window, part))] = False
        return self.sequence.find_rows(np.flatnonzero(is_left))

    def _run(self, rank: int, worker: int) -> _Run:
        """Return the batches of a consumer: its part of the numbered batches, in lanes that are mixed at random."""
        world, workers, count = self.settings.world, max(1, self.settings.workers), self.windows.count
        if not (0 <= rank < world and 0 <= worker < workers):
            raise UsageError(f"there is no worker {worker} of rank {rank} with {world} ranks of {workers} workers")
        steps = np.arange(worker, self.steps, workers)
        each, more = (self.steps, 0) if self.settings.ends == "drop" else divmod(count, world)
        first, real = rank * each + min(rank, more), each + (rank < more)
        sizes = [len(range(other, real, workers)) for other in range(workers)]
        first, real = first + sum(sizes[:worker]), sizes[worker]
        lane_count = LANES if self.settings.shuffle else 1
        lanes = np.repeat(np.arange(lane_count), [(real + lane) // lane_count for lane in range(lane_count)])
        lanes = lanes[self.draws.permute(real, LANE, rank * workers + worker)]
        numbers = np.empty(real, np.int64)
        numbers[np.argsort(lanes, kind="stable")] = np.arange(first, first + real)
        is_filled = len(steps) > real
        if is_filled:  # by a batch whose groups are in memory already, or by any
            numbers = np.append(numbers, numbers[-1] if real else rank % count)
            lanes = np.append(lanes, lanes[-1] if real else 0)
        segments = lanes * len(self.windows.first) + self.windows.find(numbers)
        return _Run(steps=steps, numbers=numbers, segments=segments, is_filled=is_filled)

    def _permute_window(self, window: int) -> Int64s:
        """Return the ordinals of the rows of a window in the order of its batches."""
        start, rows = int(self.windows.start[window]), int(self.windows.rows[window])
        return self.sequence.find_ordinals(start + self.draws.permute(rows, ROWS, start))

    def _find_positions(self, window: int, numbers: Int64s) -> Int64s:
        """Return the positions in the sequence of the rows of some batches of a window."""
        start, rows = int(self.windows.start[window]), int(self.windows.rows[window])
        slots, size = np.unique(numbers) - self.windows.first[window], self.settings.batch_size
        places = (slots[:, None] * size + np.arange(size)).ravel()
        positions: Int64s = start + self.draws.permute(rows, ROWS, start)[places[places < rows]]
        return positions

    def _groups_of(self, window: int, numbers: Int64s | None) -> Int64s:
        """Return the indexes in the sequence of the groups with the rows of some batches of a window; None: of all."""
        if numbers is not None:
            return np.unique(self.sequence.find_groups(self._find_positions(window, numbers)))
        start, rows = int(self.windows.start[window]), int(self.windows.rows[window])
        first, last = self.sequence.find_groups(np.array([start, start + rows - 1]))
        return np.arange(first, last + 1)


def _merge(groups: Int64s, opens: Int64s, closes: Int64s, segments: Int64s) -> list[tuple[int, int, int]]:
    """Merge the uses of each group that overlap, or that follow one another in a lane: (group, first, last)."""
    order = np.lexsort((opens, groups))
    groups, opens, closes, segments = groups[order], opens[order], closes[order], segments[order]
    span = int(closes.max()) + 1
    latest = np.maximum.accumulate(groups * span + closes) - groups * span  # close of the uses of a group until here
    is_new = np.ones(len(groups), np.bool_)
    is_new[1:] = (groups[1:] != groups[:-1]) | ((opens[1:] > latest[:-1]) & (segments[1:] != segments[:-1] + 1))
    begins = np.flatnonzero(is_new)
    last = np.maximum.reduceat(closes, begins)
    return list(zip(groups[begins].tolist(), opens[begins].tolist(), last.tolist(), strict=True))


def plan_epoch(index: Index, settings: OrderSettings, epoch: int, left: Int64s | None = None) -> EpochOrder:
    """Return the order of an epoch.

    left: the rows that the epoch still has, sorted; None: all. It depends on nothing but the arguments.
    """
    if not 0 <= epoch < LIMIT:
        raise UsageError(f"epoch must be from 0 to 2^63 - 1, not {epoch}")
    draws = Draws(settings.seed, epoch, settings.shuffle)
    sequence = arrange_groups(index, draws, left)
    windows = cut_windows(sequence, draws, settings.batch_size, settings.window, settings.ends == "pad")
    return EpochOrder(index=index, settings=settings, draws=draws, sequence=sequence, windows=windows)
