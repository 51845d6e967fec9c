"""What runs tasks: the protocols of tasks, workers and engines, and how a task ends."""

import re
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.encoder import is_device_error
from pipeline.errors import DamagedError, LatentmillError, Stopped, StorageError
from pipeline.records import Attempt
from pipeline.weights import Vae

IN_FLIGHT = 2  # tasks per worker: while one encodes, the other reads, opens and writes

# Why a task did not come to its end.
#   task      it failed, and nothing says that something other than the task is the reason
#   damage    its shard is damaged at a byte, as far as its worker can tell
#   storage   a file could not be read or written, and may be later
#   device    the worker's accelerator reported an error after which every call fails
#   lost      the worker's process ended, or hung
#   returned  its worker was ended because of other tasks
Cause = Literal["task", "damage", "storage", "device", "lost", "returned"]


class Task(Protocol):
    """A unit, or a sheet: something with a name that a worker can do again without harm."""

    @property
    def name(self) -> str: ...


class Worker(Protocol):
    """A model on its device with all that it needs. `run` may be called from several threads."""

    def run(self, task: Any, attempt: Attempt) -> Any: ...

    @property
    def images(self) -> int:
        """Images that went through the model so far: for the progress bar."""
        ...

    @property
    def steps(self) -> int:
        """A count that moves as long as the worker does: if it stands still, the worker hangs."""
        ...


class WorkerSpec(Protocol):
    """A light description that travels to a worker's process and becomes the worker there."""

    def build(self, vae: Vae, stop: threading.Event) -> Worker: ...

    def with_smaller_slices(self) -> "WorkerSpec":
        """The same job, for workers that ran out of their machine's memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """A task that ended. worker: the id of the worker that had it. report: None if the task failed.

    error: why it failed, in one line; None if it did not. damaged_at: the byte at which its shard is damaged.
    """

    task: Any
    worker: str
    report: Any = None
    error: str | None = None
    cause: Cause = "task"
    damaged_at: int | None = None


class Executor(Protocol):
    """Where tasks run."""

    @property
    def workers(self) -> Sequence[str]:
        """The ids of the workers that are ready. An id is never used again."""
        ...

    @property
    def starting(self) -> int:
        """How many more workers are starting."""
        ...

    @property
    def images(self) -> int: ...

    @property
    def waiting_for(self) -> str:
        """What the engine waits for before it can run anything, in a few words; empty if it can."""
        ...

    @property
    def can_replace(self) -> bool:
        """Whether `replace` can start another worker."""
        ...

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        """Start a task on a worker that is ready."""
        ...

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        """Tasks that ended, after at most `seconds`. waiting: how many tasks no worker has yet."""
        ...

    def replace(self, worker: str, why: str) -> None:
        """End a worker that fails, and start another. Its tasks come back from `wait`, as `returned`.

        Raises JobError if no worker can do better.
        """
        ...

    def close(self) -> None: ...


def failed_result(task: Any, worker: str, error: Exception) -> TaskResult:
    """How a task ended that raised an error in a worker."""
    damaged_at = error.at if isinstance(error, DamagedError) else None
    return TaskResult(
        task=task, worker=worker, error=format_error(error), cause=find_cause(error), damaged_at=damaged_at
    )


def find_cause(error: BaseException) -> Cause:
    """What an error in a worker says about its cause."""
    if isinstance(error, DamagedError):
        return "damage"
    if isinstance(error, StorageError) and error.may_pass:
        return "storage"
    return "device" if is_device_error(error) else "task"


def format_error(error: BaseException) -> str:
    """Why a task failed, in one line; for an error that is not ours, with the line of code."""
    if isinstance(error, Stopped):
        return "it was stopped"
    if isinstance(error, LatentmillError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({where[0].filename}:{where[0].lineno})" if where else ""
    return re.split(r"[\r\n]", f"{type(error).__name__}: {error}", maxsplit=1)[0] + place
