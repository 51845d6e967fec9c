"""The engine of `--workers 0`: one replica in this process, without Ray."""

import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from jobs.drive import IN_FLIGHT, Done, Job, failed
from pipeline.encode import Vae
from pipeline.records import Attempt


class InlineEngine:
    """Two tasks at a time in threads of this process."""

    waiting_for = ""

    def __init__(self, job: Job, vae: Vae, stop: threading.Event) -> None:
        self.worker = job.build(vae, stop)
        self.stop = stop
        self.pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="unit")
        self.running: dict[Future[Any], Any] = {}

    @property
    def slots(self) -> int:
        return IN_FLIGHT  # whole processes do not die here: nothing is ever tried carefully

    @property
    def pictures(self) -> int:
        return self.worker.pictures

    def submit(self, task: Any, attempt: Attempt) -> bool:
        self.running[self.pool.submit(self.worker.run, task, attempt)] = task
        return True

    def wait(self, seconds: float, waiting: int) -> list[Done]:
        ready, _ = wait(self.running, seconds, FIRST_COMPLETED)
        return [self._done(future, self.running.pop(future)) for future in ready]

    def _done(self, future: Future[Any], task: Any) -> Done:
        error = future.exception()
        if error is None:
            return Done(task, future.result(), None)
        return failed(task, error)

    def close(self) -> None:
        """Let the threads end at their next sample, and wait for them."""
        self.stop.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
