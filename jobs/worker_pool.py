"""The states of a job's workers, with indexes: no question about one worker or one task looks at all workers."""

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

SUSPECT_UP_TO = 5  # failed tasks up to which a worker is throttled; with more, the tasks are likelier at fault

Key = tuple[int, int, int]  # tasks, errors, and the position among the ready workers: the first key is that to take


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


class WorkerPool:
    """The workers, of which some are ready to take tasks.

    suspects: the workers with errors or a device error, in the order of their first one.
    proven: the workers that have completed a task.
    """

    def __init__(self) -> None:
        self.states: dict[str, WorkerState] = {}
        self.suspects: dict[str, None] = {}
        self.proven: set[str] = set()
        self.ready: tuple[str, ...] = ()
        self._is_outdated = False  # a worker was dropped since `ready` was set
        self._positions: dict[str, int] = {}  # of the ready workers
        self._ready_proven = 0
        self._failed_on: dict[str, set[str]] = {}  # the workers with an error for a task
        self._places: dict[str, tuple[list[Key], Key]] = {}
        self._queues: dict[bool, list[Key]] = {True: [], False: []}  # sorted; proven workers, and the others
        self._throttled: dict[str, None] = {}

    def get(self, name: str) -> WorkerState:
        """Return the state of a worker, which may be new."""
        if name not in self.states:
            self.states[name] = WorkerState()
        return self.states[name]

    def is_ready(self, name: str) -> bool:
        return name in self._positions

    def set_ready(self, workers: Sequence[str]) -> None:
        """Set the ready workers. Costs nothing for the same tuple as before, and O(N log N) after a change."""
        if workers is self.ready and not self._is_outdated:
            return
        ready = tuple(workers)
        if ready == self.ready and not self._is_outdated:
            return
        self.ready, self._is_outdated = ready, False
        self._positions = {name: position for position, name in enumerate(ready)}
        self._ready_proven = len(self.proven & self._positions.keys())
        self._places, self._queues, self._throttled = {}, {True: [], False: []}, {}
        for name in ready:
            self.get(name)
            self._place(name)

    def find_free(
        self, limit: int, now: float, excluded: Collection[str] = (), proven_only: bool = False
    ) -> str | None:
        """Return the free worker with the fewest tasks and errors, and of those the first; None if there is none.

        limit: the number of tasks from which on a worker is not free. A worker that may be faulty has one at a time,
        and pauses after a failure; the time is `now`. A worker with a device error or an isolated task is not free.
        """
        free = []
        for queue in (self._queues[True],) if proven_only else self._queues.values():
            for key in queue:
                if key[0] >= limit:
                    break
                if self.ready[key[2]] not in excluded:
                    free.append(key)
                    break
        for name in self._throttled:
            worker = self.states[name]
            is_allowed = name not in excluded and (worker.is_proven or not proven_only)
            if is_allowed and not worker.tasks and worker.paused_until <= now:
                free.append((0, len(worker.errors), self._positions[name]))
        return self.ready[min(free)[2]] if free else None

    def has_others(self, excluded: Collection[str], proven_only: bool = False) -> bool:
        """Return whether there are ready workers, free or not, other than these."""
        left_out = sum(name in self._positions and (not proven_only or name in self.proven) for name in set(excluded))
        return (self._ready_proven if proven_only else len(self.ready)) > left_out

    def add_task(self, name: str, task: str, is_exclusive: bool) -> None:
        """Record that a worker has a task."""
        worker = self.get(name)
        worker.tasks.add(task)
        worker.is_exclusive = is_exclusive
        self._place(name)

    def remove_task(self, name: str, task: str) -> None:
        """Record that a worker does not have a task any more. The worker may be gone."""
        if worker := self.states.get(name):
            worker.tasks.discard(task)
            worker.is_exclusive = False
            self._place(name)

    def note_success(self, name: str, task: str, is_damaged: bool) -> None:
        """Record that a worker has completed a task. The other workers on which it failed are at fault.

        is_damaged: the shard was at fault, and not those workers.
        """
        worker = self.get(name)
        if name not in self.proven:
            worker.is_proven = True
            self.proven.add(name)
            self._ready_proven += self.is_ready(name)
            self._place(name)
        self.clear(name)
        for other in self._failed_on.pop(task, ()):
            if is_damaged:
                del self.states[other].errors[task]
                self._update_suspect(other)
            else:
                self.states[other].is_at_fault = True

    def note_error(self, name: str, task: str, error: str) -> WorkerState:
        """Record that a task failed on a worker. Returns the state of the worker."""
        worker = self.get(name)
        worker.errors[task] = error
        worker.failures += 1
        self._failed_on.setdefault(task, set()).add(name)
        self._update_suspect(name)
        return worker

    def note_device_error(self, name: str, error: str) -> None:
        """Record that the accelerator of a worker reported an error after which every call fails."""
        self.get(name).device_error = error
        self._update_suspect(name)

    def clear(self, name: str) -> None:
        """Forget the failures of a worker, but not a device error."""
        worker = self.states[name]
        self._forget_errors(name, worker)
        worker.errors, worker.failures, worker.is_at_fault, worker.paused_until = {}, 0, False, 0.0
        if name in self.suspects:
            self._update_suspect(name)

    def drop(self, name: str) -> None:
        """Remove a worker that is lost or faulty."""
        worker = self.states.pop(name, WorkerState())
        self._forget_errors(name, worker)
        self.suspects.pop(name, None)
        self.proven.discard(name)
        self._remove_place(name)
        self._is_outdated = True

    def _forget_errors(self, name: str, worker: WorkerState) -> None:
        """Remove a worker from those on which its tasks failed."""
        for task in worker.errors:
            if others := self._failed_on.get(task):
                others.discard(name)
                if not others:
                    del self._failed_on[task]

    def _update_suspect(self, name: str) -> None:
        worker = self.states[name]
        if worker.errors or worker.device_error:
            self.suspects[name] = None
        else:
            self.suspects.pop(name, None)
        self._place(name)

    def _place(self, name: str) -> None:
        """Put a worker into the queue, and at the position there, that its state asks for."""
        self._remove_place(name)
        worker, position = self.states[name], self._positions.get(name)
        if position is None or worker.is_exclusive or worker.device_error:
            return
        if 0 < len(worker.errors) <= SUSPECT_UP_TO and len(self.ready) > 1:  # perhaps faulty
            self._throttled[name] = None
            return
        queue, key = self._queues[worker.is_proven], (len(worker.tasks), len(worker.errors), position)
        insort(queue, key)
        self._places[name] = queue, key

    def _remove_place(self, name: str) -> None:
        self._throttled.pop(name, None)
        if place := self._places.pop(name, None):
            queue, key = place
            del queue[bisect_left(queue, key)]
