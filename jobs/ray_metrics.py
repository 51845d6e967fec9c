"""The progress of a run as metrics of Ray, which each node exports to Prometheus (docs/monitoring.md).

The driver publishes what it collects anyway. Ray adds the prefix `ray_`, and `_total` to the name of a counter.
"""

from dataclasses import asdict

from ray.util.metrics import Counter, Gauge, Histogram

from jobs.executor import Executor, TaskCounts
from jobs.progress import ProgressMeter
from pipeline.cache.part_info import UnitReport
from pipeline.errors import REST_OF_SHARD

UNIT_SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]  # the upper ends of the histogram's buckets


class RayMetrics:
    """The metrics of a run, with its verb and the URL of its cache as tags.

    units_done: how many of the planned units were done before the run.
    """

    def __init__(self, verb: str, cache: str, units_done: int = 0) -> None:
        self.tags = {"verb": verb, "cache": cache}
        self.images = 0
        self.units_done = units_done
        self.restarts = 0
        count, gauge = self._count, self._gauge
        self._images = count("images", "Images that went through the model")
        self._samples = count("samples", "Samples of finished units: rows, rejects and those that a setting left out")
        self._rejects = count("rejects", "Rejected samples of finished units", "reason")
        self._damaged = count("damaged_shards", "Shards whose rest was rejected")
        self._read_bytes = count("read_bytes", "Bytes of the inputs of finished units")
        self._written_bytes = count("written_bytes", "Bytes of the parts of finished units")
        self._stage_seconds = count("stage_seconds", "Seconds of finished units in each stage", "stage")
        self._restarts = count("worker_restarts", "Workers that were lost or replaced")
        self._device_busy = gauge("device_busy", "Share of the workers' time in the last minute in which models ran")
        self._units = gauge("units", "Units in each state: done, waiting, under_way, failed", "state")
        self._workers = gauge("workers", "Workers in each state: ready, starting", "state")
        self._unit_seconds = Histogram(
            "latentmill_unit_seconds", "Seconds from the start of a unit to its commit", UNIT_SECONDS, tuple(self.tags)
        )
        self._unit_seconds.set_default_tags(self.tags)

    def _count(self, name: str, text: str, *tags: str) -> Counter:
        counter = Counter(f"latentmill_{name}", text, (*self.tags, *tags))
        counter.set_default_tags(self.tags)
        return counter

    def _gauge(self, name: str, text: str, *tags: str) -> Gauge:
        gauge = Gauge(f"latentmill_{name}", text, (*self.tags, *tags))
        gauge.set_default_tags(self.tags)
        return gauge

    def add_unit(self, done: UnitReport, input_bytes: int) -> None:
        """Add a unit that succeeded. input_bytes: the bytes of its input."""
        self.units_done += 1
        add(self._samples, done.samples)
        add(self._read_bytes, input_bytes)
        add(self._written_bytes, done.bytes)
        for reason, rejects in done.rejects.items():
            add(self._rejects, rejects, reason=reason)
        add(self._damaged, done.rejects.get(REST_OF_SHARD, 0))
        for stage, seconds in asdict(done.seconds).items():
            add(self._stage_seconds, seconds, stage=stage)
        if done.elapsed:
            self._unit_seconds.observe(done.elapsed)

    def publish(
        self, meter: ProgressMeter, executor: Executor, tasks: TaskCounts, device_busy: float | None = None
    ) -> None:
        """Publish the current state, about once per second.

        device_busy: the share of the workers' time in which models ran, from 0 to 1; None if it is unknown.
        """
        add(self._images, meter.images - self.images)
        add(self._restarts, executor.restarts - self.restarts)
        self.images, self.restarts = meter.images, executor.restarts
        if device_busy is not None:
            self._device_busy.set(device_busy)
        for state, units in {"done": self.units_done, **asdict(tasks)}.items():
            self._units.set(units, {"state": state})
        self._workers.set(len(executor.workers), {"state": "ready"})
        self._workers.set(executor.starting, {"state": "starting"})


def add(counter: Counter, value: float, **tags: str) -> None:
    """Add to a counter. Ray refuses zeros."""
    if value > 0:
        counter.inc(value, tags)
