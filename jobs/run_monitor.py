"""The state of a run of workers, as it is shown, recorded and published while the run goes on."""

import logging
from dataclasses import asdict
from typing import Any

from jobs.executor import Executor, TaskCounts
from jobs.messages import get_shown_level, log_debug, log_warning
from jobs.metrics import Metrics
from jobs.progress import ProgressMeter
from jobs.run_recorder import RunRecorder
from jobs.throughput import WorkerTime
from jobs.totals import RunTotals, describe_totals
from jobs.worker_throughput import WorkerThroughput
from pipeline.cache.part_info import UnitReport
from pipeline.wording import count_noun


class RunMonitor:
    """Passes finished units and the state of the workers on to the progress bar, the run's record and the metrics.

    totals: receives the finished units.
    """

    def __init__(
        self, executor: Executor, meter: ProgressMeter, recorder: RunRecorder, metrics: Metrics, totals: RunTotals
    ) -> None:
        self.executor, self.meter, self.recorder, self.metrics = executor, meter, recorder, metrics
        self.totals = totals
        self._worker_time, self._throughput = WorkerTime(len(executor.workers)), WorkerThroughput()

    def add(self, done: UnitReport, size: int, input_bytes: int) -> None:
        """Add a unit that succeeded. size: of the unit, in the units of the meter. input_bytes: of its input."""
        self.totals.add(done)
        log_unit(done)
        self.metrics.add_unit(done, input_bytes)
        self.meter.task_done(size, done.encoded, sum(done.rejects.values()))

    def tick(self, tasks: TaskCounts) -> None:
        """Pass on the state of the workers. Call this about once per second."""
        executor, meter, totals = self.executor, self.meter, self.totals
        meter.tick(executor.images, executor.waiting_for)
        self._worker_time.note(len(executor.workers), executor.busy_seconds)
        self._throughput.note(executor.progress)
        totals.worker_seconds, totals.busy_last_minute = self._worker_time.seconds, self._worker_time.busy_share
        facts = {**describe_totals(totals), **meter.facts, **describe_work(executor, tasks)}
        self.recorder.update(**facts, throughput=self._throughput.describe())
        self.metrics.publish(meter, executor, tasks, totals.busy_last_minute)


def describe_work(executor: Executor, counts: TaskCounts) -> dict[str, Any]:
    """Return the state of the workers and of the tasks for the record of a run."""
    return {
        "workers": {
            "ready": len(executor.workers),
            "starting": executor.starting,
            "restarts": executor.restarts,
        },
        "tasks": asdict(counts),
    }


def log_unit(done: UnitReport) -> None:
    """Log the result of a unit: damage as a warning, and the rest for debugging."""
    if done.damage:
        log_warning(f"damaged: {done.damage}; what could be read of it is in the cache, the rest is rejected")
    if get_shown_level() > logging.DEBUG:
        return
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in asdict(done.seconds).items())
    counts = {"row": done.rows, "reject": sum(done.rejects.values()), "part": done.parts}
    work = ", ".join(count_noun(number, noun) for noun, number in counts.items())
    log_debug(f"unit {done.unit}: {work} ({spent})")
