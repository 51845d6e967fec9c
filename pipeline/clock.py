"""Where the time of a unit goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from pipeline.records import Seconds

Out = TypeVar("Out")


class StageClock:
    """Seconds in each stage of a unit's way (`Seconds`)."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - start})

    def add(self, **seconds: float) -> None:
        """Count time that was measured elsewhere."""
        for name, more in seconds.items():
            self.spent[name] += more

    def wait(self, opening: Future[Out]) -> Out:
        """The result of a call that opens an image; waiting for it is the stage `starved`."""
        with self.stage("starved"):
            return opening.result()

    @property
    def seconds(self) -> Seconds:
        return Seconds(**{name: round(spent, 3) for name, spent in self.spent.items()})
