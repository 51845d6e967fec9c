"""Run one command of latentmill on the store of `bench.scale`, and measure it in a process of its own.

    python -m bench.scale_runs PLAN RESULT

Both are JSON files: of a `RunPlan` and of a `Measured`.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.scale_filesystem import Requests, install, uninstall
from bench.scale_store import CACHES, ObjectStore, Template
from bench.scale_workers import ROOT, WorkerProcess

SETTLED = 3.0  # seconds from the first task that ends to the window of a run with paced workers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A command, its storage and its workers.

    argv: of `latentmill`. store: the file of the objects. workers: number of simulated workers; 0: a real one in the
    process of the driver, which writes the template.
    seconds: that each task takes. window: seconds for which a run with such workers is measured, and then stopped.
    latency: seconds a request. scale: everything that is counted in thousands is this many times smaller: the names of
    an answer of LIST, and the parts of a file of the log. A run with scale 100 makes the requests of 100 times as many
    units.
    """

    argv: tuple[str, ...]
    store: str
    template: str
    workers: int = 0
    seconds: float = 0.0
    window: float = 0.0
    latency: float = 0.0
    scale: int = 1


@dataclass(slots=True, kw_only=True)
class Measured:
    """What a run took.

    cpu: of the driver's process in seconds, from its first import to its end, without that of the store. start_cpu: of
    it, that of the imports. worker_cpu: of the process of the simulated workers. peak: resident memory in MB.
    requests: of the driver, by kind and place. busy: the seconds in which at least one of them was under way.
    share: of a core, in the window of a run with paced workers. tasks: that ended, or in that window.
    """

    code: int = 0
    cpu: float = 0.0
    start_cpu: float = 0.0
    store_cpu: float = 0.0
    worker_cpu: float = 0.0
    wall: float = 0.0
    peak: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    share: float = 0.0
    tasks: int = 0


class SimulatedExecutor:
    """Sends tasks to the process of the simulated workers. It implements `jobs.executor.Executor`.

    window: if it is not 0, the run is measured for these seconds once all workers are busy, and then stopped.
    """

    waiting_for = ""
    starting = restarts = 0
    busy_seconds = 0.0
    can_replace = True

    def __init__(self, process: WorkerProcess, workers: int, tasks_per_worker: int, window: float) -> None:
        from jobs.executor import TaskResult, WorkerProgress

        self.process, self.tasks_per_worker, self.window = process, tasks_per_worker, window
        self.workers = tuple(f"worker{number}" for number in range(workers))
        self.images = self.tasks = 0
        self.share = 0.0
        self._make_result, self._make_progress = TaskResult, WorkerProgress
        self.progress = dict.fromkeys(self.workers, WorkerProgress(0, 0.0))
        self._running: dict[str, Any] = {}
        self._new: list[tuple[str, str, str]] = []
        self._marks: list[tuple[float, float, int]] = []
        self._first = 0.0

    def submit(self, task: Any, attempt: Any, worker: str) -> None:
        self._running[task.name] = task
        self._new.append((task.name, task.path, worker))

    def wait(self, seconds: float, waiting: int) -> list[Any]:
        if self._new:
            self.process.send(self._new)
            self._new = []
        if self.window and self._first:
            self._measure()
        results = []
        for name, worker, data in self.process.receive(min(seconds, 0.5) if self.window else seconds):
            report = pickle.loads(data)
            self._first = self._first or time.monotonic()
            self.images += report.encoded
            self.progress[worker] = self._make_progress(self.progress[worker].images + report.encoded, 0.0)
            self.tasks += 1
            results.append(self._make_result(task=self._running.pop(name), worker=worker, report=report))
        return results

    def _measure(self) -> None:
        """Note the time and the CPU time at the start and at the end of the window, and stop the run."""
        now = time.monotonic()
        if now - self._first >= SETTLED + self.window * len(self._marks) and len(self._marks) < 2:
            self._marks.append((now, time.process_time(), self.tasks))
            if len(self._marks) == 2:
                (start, cpu, tasks), (end, cpu_end, tasks_end) = self._marks
                self.share, self.tasks = (cpu_end - cpu) / (end - start), tasks_end - tasks
                os.kill(os.getpid(), signal.SIGTERM)

    def replace(self, worker: str, reason: str) -> None:
        raise AssertionError(f"{worker} does not fail: {reason}")

    def close(self) -> None:
        pass


class RealExecutor:
    """An executor whose results are noted. It behaves as the executor that it wraps."""

    def __init__(self, executor: Any) -> None:
        self._executor, self.results = executor, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def wait(self, seconds: float, waiting: int) -> list[Any]:
        results: list[Any] = self._executor.wait(seconds, waiting)
        self.results += results
        return results


@contextlib.contextmanager
def replaced_executor(plan: RunPlan, executors: list[Any]) -> Iterator[None]:
    """Let the jobs of this process run on the workers of the plan. The executors that they start are added."""
    if plan.argv[0] == "status":  # it imports no torch, which jobs.resources does
        yield
        return
    from jobs.resources import ResourcePlan

    start = ResourcePlan.start_executor

    def start_simulated(resources: Any, spec: Any, *more: Any) -> Any:
        if not plan.workers:
            executors.append(RealExecutor(start(resources, spec, *more)))
        else:
            process = WorkerProcess(Path(plan.store), Path(plan.template), get_cache_key(plan), plan.seconds)
            executors.append(SimulatedExecutor(process, plan.workers, spec.tasks_per_worker, plan.window))
        return executors[-1]

    ResourcePlan.start_executor = start_simulated  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ResourcePlan.start_executor = start  # type: ignore[method-assign]


@contextlib.contextmanager
def small_log_files(scale: int) -> Iterator[None]:
    """Let the files of the log hold fewer parts."""
    try:
        from pipeline.cache import commit_log
    except ImportError:  # a version without a log
        yield
        return
    most = commit_log.MAX_PARTS
    commit_log.MAX_PARTS = max(1, most // scale)
    try:
        yield
    finally:
        commit_log.MAX_PARTS = most


@contextlib.contextmanager
def ungrouped_tars() -> Iterator[None]:
    """Let each tar be a unit. The tars of the benchmark are small, but stand for large ones."""
    from pipeline.sources import units

    most = getattr(units, "SMALL_TAR_BYTES", 0)  # versions before had no groups
    units.SMALL_TAR_BYTES = 0
    try:
        yield
    finally:
        units.SMALL_TAR_BYTES = most


def get_cache_key(plan: RunPlan) -> str:
    """Return the key of the cache in its bucket. The cache is the last argument."""
    return plan.argv[-1].removeprefix(f"s3://{CACHES}/")


def run(plan: RunPlan) -> Measured:
    """Run the command in this process, and measure it."""
    main = importlib.import_module(f"jobs.{plan.argv[0]}").main
    start_cpu = time.process_time()
    template = Template.load(Path(plan.template)) if plan.workers else None
    requests = Requests(ObjectStore(Path(plan.store), template), plan.latency, 1000 // plan.scale)
    executors: list[Any] = []
    install(requests)
    started = time.monotonic()
    try:
        with replaced_executor(plan, executors), small_log_files(plan.scale), ungrouped_tars():
            code = main(plan.argv[1:])
    finally:
        uninstall()
    wall, cpu = time.monotonic() - started, time.process_time()
    result = Measured(code=code, cpu=cpu - requests.cpu, start_cpu=start_cpu, store_cpu=requests.cpu, wall=wall)
    result.peak, result.requests, result.busy = read_peak(), dict(requests.counts), dict(requests.busy)
    for executor in executors:
        if isinstance(executor, SimulatedExecutor):
            result.share, result.tasks = executor.share, executor.tasks
            result.worker_cpu = executor.process.close()
        else:
            save_template(plan, requests.store, executor.results[0])
    requests.store.close()
    return result


def save_template(plan: RunPlan, store: ObjectStore, result: Any) -> None:
    """Write what a real worker left behind for the unit of this result."""
    unit, cache_key = result.task, get_cache_key(plan)
    objects = tuple((key.removeprefix(f"{cache_key}/"), body) for key, body in store.find(unit.name))
    Template(unit.name, unit.path, pickle.dumps(result.report), objects).save(Path(plan.template))


def read_peak() -> float:
    """Return the peak of the resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure(plan: RunPlan, folder: Path, name: str, code: int = 0) -> Measured:
    """Run a plan in a process of its own. Exits if it ends with another code. Its messages are in FOLDER/NAME.log."""
    file, result, log = (folder / f"{name}.{kind}" for kind in ("plan", "result", "log"))
    file.write_text(json.dumps(dataclasses.asdict(plan)))
    with log.open("wb") as output:
        command = [sys.executable, "-m", "bench.scale_runs", str(file), str(result)]
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    measured = read_measured(result)
    if measured is None or measured.code != code:
        problem = "no result" if measured is None else f"exit code {measured.code}"
        sys.exit(f"{name} failed: {problem}\n{log.read_text(errors='replace')[-4000:]}")
    return measured


def read_measured(file: Path) -> Measured | None:
    """Return the result of a run; None if it wrote none."""
    return Measured(**json.loads(file.read_text())) if file.exists() else None


def main() -> None:
    """Run a plan."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    measured = run(RunPlan(**{**fields, "argv": tuple(fields["argv"])}))
    Path(sys.argv[2]).write_text(json.dumps(dataclasses.asdict(measured)))


if __name__ == "__main__":
    main()
