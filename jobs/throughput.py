"""The throughput of a job over the last minute, and the time of its workers."""

import time
from collections import deque

WINDOW = 60.0  # seconds


class Throughput:
    """What is done per second over about the last minute, from counts that only grow, such as images."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, float]] = deque()

    def note(self, count: float) -> None:
        """Record the count so far."""
        now = time.monotonic()
        self._counts.append((now, count))
        while len(self._counts) > 2 and now - self._counts[1][0] >= WINDOW:  # keep one entry of that age
            self._counts.popleft()

    @property
    def rate(self) -> float:
        """The count per second; 0 before there are two counts."""
        if len(self._counts) < 2:
            return 0.0
        (start, before), (end, count) = self._counts[0], self._counts[-1]
        return (count - before) / (end - start) if end > start else 0.0


class WorkerTime:
    """Seconds for which workers were ready, summed over the workers, and the share of it in which their models ran."""

    def __init__(self, workers: float) -> None:
        self.seconds = 0.0
        self._workers, self._noted_at = workers, time.monotonic()
        self._ready, self._busy = Throughput(), Throughput()

    def note(self, workers: float, busy_seconds: float) -> None:
        """Record the number of workers that are ready now, and the seconds for which models ran so far."""
        now = time.monotonic()
        self.seconds += self._workers * (now - self._noted_at)
        self._workers, self._noted_at = workers, now
        self._ready.note(self.seconds)
        self._busy.note(busy_seconds)

    @property
    def busy_share(self) -> float | None:
        """The share of the workers' time over the last minute in which models ran, from 0 to 1.

        None if no worker was ready.
        """
        return min(self._busy.rate / self._ready.rate, 1.0) if self._ready.rate else None
