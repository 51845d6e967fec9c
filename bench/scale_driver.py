"""What the driver of a job costs with many workers: CPU time for each task, and the share of a core.

    python -m bench.scale_driver [--workers 1000] [--tasks 1000000] [--real]

No worker does any work. The scheduler is measured with workers that complete each task at once. The executor is
measured in real time with simulated workers (`bench.simulated_ray`), which take 30 s for a task: the CPU time of the
main thread is that of the driver's Python code, without Ray. With --real, Ray's own time is measured as well: the calls
of all simulated workers go to one actor of a local Ray, and the CPU time is that of the whole process.

The exit code is 1 if a task costs the scheduler more than 50 us, or if the driver takes more than 10% of a core.
"""

import argparse
import asyncio
import heapq
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.simulated_ray import Answer, SimulatedActor, SimulatedRef, simulated_ray
from jobs.executor import Executor, TaskCounts, TaskResult
from jobs.progress import ProgressMeter
from jobs.ray_executor import Counters, RayExecutor, ray
from jobs.ray_node import WorkerLocation
from jobs.run_monitor import log_unit
from jobs.run_tasks import run_tasks
from jobs.signals import Signals
from jobs.totals import RunTotals, describe_totals
from pipeline.cache.part_info import UnitReport
from pipeline.errors import Stopped
from pipeline.records import Attempt, Seconds

MOST_MICROSECONDS, MOST_SHARE = 50.0, 0.1
TASK_SECONDS, STALL_TIMEOUT = 30.0, 600.0


@dataclass(frozen=True)
class Task:
    name: str


@dataclass(frozen=True)
class Spec:
    """The part of a WorkerSpec that an executor reads."""

    tasks_per_worker: int = 2


@dataclass(frozen=True)
class DriverCost:
    """The CPU time of a driver. share: of one core. calls: of actors' methods for their progress, per second."""

    workers: int
    tasks: int
    cpu_seconds: float
    wall_seconds: float
    calls: float = 0.0

    @property
    def microseconds_per_task(self) -> float:
        return 1e6 * self.cpu_seconds / max(self.tasks, 1)

    @property
    def share(self) -> float:
        return self.cpu_seconds / self.wall_seconds


def make_report(task: Task) -> UnitReport:
    seconds = Seconds(read=1.0, open=3.0, encode=2.0, write=0.1)
    return UnitReport(unit=task.name, samples=100, rows=99, rejects={"empty": 1}, parts=1, encoded=99, seconds=seconds)


@dataclass
class InstantExecutor:
    """Completes tasks at once, one for each `wait`, which is the dearest way for the driver's loop."""

    workers: Sequence[str]
    tasks_per_worker: int = 2
    running: deque[tuple[Task, str]] = field(default_factory=deque)
    images = starting = restarts = 0
    waiting_for, can_replace = "", True

    def submit(self, task: Task, attempt: Attempt, worker: str) -> None:
        self.running.append((task, worker))

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        task, worker = self.running.popleft()
        return [TaskResult(task=task, worker=worker, report=make_report(task))]

    def replace(self, worker: str, reason: str) -> None:
        raise AssertionError(reason)

    def close(self) -> None:
        self.running.clear()


def run_job(tasks: int, executor: Executor, signals: Signals, on_second: Callable[[int], None]) -> None:
    """Run tasks with the same callbacks as the encode job. on_second: called with the number of tasks that ended."""
    totals, meter, facts = RunTotals(), ProgressMeter("encoded", tasks), dict[str, Any]()

    def on_done(done: UnitReport) -> None:
        totals.add(done)
        log_unit(done)
        meter.task_done(1, done.encoded, sum(done.rejects.values()))

    def on_tick(counts: TaskCounts) -> None:
        meter.tick(executor.images, executor.waiting_for)
        facts.update(describe_totals(totals), **meter.facts)
        on_second(totals.counts["units"])

    run_tasks([Task(str(number)) for number in range(tasks)], executor, signals, on_done, on_tick)


def measure_scheduler(tasks: int, workers: int) -> DriverCost:
    """Measure the scheduler, the loop of `run_tasks` and the totals of a run, with an instant executor."""
    executor = InstantExecutor(tuple(f"worker-{number}" for number in range(workers)))
    cpu, wall = time.process_time(), time.perf_counter()
    run_job(tasks, executor, Signals(), lambda done: None)
    return DriverCost(workers, tasks, time.process_time() - cpu, time.perf_counter() - wall)


class Timer:
    """Simulated workers that complete their tasks after a while, in a thread of its own."""

    def __init__(self, seconds_per_task: float) -> None:
        self.seconds_per_task = seconds_per_task
        self.due: list[tuple[float, int, SimulatedRef, Any]] = []
        self.changed = threading.Condition()
        self.count = 0
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self, actor: SimulatedActor, method: str, arguments: tuple[Any, ...]) -> SimulatedRef:
        """Complete a call of a worker later, which takes no time but for tasks."""
        progress, seconds, result = (self.count, self.count, 0.0), 0.0, None
        if method == "run":
            task, _, name = arguments
            result = TaskResult(task=task, worker=name, report=make_report(task)), progress
            seconds = self.seconds_per_task * random.uniform(0.5, 1.5)
        elif method != "load":
            result = progress if method == "progress" else WorkerLocation("node", "host", "")
        ref = SimulatedRef()
        with self.changed:
            self.count += 1
            heapq.heappush(self.due, (time.monotonic() + seconds, self.count, ref, result))
            self.changed.notify()
        return ref

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.due or self.due[0][0] > time.monotonic():
                    self.changed.wait(self.due[0][0] - time.monotonic() if self.due else None)
                _, _, ref, result = heapq.heappop(self.due)
            ref.result.set_result(result)


def measure_ray_executor(
    workers: int,
    seconds_per_task: float = TASK_SECONDS,
    duration: float = 30.0,
    answer: Answer | None = None,
    read_cpu: Callable[[], float] = time.thread_time,
) -> DriverCost:
    """Measure a job with an executor on simulated workers for `duration` seconds, in real time.

    The measurement begins when all workers have had tasks for a while.
    answer: makes the calls of the workers; by default they are completed in this process.
    read_cpu: returns the CPU time of the driver; by default that of this thread.
    """
    signals, begun = Signals(), list[tuple[float, float, int, int]]()
    with simulated_ray(answer or Timer(seconds_per_task).answer) as simulated:
        executor = RayExecutor(Spec(), b"", workers, {"CPU": 1}, STALL_TIMEOUT, grows=False)  # type: ignore[arg-type]
        cost = DriverCost(workers, 0, 0.0, 1.0)
        settled_at = time.monotonic() + seconds_per_task / 2

        def on_second(done: int) -> None:
            nonlocal cost
            now, calls = time.monotonic(), simulated.calls["progress"]
            if not begun and now > settled_at and len(executor.workers) == workers:
                begun.append((now, read_cpu(), done, calls))
            if begun and now >= begun[0][0] + duration:
                wall, cpu, done_before, calls_before = begun[0]
                per_second = (calls - calls_before) / (now - wall)
                cost = DriverCost(workers, done - done_before, read_cpu() - cpu, now - wall, per_second)
                signals.stop.set()

        try:
            run_job(1_000_000, executor, signals, on_second)
        except Stopped:
            executor.close()
    return cost


def measure_idle_executor(workers: int, duration: float = 30.0) -> DriverCost:
    """Measure an executor whose simulated workers have no tasks, in real time."""
    with simulated_ray(Timer(0.0).answer) as simulated:
        executor = RayExecutor(Spec(), b"", workers, {"CPU": 1}, STALL_TIMEOUT, grows=False)  # type: ignore[arg-type]
        while len(executor.workers) < workers:
            executor.wait(1.0, 0)
        wall, cpu, calls = time.monotonic(), time.thread_time(), simulated.calls["progress"]
        while time.monotonic() < wall + duration:
            executor.wait(1.0, 0)
        cpu, wall = time.thread_time() - cpu, time.monotonic() - wall
        executor.close()
    return DriverCost(workers, 0, cpu, wall, (simulated.calls["progress"] - calls) / wall)


class SharedActor:
    """Answers the calls of all simulated workers in one process."""

    async def load(self, *_: Any) -> None:
        pass

    async def locate(self) -> WorkerLocation:
        return WorkerLocation("node", "host", "")

    async def progress(self) -> Counters:
        return (1, 1, 0.0)

    async def run(self, task: Task, attempt: Attempt, name: str, seconds: float) -> tuple[TaskResult, Counters]:
        await asyncio.sleep(seconds)
        return TaskResult(task=task, worker=name, report=make_report(task)), (1, 1, 0.0)


@contextmanager
def local_ray() -> Iterator[Any]:
    """Run a local Ray with one SharedActor, which this block gets."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    try:
        yield ray.remote(SharedActor).options(num_cpus=0, max_concurrency=100_000).remote()
    finally:
        ray.shutdown()


def measure_real_ray(workers: int, seconds_per_task: float = TASK_SECONDS, duration: float = 30.0) -> DriverCost:
    """Measure the same as `measure_ray_executor`, but with Ray's calls: the CPU time is that of all threads."""
    with local_ray() as shared:

        def answer(actor: SimulatedActor, method: str, arguments: tuple[Any, ...]) -> Any:
            seconds = (seconds_per_task * random.uniform(0.5, 1.5),) if method == "run" else ()
            return getattr(shared, method).remote(*arguments, *seconds)

        return measure_ray_executor(workers, seconds_per_task, duration, answer, time.process_time)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the CPU time of the driver with many workers.")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--real", action="store_true", help="measure the calls of Ray as well")
    arguments = parser.parse_args()
    failed = False
    print(f"{'what':<32}{'workers':>8}{'tasks':>10}{'us/task':>9}{'core':>7}{'calls/s':>9}", flush=True)

    def show(what: str, cost: DriverCost, is_too_much: bool) -> None:
        nonlocal failed
        failed |= is_too_much
        each = f"{cost.microseconds_per_task:.1f}" if cost.tasks else "-"
        line = f"{what:<32}{cost.workers:>8}{cost.tasks:>10,}{each:>9}{cost.share:>7.1%}{cost.calls:>9.1f}"
        print(f"{line}{'  above its limit' if is_too_much else ''}", flush=True)

    for workers in (1, arguments.workers):
        cost = measure_scheduler(arguments.tasks, workers)
        show("scheduler, instant tasks", cost, cost.microseconds_per_task > MOST_MICROSECONDS)
    for workers in (arguments.workers // 10, arguments.workers):
        cost = measure_ray_executor(workers)
        show(f"executor, tasks of {TASK_SECONDS:g} s", cost, cost.share > MOST_SHARE)
    cost = measure_idle_executor(arguments.workers)
    show("executor, idle", cost, cost.share > MOST_SHARE / 10)
    if arguments.real:
        show(f"with Ray, tasks of {TASK_SECONDS:g} s", measure_real_ray(arguments.workers), False)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
