"""The throughput of a job over the last minute, and the time of its workers."""

import time
from collections import deque

WINDOW = 60.0  # seconds


class Throughput:
    """Images per second over about the last minute, from counts that only grow."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()

    def note(self, images: int) -> None:
        """Record the number of images so far."""
        now = time.monotonic()
        self._counts.append((now, images))
        while len(self._counts) > 2 and now - self._counts[1][0] >= WINDOW:  # keep one entry of that age
            self._counts.popleft()

    @property
    def rate(self) -> float:
        """Images per second; 0 before there are two counts."""
        if len(self._counts) < 2:
            return 0.0
        (start, before), (end, images) = self._counts[0], self._counts[-1]
        return (images - before) / (end - start) if end > start else 0.0


class WorkerTime:
    """Seconds for which workers were ready, summed over the workers."""

    def __init__(self, workers: float) -> None:
        self.seconds = 0.0
        self._workers, self._noted_at = workers, time.monotonic()

    def note(self, workers: float) -> None:
        """Record the number of workers that are ready now."""
        now = time.monotonic()
        self.seconds += self._workers * (now - self._noted_at)
        self._workers, self._noted_at = workers, now
