"""Where the progress of a run is published. Only Ray has a place for it (`jobs.ray_metrics`)."""

from typing import Protocol

from jobs.executor import Executor, TaskCounts
from jobs.progress import ProgressMeter
from pipeline.cache.part_info import UnitReport


class Metrics(Protocol):
    """Publishes the progress of a run."""

    def add_unit(self, done: UnitReport, input_bytes: int) -> None:
        """Add a unit that succeeded. input_bytes: the bytes of its input."""
        ...

    def publish(
        self, meter: ProgressMeter, executor: Executor, tasks: TaskCounts, device_busy: float | None = None
    ) -> None:
        """Publish the current state. Called about once per second."""
        ...


class NoMetrics:
    """Publishes nothing."""

    def add_unit(self, done: UnitReport, input_bytes: int) -> None:
        pass

    def publish(
        self, meter: ProgressMeter, executor: Executor, tasks: TaskCounts, device_busy: float | None = None
    ) -> None:
        pass
