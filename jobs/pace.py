"""How fast a job is: images a second over the last minute, and how many workers' time it had."""

import time
from collections import deque

WINDOW = 60.0  # seconds


class Throughput:
    """Images a second over about the last minute, from counts that only grow."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, images: int) -> None:
        """Take in how many images there are by now."""
        now = time.monotonic()
        self._seen.append((now, images))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:  # keep one that is a window old
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Images a second; 0 before there is anything to compare."""
        if len(self._seen) < 2:
            return 0.0
        (start, before), (end, images) = self._seen[0], self._seen[-1]
        return (images - before) / (end - start) if end > start else 0.0


class WorkerTime:
    """Seconds for which workers were ready, summed over the workers."""

    def __init__(self, workers: float) -> None:
        self.seconds = 0.0
        self._workers, self._at = workers, time.monotonic()

    def note(self, workers: float) -> None:
        """Take in how many are ready by now."""
        now = time.monotonic()
        self.seconds += self._workers * (now - self._at)
        self._workers, self._at = workers, now
