"""Where and when workers are started again: after failures, in slots and on nodes."""

import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from jobs.messages import log_info
from jobs.scheduler import backoff
from pipeline.errors import JobError

FAILED = 3  # workers in a row that failed in every slot, without any task done, and the job ends
AVOID = 300.0  # seconds in which no worker is started where two in a row failed


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one worker. failed: workers in a row that failed in it. rests_until: when the next one may start.

    may_move: the next one may start at once on a node that is not avoided.
    """

    worker: Any = None
    failed: int = 0
    rests_until: float = 0.0
    may_move: bool = False


class Slots(list[Slot]):
    """The slots of a job, and which of them, and which nodes, are to be left alone for a while.

    stall_timeout: seconds without any task done after which the job ends if workers fail in every slot.
    """

    def __init__(self, number: int, stall_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(Slot() for _ in range(number))
        self.stall_timeout, self.clock = stall_timeout, clock
        self.succeeded: float | None = None  # when a task was last done
        self._failed_on: dict[str, int] = {}  # workers in a row, by node
        self._avoided: dict[str, float] = {}  # until when, by node

    def note_success(self, slot: Slot, node: str) -> None:
        """Take in that a worker has done a task."""
        slot.failed, self.succeeded = 0, self.clock()
        self._failed_on.pop(node, None)

    def note_failure(self, slot: Slot, node: str, host: str, why: str) -> None:
        """Take in that a worker could not start, or was sick. node, host: where it ran, empty if unknown.

        Raises JobError if workers fail in every slot, and no task was done for long, or ever.
        """
        now = self.clock()
        slot.failed += 1
        everywhere = all(slot.failed >= FAILED for slot in self)
        if everywhere and (self.succeeded is None or now - self.succeeded > self.stall_timeout):
            raise JobError(f"workers fail in all they do, or workers cannot start: {why}")
        if slot.failed > 1:
            slot.rests_until = now + (backoff(slot.failed - 1) if self.succeeded is None else AVOID)
        if node:
            self._failed_on[node] = self._failed_on.get(node, 0) + 1
            if self.succeeded is not None and self._failed_on[node] > 1:
                if self._avoided.get(node, 0.0) <= now:
                    log_info(
                        f"two workers in a row failed on {host}: none is started there for {AVOID / 60:g} min: {why}"
                    )
                self._avoided[node] = now + AVOID
                slot.may_move = True

    def avoided(self, nodes: Callable[[], Set[str]]) -> frozenset[str]:
        """The nodes on which no worker is started now; none if there are no others. nodes: asks for those there are."""
        now = self.clock()
        self._avoided = {node: until for node, until in self._avoided.items() if until > now}
        return frozenset(self._avoided) if self._avoided and nodes() - self._avoided.keys() else frozenset()

    def may_start(self, slot: Slot, avoided: Set[str]) -> bool:
        """Whether a slot is free and does not rest."""
        rests = slot.rests_until > self.clock() and not (slot.may_move and avoided)
        return slot.worker is None and not rests
