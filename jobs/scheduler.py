"""The scheduler: assign tasks to workers, and decide whether a task or its worker caused a failure.

A task is given up after three failures, on three different workers if there are as many. A failure that is the worker's
fault is excused: it does not count. A worker is faulty in two cases. Either it fails twice in a row, and another worker
completes a task that failed on it. Or its accelerator reports an error after which every call fails. A faulty worker is
replaced, and its tasks are rescheduled.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jobs.executor import Task, TaskResult
from pipeline.records import Attempt

MIN_TASKS = 2  # per worker: while one is encoded, the other is read or written
MAX_FAILURES = 3  # of a task
MAX_EXCUSED = 10  # excused failures of a task; limited, because the task itself may kill its workers
FAULTY_AFTER = 2  # consecutive failures of a worker
SUSPECT_UP_TO = 5  # failed tasks up to which a worker is throttled; with more, the tasks are likelier at fault
FIRST_PAUSE = 2.0  # seconds before a task or a worker is retried after a failure; doubled with each further failure
LONGEST_PAUSE = 60.0
WAIT_FOR_WORKER = 120.0  # seconds for which a failed task waits for a starting worker on which it has not failed


@dataclass(slots=True)
class TaskState:
    """The scheduler's state of a task.

    failed_on: the workers on which it failed, without faulty workers.
    avoided: all workers on which it failed.
    excused: the number of excused failures; `device_errors` are among them.
    failed_at, paused_until: the scheduler's clock, in seconds.
    """

    task: Task
    failed_on: list[str] = field(default_factory=list)
    avoided: list[str] = field(default_factory=list)
    excused: int = 0
    device_errors: int = 0
    isolated: bool = False
    damaged_at: int | None = None
    is_retry: bool = False
    failed_at: float = 0.0
    paused_until: float = 0.0


@dataclass(slots=True)
class WorkerState:
    """The scheduler's state of a worker.

    is_exclusive: it runs an isolated task, and takes no second one.
    errors: the tasks that failed on it since its last success, with their errors.
    failures: consecutive failures; one task can account for several.
    is_at_fault: another worker completed one of the tasks in `errors`.
    is_proven: it has completed a task.
    device_error: the error that its accelerator reported; empty if there is none.
    """

    tasks: set[str] = field(default_factory=set)
    is_exclusive: bool = False
    errors: dict[str, str] = field(default_factory=dict)
    failures: int = 0
    is_at_fault: bool = False
    is_proven: bool = False
    device_error: str = ""
    paused_until: float = 0.0

    def clear(self) -> None:
        """Forget its failures."""
        self.errors, self.failures, self.is_at_fault, self.paused_until = {}, 0, False, 0.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task, the attempt, and the worker that runs it."""

    task: Task
    attempt: Attempt
    worker: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that was given up, and its last error."""

    name: str
    error: str


class Scheduler:
    """The state of a job's tasks and workers.

    Tasks run in shuffled order, so that two jobs on one cache seldom run the same task.
    can_replace: whether the executor can replace a worker.
    clock: returns monotonic seconds.
    tasks_per_worker: the number of tasks that a worker runs at the same time.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        can_replace: bool = True,
        clock: Callable[[], float] = time.monotonic,
        tasks_per_worker: int = MIN_TASKS,
    ) -> None:
        self.clock = clock
        self.tasks_per_worker = tasks_per_worker
        self.can_replace = can_replace
        self.untried = deque(random.sample(list(tasks), len(tasks)))
        self.retries: list[TaskState] = []
        self.assigned: dict[str, TaskState] = {}
        self.workers: dict[str, WorkerState] = {}
        self.failures: list[Failure] = []

    @property
    def under_way(self) -> int:
        """The number of tasks that workers have."""
        return len(self.assigned)

    @property
    def waiting(self) -> int:
        """The number of tasks that no worker has."""
        return len(self.untried) + len(self.retries)

    def assign_next(self, workers: Sequence[str], starting: int = 0) -> Assignment | None:
        """Assign the next task to one of these ready workers. Returns None if no task can start now.

        starting: the number of further workers that are starting.
        """
        now = self.clock()
        share = math.ceil((self.waiting + self.under_way) / max(1, len(workers) + starting))
        limit = min(self.tasks_per_worker, max(MIN_TASKS, share))  # near its end, the job keeps all workers busy
        free = [worker for worker in workers if self._has_capacity(worker, len(workers), limit, now)]
        if not free:
            return None
        for state in self.retries:
            if state.paused_until <= now and (worker := self._choose_worker(state, free, workers, starting)):
                self.retries.remove(state)
                return self._assign(state, worker)
        if self.untried and (worker := self._choose_worker(TaskState(self.untried[0]), free, workers, starting)):
            return self._assign(TaskState(self.untried.popleft()), worker)
        return None

    def _has_capacity(self, name: str, workers: int, limit: int, now: float) -> bool:
        worker = self.workers.setdefault(name, WorkerState())
        if worker.is_exclusive or worker.device_error:
            return False
        if 0 < len(worker.errors) <= SUSPECT_UP_TO and workers > 1:  # perhaps faulty: one task at a time, after a pause
            return not worker.tasks and worker.paused_until <= now
        return len(worker.tasks) < limit

    def _choose_worker(
        self, state: TaskState, free: Sequence[str], workers: Sequence[str], starting: int
    ) -> str | None:
        """Return a free worker for a task; None if there is none, or if it is better to wait.

        A worker on which the task has not failed comes first, even if the task must wait for it. Otherwise it is any
        worker but the one on which the task failed last.
        A failed task does not run on an unproven worker while a proven one is left for it, or while untried tasks can
        prove the worker: on a faulty node, every new worker fails.
        """
        candidates: Sequence[str] = free
        if state.avoided:
            may_wait = bool(starting) and self.clock() - state.failed_at < WAIT_FOR_WORKER
            may_wait |= bool(self.untried and set(workers) - set(state.avoided))  # untried tasks prove the others
            proven = [worker for worker in workers if self.workers[worker].is_proven]
            if self.untried or set(proven) - set(state.avoided):
                workers, free = proven, [worker for worker in free if self.workers[worker].is_proven]
            candidates = [worker for worker in free if worker not in state.avoided]
            if not candidates and (may_wait or set(workers) - set(state.avoided)):
                return None
            if not candidates:
                candidates = [worker for worker in free if worker != state.avoided[-1] or len(workers) == 1]
        if state.isolated:
            candidates = [worker for worker in candidates if not self.workers[worker].tasks]
        states = self.workers
        return min(candidates, key=lambda name: (len(states[name].tasks), len(states[name].errors)), default=None)

    def _assign(self, state: TaskState, name: str) -> Assignment:
        worker, task = self.workers[name], state.task
        worker.tasks.add(task.name)
        worker.is_exclusive = state.isolated
        self.assigned[task.name] = state
        attempt = Attempt(isolated=state.isolated, damaged_at=state.damaged_at, is_retry=state.is_retry)
        state.is_retry = True
        return Assignment(task, attempt, name)

    def record_success(self, done: TaskResult) -> None:
        """Record a task that succeeded."""
        self._unassign(done)
        worker = self.workers.setdefault(done.worker, WorkerState())
        worker.clear()
        worker.is_proven = True
        is_damaged = bool(getattr(done.report, "damage", None))  # the shard was at fault, not the workers it failed on
        for other in self.workers.values():
            if is_damaged:
                other.errors.pop(done.task.name, None)
            other.is_at_fault |= done.task.name in other.errors

    def record_failure(self, done: TaskResult) -> bool:
        """Record a task that failed. Returns whether it will be retried."""
        state = self._unassign(done)
        if done.cause == "returned":
            self.retries.append(state)
            return True
        if done.cause == "final":
            self.failures.append(Failure(done.task.name, str(done.error)))
            return False
        state.avoided.append(done.worker)
        state.failed_at = self.clock()
        is_counted = self._is_counted(done.worker)
        if done.cause in ("task", "damage"):
            state.damaged_at = done.damaged_at
        if done.cause in ("task", "damage") and is_counted:
            state.failed_on.append(done.worker)
        else:
            state.excused += 1
        if done.cause == "lost":
            state.isolated = True
            self.workers.pop(done.worker, None)
        elif done.cause == "device":
            state.isolated = True  # the task itself may make the device fail, and must not harm others
            state.device_errors += is_counted
            self.workers.setdefault(done.worker, WorkerState()).device_error = str(done.error)
        else:
            self._record_worker_failure(done)
        if max(len(state.failed_on), state.device_errors) >= MAX_FAILURES or state.excused >= MAX_EXCUSED:
            self.failures.append(Failure(done.task.name, str(done.error)))
            return False
        failures = len(state.failed_on) + (state.excused if done.cause == "storage" else 0)
        state.paused_until = self.clock() + compute_backoff(failures) if failures else 0.0
        self.retries.append(state)
        return True

    def _is_counted(self, name: str) -> bool:
        """Return whether a failure on this worker counts against its task: not if only other workers are proven."""
        proven = {each for each, worker in self.workers.items() if worker.is_proven}
        return not proven or name in proven

    def _unassign(self, done: TaskResult) -> TaskState:
        if worker := self.workers.get(done.worker):
            worker.tasks.discard(done.task.name)
            worker.is_exclusive = False
        return self.assigned.pop(done.task.name)

    def _record_worker_failure(self, done: TaskResult) -> None:
        worker = self.workers.setdefault(done.worker, WorkerState())
        worker.errors[done.task.name] = str(done.error)
        worker.failures += 1
        worker.paused_until = self.clock() + compute_backoff(len(worker.errors))

    def find_faulty(self, workers: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield each of these ready workers that must be replaced, with the reason. Forgets it on the way."""
        for name in workers:
            worker = self.workers.get(name)
            if worker is None:
                continue
            if worker.device_error:
                del self.workers[name]
                yield name, worker.device_error
                continue
            fails_alone = len(workers) == 1 and self.can_replace and worker.failures >= FAULTY_AFTER
            if fails_alone or (worker.is_at_fault and len(worker.errors) >= FAULTY_AFTER):
                del self.workers[name]
                if worker.is_at_fault:
                    self._excuse_failures(name, worker)
                yield name, list(worker.errors.values())[-1]

    def _excuse_failures(self, name: str, worker: WorkerState) -> None:
        """Excuse the failures of the tasks that failed on a faulty worker."""
        for state in [*self.retries, *self.assigned.values()]:
            if state.task.name in worker.errors and name in state.failed_on:
                state.failed_on.remove(name)
                state.excused += 1
                state.paused_until = 0.0

    def forget_failures(self) -> None:
        """Forget the failures of all workers: the storage was at fault."""
        for worker in self.workers.values():
            worker.clear()


def compute_backoff(failures: int) -> float:
    """Return the seconds to wait before a retry after this many consecutive failures."""
    return float(min(FIRST_PAUSE * 2 ** min(failures - 1, 10), LONGEST_PAUSE))
