"""Measure the time that a unit spends in each stage."""

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from pipeline.records import Seconds

Out = TypeVar("Out")


class StageTimer:
    """Add up the seconds of each stage of a unit (`Seconds`)."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

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
        for name, more in seconds.items():
            self.spent[name] += more

    def wait(self, decoding: Future[Out]) -> Out:
        """Return the result of a call that decodes an image. Waiting for it counts as the stage `starved`."""
        with self.stage("starved"):
            return decoding.result()

    @property
    def seconds(self) -> Seconds:
        """The seconds of each stage, rounded to milliseconds."""
        return Seconds(**{name: round(spent, 3) for name, spent in self.spent.items()})
