"""Slots for workers: where and when workers are restarted after failures."""

import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from jobs.messages import log_info
from jobs.scheduler import compute_backoff
from pipeline.errors import JobError
from pipeline.wording import count_noun

MAX_FAILURES = 3  # consecutive failed workers in every slot, without a completed task, after which the job ends
AVOID_SECONDS = 300.0  # for which no worker is started on a node where two in a row failed


@dataclass(slots=True, eq=False)
class Slot:
    """Capacity for one worker.

    failures: the number of workers in a row that failed in it.
    paused_until: when its next worker may start, by the slots' clock.
    may_move: its next worker may start at once on a node that is not avoided.
    """

    worker: Any = None
    failures: int = 0
    paused_until: float = 0.0
    may_move: bool = False


class Slots(list[Slot]):
    """The slots of a job, and the slots and nodes that are not used for a while.

    stall_timeout: seconds without a completed task after which the job ends if workers fail in every slot.
    """

    def __init__(self, number: int, stall_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(Slot() for _ in range(number))
        self.stall_timeout, self.clock = stall_timeout, clock
        self.succeeded_at: float | None = None  # when a task last succeeded
        self._failures: dict[str, int] = {}  # workers in a row that failed, by node
        self._avoided_until: dict[str, float] = {}  # by node

    def note_success(self, slot: Slot, node: str) -> None:
        """Record that a worker has completed a task."""
        slot.failures, self.succeeded_at = 0, self.clock()
        self._failures.pop(node, None)

    def note_failure(self, slot: Slot, node: str, host: str, reason: str) -> None:
        """Record that a worker could not start, or was faulty. node, host: where it ran; empty if unknown.

        Raises JobError if workers fail in every slot and no task was completed for `stall_timeout` seconds, or ever.
        """
        now = self.clock()
        slot.failures += 1
        fails_everywhere = all(slot.failures >= MAX_FAILURES for slot in self)
        if fails_everywhere and (self.succeeded_at is None or now - self.succeeded_at > self.stall_timeout):
            raise JobError(f"all workers fail, or workers cannot start: {reason}; fix the cause and run the job again")
        if slot.failures > 1:
            pause = compute_backoff(slot.failures - 1) if self.succeeded_at is None else AVOID_SECONDS
            slot.paused_until = now + pause
        if node:
            self._failures[node] = self._failures.get(node, 0) + 1
            if self.succeeded_at is not None and self._failures[node] > 1:
                if self._avoided_until.get(node, 0.0) <= now:
                    minutes = f"{AVOID_SECONDS / 60:g} min"
                    log_info(f"two workers in a row failed on {host}; avoiding this node for {minutes}: {reason}")
                self._avoided_until[node] = now + AVOID_SECONDS
                slot.may_move = True

    def find_avoided_nodes(self, nodes: Callable[[], Set[str]]) -> frozenset[str]:
        """Return the nodes on which no worker is started now; empty if there are no other nodes.

        nodes: returns the nodes of the cluster; called only if a node is avoided.
        """
        now = self.clock()
        self._avoided_until = {node: until for node, until in self._avoided_until.items() if until > now}
        is_useful = self._avoided_until and nodes() - self._avoided_until.keys()
        return frozenset(self._avoided_until) if is_useful else frozenset()

    def may_start(self, slot: Slot, avoided: Set[str]) -> bool:
        """Return whether a worker may start in this slot now."""
        is_paused = slot.paused_until > self.clock() and not (slot.may_move and avoided)
        return slot.worker is None and not is_paused


def describe_start(
    starting: int,
    resources: Mapping[str, float],
    free: Mapping[str, float],
    total: Mapping[str, float],
    is_local: bool = False,
) -> str:
    """Return that workers are starting, or which resources they wait for.

    resources: of one worker; free, total: of the Ray cluster. By Ray's names: CPU, GPU, TPU.
    is_local: the cluster is the job's own. Then resources that are not free are those of the job's workers.
    """
    wanted = {name: count for name, count in resources.items() if count}
    available = total if is_local else free
    workers = count_noun(starting, "worker")
    if all(available.get(name, 0) >= count for name, count in wanted.items()):
        return f"starting {workers}"
    has = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s" for name in wanted)
    each = " and ".join(f"{count:g} {name}" for name, count in wanted.items())
    place = "free on this machine" if is_local else "free in the cluster"
    return f"waiting for {workers} to start ({each} each; {place}: {has})"
