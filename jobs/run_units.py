"""The driver's loop, the same with Ray and without; and how a signal ends it."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from jobs.engine import Executor, Task, TaskResult
from jobs.messages import log_info
from jobs.outage import Outage
from jobs.scheduler import Failure, Scheduler
from pipeline.errors import Stopped


@dataclass(slots=True)
class RunResult:
    """How a drive went. seconds: from the moment the first worker was ready to the end of the last task."""

    failures: Sequence[Failure] = ()
    seconds: float = 0.0


class Signals:
    """Whether a signal has asked us to stop, and which.

    Where the program looks at it all the time, in `drive`, a signal is noted; elsewhere Stopped is raised at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.stop = threading.Event()
        self._looking = False

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.stop.is_set():
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        if self.number:
            return
        self.number = number
        self.stop.set()
        if not self._looking:
            raise Stopped

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take in SIGINT and SIGTERM inside this block."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Inside this block `check` is called often."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False


def run_with_signals(job: Callable[[Signals], int], told: str) -> int:
    """Run a job; its exit code, or the one of the signal that ended it. told: what is said then."""
    signals = Signals()
    try:
        with signals.caught():
            return job(signals)
    except Stopped:
        log_info(f"stopped; {told}")
        return signals.exit_code


def run_tasks(
    tasks: Sequence[Task],
    engine: Executor,
    signals: Signals,
    on_done: Callable[[Any], None],
    on_tick: Callable[[], None],
    probe: Callable[[Any], None] = lambda task: None,
    stall_timeout: float = 600.0,
    clock: Callable[[], float] = time.monotonic,
) -> RunResult:
    """Run all tasks. Which one runs where, and what a failure means, is for the scheduler.

    on_done gets the report of each task that succeeded; on_tick is called about once a second.
    probe: asks the storage that a task needs, and raises LatentmillError if it does not answer. While it does not, no
    task is started, for at most `stall_timeout` seconds.
    Returns the tasks that were given up, and the time it took.
    Raises Stopped if a signal asked for it, JobError if no worker or no storage works.
    """
    scheduler, outage = Scheduler(tasks, engine.can_replace, clock), Outage(probe, stall_timeout, clock)
    driven, ready = RunResult(scheduler.failures), 0.0
    with signals.looked_at():
        while scheduler.waiting or scheduler.under_way:
            signals.check()
            if not outage.holds():
                for worker, why in list(scheduler.sick(engine.workers)):
                    engine.replace(worker, why)
            elif outage.is_certain:
                scheduler.forget_strikes()
            workers = engine.workers
            ready = ready or (time.perf_counter() if workers else 0.0)
            while not outage.is_on and (given := scheduler.next(workers, engine.starting)):
                engine.submit(given.task, given.attempt, given.worker)
            for done in engine.wait(1.0, scheduler.waiting):
                if done.error is None:
                    scheduler.succeeded(done)
                    outage.succeeded(done.worker)
                    on_done(done.report)
                else:
                    handle_failure(done, scheduler, outage, len(workers), signals)
            on_tick()
            driven.seconds = time.perf_counter() - ready if ready else 0.0
    signals.check()
    return driven


def handle_failure(done: TaskResult, scheduler: Scheduler, outage: Outage, workers: int, signals: Signals) -> None:
    """Tell the scheduler of a task that failed, and the user. workers: how many are ready."""
    is_tried_again = scheduler.failed(done)
    if done.cause == "storage":
        outage.failed(done, workers)
    if outage.is_certain:
        scheduler.forget_strikes()
    if outage.is_on or signals.stop.is_set():  # an outage is said once; with a stop, the task was stopped
        return
    if is_tried_again and done.cause != "returned":
        log_info(f"to be tried again: {done.task.name}: {done.error}")
