"""Storage outages: the job waits until the storage answers, and gives up no task during an outage."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jobs.executor import Task, TaskResult, format_error
from jobs.messages import log_info
from jobs.progress import format_duration
from jobs.scheduler import compute_backoff
from pipeline.cache.identity import NAME
from pipeline.errors import JobError
from pipeline.storage.connection import check_reachable
from pipeline.storage.folder import Folder

WINDOW = 180.0  # seconds: failures this close together count as one outage; the stores' libraries retry for a minute
LONGEST_PAUSE = 30.0  # seconds between two probes
PROBE_TIMEOUT = 60.0  # seconds
FAILING_SHARE = 0.5  # if at least this share of the workers fails, the storage is at fault and not some workers


def make_probe(cache: Folder, options: Mapping[str, Any], url_of: Callable[[Any], str]) -> Callable[[Any], None]:
    """Return a probe for an `Outage`: it accesses the cache, and the input or output of a task.

    options: of the storage of these inputs or outputs. url_of: returns the URL of a task's input or output.
    """

    def probe(task: Any) -> None:
        check_reachable(cache.url_of(NAME), cache.options)
        check_reachable(url_of(task), options)

    return probe


class Outage:
    """Detects failures of the storage on several workers within a short time.

    probe: accesses the storage that a task needs, and raises LatentmillError if the storage does not answer.
    stall_timeout: seconds after which the job ends if the storage still does not answer.
    is_on: no task may start. is_certain: a probe has failed as well, so the workers are not at fault.
    """

    def __init__(
        self, probe: Callable[[Task], None], stall_timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.probe, self.stall_timeout, self.clock = probe, stall_timeout, clock
        self.failures: dict[str, list[float]] = {}  # the last two times by worker, since its last success; latest last
        self.began_at = 0.0  # time of the first failure of this outage since the last success on any worker
        self.error = ""
        self.is_on = False
        self.is_certain = False
        self._task: Task | None = None
        self._failed_at = 0.0  # time of the last failure
        self._probes = 0
        self._next_probe_at = 0.0
        self._answer: list[bool] | None = None  # receives the result of the running probe
        self._probe_started_at = 0.0

    def record_success(self, worker: str) -> None:
        """Record a task that succeeded."""
        self.failures.pop(worker, None)
        self.began_at, self._probes = (self.clock() if self.is_on else 0.0), 0

    def record_failure(self, done: TaskResult, workers: int) -> None:
        """Record a task that failed because of the storage. workers: how many are ready."""
        now = self.clock()
        if not self.is_on and (not self.began_at or now - self._failed_at > WINDOW):
            self.began_at = now  # an earlier failure than the window belongs to no outage
        self._failed_at = now
        self.error, self._task = str(done.error), done.task
        earlier = self.failures.pop(done.worker, [])
        self.failures[done.worker] = [*(at for at in earlier[-1:] if now - at <= WINDOW), now]
        while now - self.failures[oldest := next(iter(self.failures))][-1] > WINDOW:
            del self.failures[oldest]
        has_several = len(self.failures) > 1 or (workers <= 1 and len(self.failures[done.worker]) > 1)
        if not self.is_on and has_several and len(self.failures) >= FAILING_SHARE * workers:
            self.is_on = True
            self._schedule_probe()

    def poll(self) -> bool:
        """Return whether no task may start now. Probes the storage, with growing pauses.

        Raises JobError if the storage has failed for longer than `stall_timeout`, and still fails.
        """
        if not self.is_on:
            return False
        seconds = self.clock() - self.began_at
        has_answered = self._poll_probe(at_once=seconds > self.stall_timeout)
        if has_answered:
            if self.is_certain:
                log_info(f"the storage responds again after {format_duration(seconds)}")
            self.is_on, self.is_certain, self.failures = False, False, {}
        elif seconds > self.stall_timeout + (PROBE_TIMEOUT if has_answered is None else 0.0):
            raise JobError(
                f"the storage has failed for {format_duration(seconds)} (--stall-timeout): {self.error}; "
                "run the same command to resume once it responds"
            )
        return self.is_on

    def _poll_probe(self, at_once: bool) -> bool | None:
        """Return the result of a probe that has ended; None if there is none. Starts a probe when it is due.

        at_once: start the probe even if it is not due.
        """
        if self._answer is None and (at_once or self.clock() >= self._next_probe_at):
            self._answer, self._probe_started_at = [], self.clock()
            threading.Thread(target=self._run_probe, args=(self._task, self._answer), daemon=True).start()
        if self._answer is None or (not self._answer and self.clock() - self._probe_started_at <= PROBE_TIMEOUT):
            return None
        has_answered = self._answer == [True]  # a probe that hangs is abandoned, and counts as failed
        self._answer = None
        if not has_answered:
            if not self.is_certain:
                log_info(f"the storage does not respond; no task is started until it does: {self.error}")
            self.is_certain = True
            self._schedule_probe()
        return has_answered

    def _run_probe(self, task: Task, answer: list[bool]) -> None:
        try:
            self.probe(task)
            answer.append(True)
        except Exception as error:  # any error counts as a failed probe
            self.error = format_error(error)
            answer.append(False)

    def _schedule_probe(self) -> None:
        self._probes += 1
        self._next_probe_at = self.clock() + min(compute_backoff(self._probes), LONGEST_PAUSE)
