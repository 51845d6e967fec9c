"""The protocols of tasks, workers and executors, and the result of a task."""

import re
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.encoder import is_device_error
from pipeline.errors import DamagedError, DamagedFileError, LatentmillError, OtherUnitError, Stopped, StorageError
from pipeline.records import Attempt
from pipeline.weights import Vae

# Why a task failed.
#   task      the task failed, and nothing points to another reason
#   damage    its shard is damaged at a byte, as far as its worker can tell
#   storage   a file could not be read or written; a retry may succeed
#   device    the worker's accelerator reported an error after which every call fails
#   lost      the worker's process ended, or hung
#   returned  its worker was ended, or its device failed, because of other tasks
#   final     a retry cannot succeed: a file of the cache is damaged
Cause = Literal["task", "damage", "storage", "device", "lost", "returned", "final"]


class Task(Protocol):
    """A unit or a sheet: named work that a worker can repeat without harm."""

    @property
    def name(self) -> str: ...


class Worker(Protocol):
    """A model on its device, with all that it needs. `run` may be called from several threads."""

    def run(self, task: Any, attempt: Attempt) -> Any: ...

    @property
    def images(self) -> int:
        """The number of images that went through the model so far, for the progress bar."""
        ...

    @property
    def steps(self) -> int:
        """A counter that increases whenever the worker makes progress; used to detect hangs."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the model ran so far; 0 if that is not measured."""
        ...


class WorkerSpec(Protocol):
    """A small description of a worker. It is sent to the worker's process, which builds the worker.

    Implemented by `pipeline.flow.EncodeSpec`, `pipeline.maintenance.retry.RetrySpec` and
    `pipeline.preview.render.RenderSpec`.
    """

    @property
    def tasks_per_worker(self) -> int:
        """The number of tasks that a worker runs at the same time."""
        ...

    def build(self, vae: Vae, stop: threading.Event) -> Worker: ...

    def for_node(self, cores: float) -> "WorkerSpec":
        """Return the same spec for a worker that may use this many cores of its node."""
        ...

    def with_smaller_batches(self) -> "WorkerSpec":
        """Return the same spec for workers whose machine ran out of memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The result of a task.

    worker: the id of the worker that ran it.
    report: None if the task failed.
    error: the reason of the failure in one line; None if the task succeeded.
    cause: valid only for a failure.
    damaged_at: the byte at which its shard is damaged.
    """

    task: Any
    worker: str
    report: Any = None
    error: str | None = None
    cause: Cause = "task"
    damaged_at: int | None = None


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """How many tasks wait for a worker, how many workers have, and how many were given up."""

    waiting: int = 0
    under_way: int = 0
    failed: int = 0


class WorkerProgress(NamedTuple):
    """The images that went through a worker's model so far, and the seconds for which it ran."""

    images: int
    busy_seconds: float


class Executor(Protocol):
    """Runs tasks on workers."""

    @property
    def workers(self) -> Sequence[str]:
        """The ids of the workers that are ready. An id is never used again."""
        ...

    @property
    def starting(self) -> int:
        """The number of further workers that are starting."""
        ...

    @property
    def restarts(self) -> int:
        """The number of workers so far that were lost or replaced."""
        ...

    @property
    def images(self) -> int:
        """The number of images that went through all models so far."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds for which models ran so far, summed over the workers; 0 if that is not measured."""
        ...

    @property
    def progress(self) -> Mapping[str, WorkerProgress]:
        """The progress of the workers that are ready, by their labels; empty if it is not measured."""
        ...

    @property
    def waiting_for(self) -> str:
        """The state until the executor can run tasks, such as `starting 2 workers`; empty from then on."""
        ...

    @property
    def tasks_per_worker(self) -> int:
        """The number of tasks that a worker runs at the same time."""
        ...

    @property
    def can_replace(self) -> bool:
        """Whether `replace` can start another worker."""
        ...

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        """Start a task on a worker that is ready."""
        ...

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        """Return the tasks that ended, after at most `seconds`. waiting: the number of tasks that no worker has."""
        ...

    def replace(self, worker: str, reason: str) -> None:
        """End a worker that fails, and start another. `wait` returns its tasks with the cause `returned`.

        Raises JobError if no other worker can be started.
        """
        ...

    def close(self) -> None:
        """End all workers."""
        ...


def make_failed_result(task: Any, worker: str, error: Exception) -> TaskResult:
    """Return the result of a task that raised an error in a worker."""
    damaged_at = error.at if isinstance(error, DamagedError) else None
    return TaskResult(
        task=task, worker=worker, error=format_error(error), cause=find_cause(error), damaged_at=damaged_at
    )


def find_cause(error: BaseException) -> Cause:
    """Classify an error that a worker raised."""
    if isinstance(error, DamagedFileError):
        return "final"
    if isinstance(error, DamagedError):
        return "damage"
    if isinstance(error, OtherUnitError):
        return "returned"
    if isinstance(error, StorageError) and error.may_pass:
        return "storage"
    return "device" if is_device_error(error) else "task"


def format_error(error: BaseException) -> str:
    """Return an error in one line; an error that is not a LatentmillError is followed by its line of code."""
    if isinstance(error, Stopped):
        return "it was stopped"
    if isinstance(error, LatentmillError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    location = f" ({frames[0].filename}:{frames[0].lineno})" if frames else ""
    return re.split(r"[\r\n]", f"{type(error).__name__}: {error}", maxsplit=1)[0] + location
