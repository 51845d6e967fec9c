"""Which task runs next, on which worker, and what a failure says: about its task, or about its worker.

A task is given up after three failures, on three different workers if there are as many. A failure that is its
worker's fault does not count: a worker is sick if it fails twice in a row, and another one then does a task that failed
on it; or if its accelerator reports an error that sticks. A sick worker is to be replaced, and its tasks go back.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jobs.engine import IN_FLIGHT, Task, TaskResult
from pipeline.records import Attempt

TRIES = 3
PARDONS = 10  # failures of a task that were not its fault; but a task may also be what kills workers
STRIKES = 2  # failures in a row
RESTS = 5  # strikes after which a worker rests; more of them, and it is rather the tasks
FIRST_PAUSE = 2.0  # seconds before a task, or a worker that failed, is tried again; doubled each time
LONGEST_PAUSE = 60.0
AWAIT = 120.0  # seconds that a task waits for another worker to start than those on which it failed


@dataclass(slots=True)
class TaskState:
    """What is known of a task. failed_on: the workers on which it failed and that are not known to be sick.

    avoided: all workers on which it failed. pardons: failures that were not its fault, `device_errors` among them.
    """

    task: Task
    failed_on: list[str] = field(default_factory=list)
    avoided: list[str] = field(default_factory=list)
    pardons: int = 0
    device_errors: int = 0
    isolated: bool = False
    damaged_at: int | None = None
    failed_at: float = 0.0
    rests_until: float = 0.0


@dataclass(slots=True)
class WorkerState:
    """What is known of a worker. strikes: tasks that failed on it since its last success, with their errors.

    failures: how often that was. is_to_blame: one of these tasks was done by another worker.
    is_proven: it has done a task. device_error: what its accelerator reported.
    """

    tasks: set[str] = field(default_factory=set)
    alone: bool = False
    strikes: dict[str, str] = field(default_factory=dict)
    failures: int = 0
    is_to_blame: bool = False
    is_proven: bool = False
    device_error: str = ""
    rests_until: float = 0.0

    def clear(self) -> None:
        """Hold nothing against it any more."""
        self.strikes, self.failures, self.is_to_blame, self.rests_until = {}, 0, False, 0.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task for a worker."""

    task: Task
    attempt: Attempt
    worker: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that was given up, and its last error."""

    name: str
    error: str


class Scheduler:
    """The state of a job's tasks and workers. can_replace: whether a worker can be replaced at all.

    Tasks run in shuffled order, so that two drivers seldom meet. clock: seconds that never go back.
    """

    def __init__(
        self, tasks: Sequence[Task], can_replace: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.can_replace = can_replace
        self.fresh = deque(random.sample(list(tasks), len(tasks)))
        self.again: list[TaskState] = []
        self.assigned: dict[str, TaskState] = {}
        self.workers: dict[str, WorkerState] = {}
        self.failures: list[Failure] = []

    @property
    def under_way(self) -> int:
        """How many tasks workers have."""
        return len(self.assigned)

    @property
    def waiting(self) -> int:
        """How many tasks no worker has."""
        return len(self.fresh) + len(self.again)

    def next(self, workers: Sequence[str], starting: int = 0) -> Assignment | None:
        """The next task for one of these workers, which are ready; None if there is none for now.

        starting: how many more are starting.
        """
        now = self.clock()
        free = [worker for worker in workers if self._has_room(worker, len(workers), now)]
        if not free:
            return None
        for state in self.again:
            if state.rests_until <= now and (worker := self._worker_for(state, free, workers, starting)):
                self.again.remove(state)
                return self._assign(state, worker)
        if self.fresh and (worker := self._worker_for(TaskState(self.fresh[0]), free, workers, starting)):
            return self._assign(TaskState(self.fresh.popleft()), worker)
        return None

    def _has_room(self, name: str, workers: int, now: float) -> bool:
        worker = self.workers.setdefault(name, WorkerState())
        if worker.alone or worker.device_error:
            return False
        if 0 < len(worker.strikes) <= RESTS and workers > 1:  # a task at a time, and not at once: it may be sick
            return not worker.tasks and worker.rests_until <= now
        return len(worker.tasks) < IN_FLIGHT

    def _worker_for(self, state: TaskState, free: Sequence[str], workers: Sequence[str], starting: int) -> str | None:
        """A worker on which the task has not failed, also if one must be waited for; then any other than the last.

        A task that has failed is not for a worker that has done nothing yet, if another one is left for it, or fresh
        tasks can prove it: on a sick node every new worker fails.
        """
        chosen: Sequence[str] = free
        if state.avoided:
            soon = starting and self.clock() - state.failed_at < AWAIT
            proven = [worker for worker in workers if self.workers[worker].is_proven]
            if self.fresh or set(proven) - set(state.avoided):
                workers, free = proven, [worker for worker in free if self.workers[worker].is_proven]
            chosen = [worker for worker in free if worker not in state.avoided]
            if not chosen and (soon or set(workers) - set(state.avoided)):
                return None
            if not chosen:
                chosen = [worker for worker in free if worker != state.avoided[-1] or len(workers) == 1]
        if state.isolated:
            chosen = [worker for worker in chosen if not self.workers[worker].tasks]
        states = self.workers
        return min(chosen, key=lambda name: (len(states[name].tasks), len(states[name].strikes)), default=None)

    def _assign(self, state: TaskState, name: str) -> Assignment:
        worker, task = self.workers[name], state.task
        worker.tasks.add(task.name)
        worker.alone = state.isolated
        self.assigned[task.name] = state
        return Assignment(task, Attempt(isolated=state.isolated, damaged_at=state.damaged_at), name)

    def succeeded(self, done: TaskResult) -> None:
        """Take in a task that was done."""
        self._take_back(done)
        worker = self.workers.setdefault(done.worker, WorkerState())
        worker.clear()
        worker.is_proven = True
        is_damaged = bool(getattr(done.report, "damage", None))  # then what failed on the others was the shard
        for other in self.workers.values():
            if is_damaged:
                other.strikes.pop(done.task.name, None)
            other.is_to_blame |= done.task.name in other.strikes

    def failed(self, done: TaskResult) -> bool:
        """Take in a task that failed. Returns whether it is tried again."""
        state = self._take_back(done)
        if done.cause == "returned":
            self.again.append(state)
            return True
        state.avoided.append(done.worker)
        state.failed_at = self.clock()
        counts = self._counts(done.worker)
        if done.cause in ("task", "damage"):
            state.damaged_at = done.damaged_at
        if done.cause in ("task", "damage") and counts:
            state.failed_on.append(done.worker)
        else:
            state.pardons += 1
        if done.cause == "lost":
            state.isolated = True
            self.workers.pop(done.worker, None)
        elif done.cause == "device":
            state.isolated = True  # alone with its worker: it may be what the device fails of
            state.device_errors += counts
            self.workers.setdefault(done.worker, WorkerState()).device_error = str(done.error)
        else:
            self._strike(done)
        if max(len(state.failed_on), state.device_errors) >= TRIES or state.pardons >= PARDONS:
            self.failures.append(Failure(done.task.name, str(done.error)))
            return False
        failures = len(state.failed_on) + (state.pardons if done.cause == "storage" else 0)
        state.rests_until = self.clock() + backoff(failures) if failures else 0.0
        self.again.append(state)
        return True

    def _counts(self, name: str) -> bool:
        """Whether a failure on a worker is held against its task: not if others have done tasks, and it has not."""
        proven = {each for each, worker in self.workers.items() if worker.is_proven}
        return not proven or name in proven

    def _take_back(self, done: TaskResult) -> TaskState:
        if worker := self.workers.get(done.worker):
            worker.tasks.discard(done.task.name)
            worker.alone = False
        return self.assigned.pop(done.task.name)

    def _strike(self, done: TaskResult) -> None:
        worker = self.workers.setdefault(done.worker, WorkerState())
        worker.strikes[done.task.name] = str(done.error)
        worker.failures += 1
        worker.rests_until = self.clock() + backoff(len(worker.strikes))

    def sick(self, workers: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The workers that are to be replaced, of those that are ready, and why."""
        for name in workers:
            worker = self.workers.get(name)
            if worker is None:
                continue
            if worker.device_error:
                del self.workers[name]
                yield name, worker.device_error
                continue
            is_alone = len(workers) == 1 and self.can_replace and worker.failures >= STRIKES
            if is_alone or (worker.is_to_blame and len(worker.strikes) >= STRIKES):
                del self.workers[name]
                if worker.is_to_blame:
                    self._pardon(name, worker)
                yield name, list(worker.strikes.values())[-1]

    def _pardon(self, name: str, worker: WorkerState) -> None:
        """Take a sick worker's failures off its tasks."""
        for state in [*self.again, *self.assigned.values()]:
            if state.task.name in worker.strikes and name in state.failed_on:
                state.failed_on.remove(name)
                state.pardons += 1
                state.rests_until = 0.0

    def forget_strikes(self) -> None:
        """Hold nothing against any worker: what failed lately was the storage."""
        for worker in self.workers.values():
            worker.clear()


def backoff(failures: int) -> float:
    """Seconds before something is tried again that has failed so many times in a row."""
    return float(min(FIRST_PAUSE * 2 ** min(failures - 1, 10), LONGEST_PAUSE))
