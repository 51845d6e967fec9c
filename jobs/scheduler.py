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
from jobs.worker_pool import WorkerPool, WorkerState
from pipeline.records import Attempt

MIN_TASKS = 2  # per worker: while one is encoded, the other is read or written
MAX_FAILURES = 3  # of a task
MAX_EXCUSED = 10  # excused failures of a task; limited, because the task itself may kill its workers
FAULTY_AFTER = 2  # consecutive failures of a worker
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
        self.untried = deque[Task]()
        self.add(tasks)
        self.retries: dict[str, TaskState] = {}  # by task
        self.assigned: dict[str, TaskState] = {}  # by task
        self.workers = WorkerPool()
        self.failures: list[Failure] = []

    def add(self, tasks: Sequence[Task]) -> bool:
        """Add tasks, in shuffled order. Returns whether there are any."""
        self.untried.extend(random.sample(list(tasks), len(tasks)))
        return bool(tasks)

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
        self.workers.set_ready(workers)
        now = self.clock()
        share = math.ceil((self.waiting + self.under_way) / max(1, len(workers) + starting))
        limit = min(self.tasks_per_worker, max(MIN_TASKS, share))  # near its end, the job keeps all workers busy
        free = self.workers.find_free(limit, now)
        if free is None:
            return None
        for name, state in self.retries.items():
            if state.paused_until <= now and (worker := self._choose_worker(state, free, limit, starting)):
                del self.retries[name]
                return self._assign(state, worker)
        return self._assign(TaskState(self.untried.popleft()), free) if self.untried else None

    def _choose_worker(self, state: TaskState, free: str, limit: int, starting: int) -> str | None:
        """Return a free worker for a task that is retried; None if there is none, or if it is better to wait.

        free: the free worker with the fewest tasks.
        A worker on which the task has not failed comes first, even if the task must wait for it. Otherwise it is any
        worker but the one on which the task failed last.
        A failed task does not run on an unproven worker while a proven one is left for it, or while untried tasks can
        prove the worker: on a faulty node, every new worker fails.
        """
        pool, avoided, now = self.workers, state.avoided, self.clock()
        own_limit = 1 if state.isolated else limit
        if not avoided:
            return pool.find_free(own_limit, now) if state.isolated else free
        proven_only = bool(self.untried) or pool.has_others(avoided, proven_only=True)
        if pool.find_free(limit, now, avoided, proven_only):
            return pool.find_free(own_limit, now, avoided, proven_only)
        may_wait = bool(starting) and now - state.failed_at < WAIT_FOR_WORKER
        may_wait |= bool(self.untried) and pool.has_others(avoided)  # untried tasks prove the others
        if may_wait or pool.has_others(avoided, proven_only):
            return None
        is_only_one = not pool.has_others(avoided[-1:], proven_only)
        return pool.find_free(own_limit, now, () if is_only_one else avoided[-1:], proven_only)

    def _assign(self, state: TaskState, name: str) -> Assignment:
        task = state.task
        self.workers.add_task(name, task.name, state.isolated)
        self.assigned[task.name] = state
        attempt = Attempt(isolated=state.isolated, damaged_at=state.damaged_at, is_retry=state.is_retry)
        state.is_retry = True
        return Assignment(task, attempt, name)

    def record_success(self, done: TaskResult) -> None:
        """Record a task that succeeded."""
        self._unassign(done)
        self.workers.note_success(done.worker, done.task.name, bool(getattr(done.report, "damage", None)))

    def record_failure(self, done: TaskResult) -> bool:
        """Record a task that failed. Returns whether it will be retried."""
        state = self._unassign(done)
        if done.cause == "returned":
            self.retries[done.task.name] = state
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
            self.workers.drop(done.worker)
        elif done.cause == "device":
            state.isolated = True  # the task itself may make the device fail, and must not harm others
            state.device_errors += is_counted
            self.workers.note_device_error(done.worker, str(done.error))
        else:
            worker = self.workers.note_error(done.worker, done.task.name, str(done.error))
            worker.paused_until = self.clock() + compute_backoff(len(worker.errors))
        if max(len(state.failed_on), state.device_errors) >= MAX_FAILURES or state.excused >= MAX_EXCUSED:
            self.failures.append(Failure(done.task.name, str(done.error)))
            return False
        failures = len(state.failed_on) + (state.excused if done.cause == "storage" else 0)
        state.paused_until = self.clock() + compute_backoff(failures) if failures else 0.0
        self.retries[done.task.name] = state
        return True

    def _is_counted(self, name: str) -> bool:
        """Return whether a failure on this worker counts against its task: not if only other workers are proven."""
        return not self.workers.proven or name in self.workers.proven

    def _unassign(self, done: TaskResult) -> TaskState:
        self.workers.remove_task(done.worker, done.task.name)
        return self.assigned.pop(done.task.name)

    def find_faulty(self, workers: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield each of these ready workers that must be replaced, with the reason. Forgets it on the way."""
        self.workers.set_ready(workers)
        for name in list(self.workers.suspects):
            worker = self.workers.states[name]
            if not self.workers.is_ready(name):
                continue
            if worker.device_error:
                self.workers.drop(name)
                yield name, worker.device_error
                continue
            fails_alone = len(workers) == 1 and self.can_replace and worker.failures >= FAULTY_AFTER
            if fails_alone or (worker.is_at_fault and len(worker.errors) >= FAULTY_AFTER):
                self.workers.drop(name)
                if worker.is_at_fault:
                    self._excuse_failures(name, worker)
                yield name, list(worker.errors.values())[-1]

    def _excuse_failures(self, name: str, worker: WorkerState) -> None:
        """Excuse the failures of the tasks that failed on a faulty worker."""
        for task in worker.errors:
            state = self.retries.get(task) or self.assigned.get(task)
            if state is not None and name in state.failed_on:
                state.failed_on.remove(name)
                state.excused += 1
                state.paused_until = 0.0

    def forget_failures(self) -> None:
        """Forget the failures of all workers: the storage was at fault."""
        for name in list(self.workers.suspects):
            self.workers.clear(name)


def compute_backoff(failures: int) -> float:
    """Return the seconds to wait before a retry after this many consecutive failures."""
    return float(min(FIRST_PAUSE * 2 ** min(failures - 1, 10), LONGEST_PAUSE))
