"""The images of each worker over time, for the record of a run."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.executor import WorkerProgress
from pipeline.cache.runs import utc_now

MAX_INTERVALS, MIN_INTERVALS = 64, 8
MAX_COUNTS = 16_384  # of all workers: the record is written every 30 seconds


@dataclass(slots=True)
class WorkerCounts:
    """The images that a worker encoded in each interval from the number `first` on, and its progress so far."""

    first: int
    images: list[int] = field(default_factory=list)
    progress: WorkerProgress = WorkerProgress(0, 0.0)

    def add(self, interval: int, progress: WorkerProgress) -> None:
        """Count what the worker did since the last call in this interval."""
        self.images += [0] * (interval - self.first + 1 - len(self.images))
        self.images[-1] += progress.images - self.progress.images
        self.progress = progress

    def merge_pairs(self) -> None:
        """Make each interval twice as long."""
        even = [0] * (self.first % 2) + self.images + [0]
        self.images = [sum(pair) for pair in zip(even[::2], even[1::2], strict=False)]
        self.first //= 2


class WorkerThroughput:
    """Counts the images of each worker in intervals of equal length.

    The longer the run, and the more workers, the longer the intervals.
    clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 1  # of an interval
        self._clock, self._began, self._started = clock, clock(), utc_now()
        self._workers: dict[str, WorkerCounts] = {}
        self._elapsed = 0.0  # until the last call of `note`

    def note(self, progress: Mapping[str, WorkerProgress]) -> None:
        """Record the progress of the workers that run now, by their labels. Call this about once per second."""
        limit = max(MIN_INTERVALS, min(MAX_INTERVALS, MAX_COUNTS // max(1, len(self._workers | progress.keys()))))
        self._elapsed = self._clock() - self._began
        while (interval := int(self._elapsed / self.seconds)) >= limit:
            self.seconds *= 2
            for worker in self._workers.values():
                worker.merge_pairs()
        for name, each in progress.items():
            self._workers.setdefault(name, WorkerCounts(interval)).add(interval, each)

    def describe(self) -> dict[str, Any]:
        """Return the counts as they are stored in the record of a run."""
        workers = {
            name: {
                "first": each.first,
                "images": list(each.images),
                "busy_seconds": round(each.progress.busy_seconds, 3),
            }
            for name, each in self._workers.items()
        }
        elapsed = round(self._elapsed, 3)
        return {"started": self._started, "elapsed": elapsed, "seconds": self.seconds, "workers": workers}
