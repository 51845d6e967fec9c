"""The executor of `--workers 0`: one worker in this process, without Ray."""

import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from typing import Any

from jobs.executor import TaskResult, Worker, WorkerProgress, format_error, make_failed_result
from pipeline.errors import JobError
from pipeline.records import Attempt


class LocalExecutor:
    """Runs tasks in threads of this process."""

    waiting_for = ""
    workers = ("inline",)
    starting = 0
    restarts = 0
    can_replace = False

    def __init__(self, worker: Worker, tasks_per_worker: int, stop: threading.Event) -> None:
        self.worker = worker
        self.stop = stop
        self.tasks_per_worker = tasks_per_worker
        self.pool: Executor = ThreadPoolExecutor(self.tasks_per_worker, thread_name_prefix="unit")
        self.running: dict[Future[Any], Any] = {}

    @property
    def images(self) -> int:
        return self.worker.images

    @property
    def busy_seconds(self) -> float:
        return self.worker.busy_seconds

    @property
    def progress(self) -> dict[str, WorkerProgress]:
        return {self.workers[0]: WorkerProgress(self.images, self.busy_seconds)}

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        self.running[self.pool.submit(self.worker.run, task, attempt)] = task

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        if not self.running:  # all remaining tasks are paused
            time.sleep(min(seconds, 0.05))
        ready, _ = wait(self.running, seconds, FIRST_COMPLETED)
        return [self._make_result(future, self.running.pop(future)) for future in ready]

    def _make_result(self, future: Future[Any], task: Any) -> TaskResult:
        error = future.exception()
        if error is None:
            return TaskResult(task=task, worker=self.workers[0], report=future.result())
        if not isinstance(error, Exception):
            return TaskResult(task=task, worker=self.workers[0], error=format_error(error))
        return make_failed_result(task, self.workers[0], error)

    def replace(self, worker: str, reason: str) -> None:
        raise JobError(
            f"the device fails, and --workers 0 cannot restart its worker: {reason}; run the same command to resume"
        )

    def close(self) -> None:
        """Stop the threads at their next sample, and wait for them."""
        self.stop.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
