"""A storage that does not answer for a while: the job waits for it, and no task is given up meanwhile."""

import threading
import time
from collections.abc import Callable

from jobs.engine import Task, TaskResult, format_error
from jobs.messages import log_info
from jobs.progress import format_duration
from jobs.scheduler import backoff
from pipeline.errors import JobError

WINDOW = 180.0  # seconds: failures this close together count as one outage; the stores' libraries retry for a minute
LONGEST_PAUSE = 30.0  # seconds between two probes
HANGS = 60.0  # seconds that a probe may take
SHARE = 0.5  # of the workers have failed: then it is the storage, and not some of them


class Outage:
    """Watches for failures of the storage, on several workers within a short time.

    probe: asks the storage that a task needs, and raises LatentmillError if it does not answer.
    stall_timeout: seconds after which the job ends if the storage still does not answer.
    """

    def __init__(
        self, probe: Callable[[Task], None], stall_timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.probe, self.stall_timeout, self.clock = probe, stall_timeout, clock
        self.failures: list[tuple[float, str]] = []  # when, on which worker, since the last success there
        self.first = 0.0  # failure of this outage, since the last success anywhere
        self.error = ""
        self.is_on = False
        self.is_certain = False  # a probe has failed, too: it is not the workers
        self._task: Task | None = None
        self._last = 0.0  # failure
        self._probes = 0
        self._next_probe = 0.0
        self._asked: list[bool] | None = None  # takes the answer of the probe that is under way
        self._asked_at = 0.0

    def succeeded(self, worker: str) -> None:
        """Take in a task that was done."""
        self.failures = [(at, failed) for at, failed in self.failures if failed != worker]
        self.first, self._probes = (self.clock() if self.is_on else 0.0), 0

    def failed(self, done: TaskResult, workers: int) -> None:
        """Take in a task that failed because of the storage. workers: how many are ready."""
        now = self.clock()
        if not self.is_on and (not self.first or now - self._last > WINDOW):
            self.first = now  # one of long ago was none of this outage's
        self._last = now
        self.error, self._task = str(done.error), done.task
        self.failures = [(at, worker) for at, worker in self.failures if now - at <= WINDOW] + [(now, done.worker)]
        failing = {worker for _, worker in self.failures}
        several = len(failing) > 1 or (workers <= 1 and len(self.failures) > 1)
        if not self.is_on and several and len(failing) >= SHARE * workers:
            self.is_on = True
            self._rest()

    def holds(self) -> bool:
        """Whether no task is to be started now. Probes the storage, with growing pauses.

        Raises JobError if it has failed for longer than `stall_timeout`, and still does.
        """
        if not self.is_on:
            return False
        seconds = self.clock() - self.first
        answered = self._answer(at_once=seconds > self.stall_timeout)
        if answered:
            if self.is_certain:
                log_info(f"the storage answers again, after {format_duration(seconds)}")
            self.is_on, self.is_certain, self.failures = False, False, []
        elif seconds > self.stall_timeout + (HANGS if answered is None else 0.0):
            raise JobError(
                f"the storage has failed for {format_duration(seconds)} (--stall-timeout): {self.error}; "
                "the same command goes on once it answers"
            )
        return self.is_on

    def _answer(self, at_once: bool) -> bool | None:
        """What a probe has found; None if none has ended. Starts one if it is time."""
        if self._asked is None and (at_once or self.clock() >= self._next_probe):
            self._asked, self._asked_at = [], self.clock()
            threading.Thread(target=self._ask, args=(self._task, self._asked), daemon=True).start()
        if self._asked is None or (not self._asked and self.clock() - self._asked_at <= HANGS):
            return None
        answered = self._asked == [True]  # one that hangs is let go
        self._asked = None
        if not answered:
            if not self.is_certain:
                log_info(f"the storage does not answer, and no further task is started until it does: {self.error}")
            self.is_certain = True
            self._rest()
        return answered

    def _ask(self, task: Task, answer: list[bool]) -> None:
        try:
            self.probe(task)
            answer.append(True)
        except Exception as error:  # whatever it is, the storage does not answer as it should
            self.error = format_error(error)
            answer.append(False)

    def _rest(self) -> None:
        self._probes += 1
        self._next_probe = self.clock() + min(backoff(self._probes), LONGEST_PAUSE)
