"""The state of a run of workers, as it is shown, recorded and published while the run goes on."""

from jobs.executor import Executor, TaskCounts
from jobs.metrics import Metrics
from jobs.progress import ProgressMeter, describe_work, log_unit
from jobs.run_recorder import RunRecorder
from jobs.throughput import WorkerTime
from jobs.totals import RunTotals, describe_totals
from jobs.worker_throughput import WorkerThroughput
from pipeline.cache.part_info import UnitReport


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
