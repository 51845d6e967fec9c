"""The driver's loop, which is the same for every executor."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.executor import Executor, Task, TaskCounts, TaskResult
from jobs.messages import log_info
from jobs.outage import Outage
from jobs.scheduler import Failure, Scheduler
from jobs.signals import Signals

TICK_SECONDS = 1.0  # between two calls of `on_tick`, for many tasks may end in a second


@dataclass(slots=True)
class RunResult:
    """The tasks that failed for good, and the time from the first ready worker to the end of the last task.

    seconds: 0 if no worker was ever ready.
    """

    failures: Sequence[Failure] = ()
    seconds: float = 0.0


def run_tasks(
    tasks: Sequence[Task],
    executor: Executor,
    signals: Signals,
    on_done: Callable[[Any], None],
    on_tick: Callable[[TaskCounts], None],
    probe: Callable[[Any], None] = lambda task: None,
    stall_timeout: float = 600.0,
    clock: Callable[[], float] = time.monotonic,
    find_more: Callable[[], Sequence[Task]] = tuple,
) -> RunResult:
    """Run all tasks. The scheduler assigns tasks to workers, and classifies failures.

    on_done is called with the report of each task that succeeded, on_tick about once per second,
    at the end, and when a worker becomes ready or is lost, so that the workers' time is counted from then on.
    probe: accesses the storage that a task needs, and raises LatentmillError if the storage does not answer. No task
    is started during an outage, which may last at most `stall_timeout` seconds.
    find_more: returns further tasks, which follow from the results of the others. It is called when no task is left.
    Returns the tasks that failed for good, and the time.
    Raises Stopped if a signal arrived, JobError if no worker or no storage works.
    """
    scheduler = Scheduler(tasks, executor.can_replace, clock, executor.tasks_per_worker)
    outage = Outage(probe, stall_timeout, clock)
    result, ready, next_tick = RunResult(scheduler.failures), 0.0, clock()
    with signals.polled():
        while scheduler.waiting or scheduler.under_way or scheduler.add(find_more()):
            signals.check()
            if not outage.poll():
                for worker, reason in list(scheduler.find_faulty(executor.workers)):
                    executor.replace(worker, reason)
            elif outage.is_certain:
                scheduler.forget_failures()
            workers = executor.workers
            ready = ready or (time.perf_counter() if workers else 0.0)
            while not outage.is_on and (assignment := scheduler.assign_next(workers, executor.starting)):
                executor.submit(assignment.task, assignment.attempt, assignment.worker)
            for done in executor.wait(1.0, scheduler.waiting):
                if done.error is None:
                    scheduler.record_success(done)
                    outage.record_success(done.worker)
                    on_done(done.report)
                else:
                    handle_failure(done, scheduler, outage, len(workers), signals)
            result.seconds = time.perf_counter() - ready if ready else 0.0
            is_last = signals.stop.is_set() or not (scheduler.waiting or scheduler.under_way)
            if is_last or executor.workers != workers or clock() >= next_tick:
                next_tick = clock() + TICK_SECONDS
                on_tick(TaskCounts(scheduler.waiting, scheduler.under_way, len(scheduler.failures)))
    signals.check()
    return result


def handle_failure(done: TaskResult, scheduler: Scheduler, outage: Outage, workers: int, signals: Signals) -> None:
    """Report a task that failed to the scheduler, the outage detector and the user. workers: how many are ready."""
    is_retried = scheduler.record_failure(done)
    if done.cause == "storage":
        outage.record_failure(done, workers)
    if outage.is_certain:
        scheduler.forget_failures()
    if outage.is_on or signals.stop.is_set():  # an outage is logged only once, and a stop makes the tasks fail
        return
    if is_retried and done.cause != "returned":
        log_info(f"retrying unit {done.task.name}: {done.error}")
