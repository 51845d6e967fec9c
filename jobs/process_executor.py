"""An executor of processes on this machine, for work that needs neither a model nor Ray."""

import multiprocessing
import pickle
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from jobs.executor import Worker, WorkerProgress
from jobs.local_executor import LocalExecutor
from latentmill.own_packages import call_pickled
from pipeline.errors import JobError
from pipeline.records import Attempt

_worker: Worker | None = None  # of this process


class Spec(Protocol):
    """A small description of a worker that has no model. It is sent to each process."""

    def build(self, stop: Any) -> Worker: ...


class ProcessExecutor(LocalExecutor):
    """Runs tasks in a number of processes. They build their worker from the spec, and end with the job."""

    def __init__(self, spec: Spec, processes: int, stop: threading.Event) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads of fsspec or torch may hang
        self.stop = stop
        self.shared_stop = context.Event()
        self.tasks_per_worker = processes
        start = pickle.dumps((_start, spec))
        self.pool = ProcessPoolExecutor(processes, context, call_pickled, (start, self.shared_stop))
        self.running = {}

    @property
    def images(self) -> int:
        """Unknown until a task ends."""
        return 0

    @property
    def busy_seconds(self) -> float:
        return 0.0

    @property
    def progress(self) -> dict[str, WorkerProgress]:
        return {}

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        try:
            self.running[self.pool.submit(_run, task, attempt)] = task
        except BrokenProcessPool as error:
            raise JobError(
                "a process of the job was ended, perhaps because the machine ran out of memory; run the same command "
                "again with fewer --workers"
            ) from error

    def close(self) -> None:
        """Stop the processes at their next row, and wait for them."""
        self.stop.set()
        self.shared_stop.set()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _start(spec: Spec, stop: Any) -> None:
    """Build the worker of this process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the job stops them itself
    _worker = spec.build(stop)


def _run(task: Any, attempt: Attempt) -> Any:
    """Run a task on the worker of this process."""
    assert _worker is not None
    return _worker.run(task, attempt)
