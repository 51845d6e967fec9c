"""Measure the time that a unit spends in each stage."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.records import Seconds


class StageTimer:
    """Add up the seconds of each stage of a unit (`Seconds`). Threads may share it."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - start})

    def add(self, **seconds: float) -> None:
        """Add times that were measured elsewhere, by stage."""
        with self._lock:
            for name, more in seconds.items():
                self.spent[name] += more

    @property
    def elapsed(self) -> float:
        """Seconds since the unit began."""
        return time.perf_counter() - self.started

    @property
    def seconds(self) -> Seconds:
        """The seconds of each stage, rounded to milliseconds."""
        return Seconds(**{name: round(spent, 3) for name, spent in self.spent.items()})
