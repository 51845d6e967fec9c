"""The driver's state of an actor of Ray."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jobs.executor import WorkerProgress
from jobs.ray_node import WorkerLocation
from jobs.slots import Slot


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """The driver's state of an actor: its running tasks and its progress.

    excluded_nodes: the nodes that it must not run on.
    locating: the call that returns the actor's location.
    is_loaded: the model is loaded, so the actor takes tasks.
    tasks: the running ones, by name.
    is_asked: a call of `progress` is running.
    reported_at: monotonic seconds of the last such call, or of the last task that ended.
    progressed_at: monotonic seconds of the last progress that was seen; 0 while the actor waits for resources.
    """

    name: str
    actor: Any
    slot: Slot
    excluded_nodes: frozenset[str]
    locating: Future[WorkerLocation] = field(default_factory=Future)
    location: WorkerLocation | None = None
    is_loaded: bool = False
    tasks: dict[str, Any] = field(default_factory=dict)
    is_asked: bool = False
    progress: WorkerProgress = WorkerProgress(0, 0.0)
    steps: int = 0
    reported_at: float = 0.0
    progressed_at: float = 0.0

    @property
    def label(self) -> str:
        """The worker and its host, for messages."""
        return f"{self.name} on {self.location.host}" if self.location else self.name

    @property
    def node(self) -> str:
        """The id of its node; empty if it is unknown."""
        return self.location.node if self.location else ""

    @property
    def is_over(self) -> bool:
        """Whether the actor was ended. Its calls do not matter any more."""
        return self.slot.worker is not self

    @property
    def is_busy(self) -> bool:
        """Whether it loads or has tasks, and so must make progress."""
        return bool(self.tasks) or not self.is_loaded
