"""The executor on Ray: actors that each hold a model, on one machine or on a cluster. See also `ray_node`.

A lost actor is replaced by a new one, and its tasks are returned to the driver. Ray neither restarts actors nor retries
calls, because only the driver has the list of open tasks. A part that a lost actor still writes is harmless
(`pipeline.cache.parts`).
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from jobs.executor import TaskResult, Worker, WorkerSpec, make_failed_result
from jobs.messages import log_info
from jobs.ray_address import (
    CONNECT_SECONDS,
    advise_about_token,
    call_with_timeout,
    check_listening,
    explain_lost_actor,
    resolve_address,
)
from jobs.ray_node import WorkerLocation, count_cores_of_this_worker, locate_this_worker, read_last_lines
from jobs.ray_temp import directory_for_ray
from jobs.signals import keep_sigterm_handler
from jobs.slots import Slot, Slots, describe_start
from jobs.worker_packages import make_runtime_env, package_directory, working_in
from pipeline.errors import JobError, UsageError
from pipeline.records import Attempt
from pipeline.weights import Vae


@contextmanager
def connect_to_ray(address: str) -> Iterator[None]:
    """Connect to the cluster at `address` or RAY_ADDRESS inside this block. Without either, run a local Ray.

    Inside the block, standard output is redirected to standard error: Ray prints to it when a worker dies, and the
    standard output of a job is for results only.
    """
    cluster = resolve_address(address)
    with redirect_stdout(sys.stderr), _connect_to_cluster(cluster) if cluster else _run_local():
        try:
            yield
        finally:
            with keep_sigterm_handler():
                ray.shutdown()


@contextmanager
def _connect_to_cluster(address: str) -> Iterator[None]:
    """Connect to a running cluster. Raises UsageError if it does not answer within a minute."""
    name = f"{address} (RAY_ADDRESS)" if address == os.environ.get("RAY_ADDRESS") else address
    log_info(f"connecting to the Ray cluster at {name}")
    runtime_env = make_runtime_env()

    def connect() -> None:
        check_listening(address)
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)

    with package_directory() as directory:
        try:
            with working_in(directory):
                call_with_timeout(connect, CONNECT_SECONDS)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise UsageError(f"cannot reach the Ray cluster at {name}: {_explain_unreachable(error)}") from error
        yield


def _explain_unreachable(error: Exception) -> str:
    """Return the reason why a cluster cannot be reached, and a remedy."""
    if isinstance(error, TimeoutError):
        limit = f"{CONNECT_SECONDS:g} s"
        return f"no answer within {limit}; is it running, and is this the address of its head (HOST:6379)?"
    if isinstance(error, OSError) and error.errno:
        reason = (error.strerror or str(error)).lower()
        return f"{reason}; start it, correct the address, or leave it out for a local Ray"
    reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
    return f"{reason}; {advise_about_token()}" if isinstance(error, ConnectionError | RayError) else reason


@contextmanager
def _run_local() -> Iterator[None]:
    """Run a local Ray."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with directory_for_ray() as ray_directory, package_directory(ray_directory) as directory:
        with working_in(directory), keep_sigterm_handler():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=1 << 30,
            )
        yield


def _get_resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _get_available() -> dict[str, float]:
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def _list_nodes() -> set[str]:
    """Return the ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def can_grow(address: str) -> bool:
    """Return whether nodes may join the cluster. A local Ray never grows."""
    return bool(resolve_address(address))


def count_resource(name: str) -> float:
    """Return how much of a resource the cluster has: CPU, GPU or TPU."""
    return _get_resources().get(name, 0.0)


@ray.remote(max_restarts=0, max_task_retries=0)
class RayWorker:
    """A process with one worker. Several of its calls run at the same time, in threads."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def locate(self) -> WorkerLocation:
        """Return where this process runs. Answers as soon as the process runs."""
        return locate_this_worker()

    def load(self, spec: WorkerSpec, vae: Vae) -> None:
        """Load the model, and return when it is loaded."""
        self.worker = spec.for_node(count_cores_of_this_worker()).build(vae, threading.Event())

    def progress(self) -> tuple[int, int]:
        """Return the worker's images and steps. Answers while the model is loading as well, to show that it runs."""
        return (self.worker.images, self.worker.steps) if self.worker else (0, 0)

    def run(self, task: Any, attempt: Attempt, name: str) -> TaskResult:
        assert self.worker is not None  # the driver submits no task before `load` has returned
        try:
            return TaskResult(task=task, worker=name, report=self.worker.run(task, attempt))
        except Exception as error:  # the driver decides about the task, for any error
            return make_failed_result(task, name, error)


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """The driver's state of an actor: its running calls and its progress.

    load_ref: the call that loads the model; None once the model is loaded.
    locate_ref: the call that returns the actor's location.
    excluded_nodes: the nodes that it must not run on.
    tasks: by the reference of the call.
    progress_ref: the running call of `progress`, if there is one.
    progressed_at: monotonic seconds of the last progress that was seen; 0 while the actor waits for resources.
    """

    name: str
    actor: Any
    load_ref: Any
    locate_ref: Any
    excluded_nodes: frozenset[str]
    location: WorkerLocation | None = None
    tasks: dict[Any, Any] = field(default_factory=dict)
    progress_ref: Any = None
    images: int = 0
    steps: int = 0
    progressed_at: float = 0.0

    @property
    def label(self) -> str:
        """The worker and its host, for messages."""
        return f"{self.name} on {self.location.host}" if self.location else self.name


class RayExecutor:
    """`workers` actors, each with several tasks under way.

    resources: what each actor reserves, by Ray's names: CPU, GPU, TPU.
    grows: request one more actor than there are while tasks wait. Then an autoscaler adds nodes, and nodes that join
    are used.
    stall_timeout: seconds without progress (`Worker.steps`) after which an actor that loads or has tasks is restarted.
    is_local: the Ray is this job's own, so nothing else uses its resources.
    """

    can_replace = True

    def __init__(
        self,
        spec: WorkerSpec,
        vae: Vae,
        workers: int,
        resources: Mapping[str, float],
        stall_timeout: float,
        grows: bool,
        is_local: bool = False,
    ) -> None:
        self.grows, self.is_local = grows, is_local
        self.stall_timeout = stall_timeout
        self.spec, self.vae = spec, ray.put(vae)
        self.tasks_per_worker = spec.tasks_per_worker
        self.resources = resources
        self.ended: list[TaskResult] = []
        self.lost_images = 0
        self._numbers = count()
        self.slots = Slots(workers, stall_timeout)
        self._start_missing()

    @property
    def handles(self) -> list[WorkerHandle]:
        """All actors, including those that are starting."""
        return [slot.worker for slot in self.slots if slot.worker is not None]

    def _start(self, excluded_nodes: Set[str]) -> WorkerHandle:
        labels = {"ray.io/node-id": f"!in({','.join(sorted(excluded_nodes))})"}
        placement = {"label_selector": labels} if excluded_nodes else {}
        others = {name: count for name, count in self.resources.items() if name not in ("CPU", "GPU") and count}
        reserved = {"num_cpus": self.resources["CPU"], "num_gpus": self.resources.get("GPU", 0), "resources": others}
        options = {"max_concurrency": self.tasks_per_worker + 2, **reserved, **placement}
        actor = RayWorker.options(**options).remote()  # type: ignore[attr-defined]
        load_ref, locate_ref = actor.load.remote(self.spec, self.vae), actor.locate.remote()
        return WorkerHandle(f"worker-{next(self._numbers)}", actor, load_ref, locate_ref, frozenset(excluded_nodes))

    def _start_missing(self) -> None:
        """Start workers in free slots.

        A worker that still waits for resources is started again if a node that it must not run on may be used now.
        """
        avoided = self.slots.find_avoided_nodes(_list_nodes)
        for slot in self.slots:
            handle = slot.worker
            is_pending = handle is not None and handle.load_ref is not None and not handle.progressed_at
            if is_pending and handle.excluded_nodes - avoided:
                ray.kill(handle.actor)
                slot.worker = None
            if self.slots.may_start(slot, avoided):
                slot.worker, slot.may_move = self._start(avoided), False

    @property
    def workers(self) -> Sequence[str]:
        return [handle.name for handle in self.handles if handle.load_ref is None]

    @property
    def images(self) -> int:
        return self.lost_images + sum(handle.images for handle in self.handles)

    @property
    def starting(self) -> int:
        return sum(handle.load_ref is not None for handle in self.handles)

    @property
    def waiting_for(self) -> str:
        if self.workers:
            return ""
        if not self.starting:
            return "waiting for the next attempt to start a worker, after several failed"
        wanted = {} if any(handle.location for handle in self.handles) else self.resources  # a process runs already
        return describe_start(self.starting, wanted, _get_available(), _get_resources(), self.is_local)

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        handle = next(handle for handle in self.handles if handle.name == worker)
        handle.tasks[handle.actor.run.remote(task, attempt, worker)] = task
        handle.progressed_at = time.monotonic()

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        """Return the tasks that ended, after at most `seconds`. Also replaces lost actors."""
        if self.grows:
            self._follow_demand(waiting)
        self._start_missing()
        refs = [ref for handle in self.handles for ref in (*handle.tasks, handle.load_ref) if ref is not None]
        if not refs:
            time.sleep(0 if self.ended else seconds)
            return self._take_ended()
        ready, _ = ray.wait(refs, num_returns=1, timeout=0 if self.ended else seconds)
        if ready:  # collect all other calls that are ready
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for slot in self.slots:
            if slot.worker is not None:
                self._collect(slot, slot.worker, ready)
        return self._take_ended()

    def _take_ended(self) -> list[TaskResult]:
        done, self.ended = self.ended, []
        return done

    def _follow_demand(self, waiting: int) -> None:
        """Keep one worker starting while tasks wait, and none otherwise."""
        idle = [slot for slot in self.slots if slot.worker is None or slot.worker.load_ref is not None]
        if waiting and not idle:
            self.slots.append(Slot())
        elif not waiting and len(idle) < len(self.slots):
            for slot in idle:
                if slot.worker is not None:
                    ray.kill(slot.worker.actor)
                self.slots.remove(slot)

    def _collect(self, slot: Slot, handle: WorkerHandle, ready: list[Any]) -> None:
        """Collect the finished calls of a worker. Replaces the worker if it is lost or hangs."""
        try:
            if handle.load_ref in ready:
                ray.get(handle.load_ref)
                handle.load_ref = None
            for ref in [ref for ref in handle.tasks if ref in ready]:
                done = ray.get(ref)
                del handle.tasks[ref]
                handle.progressed_at = time.monotonic()
                self.ended.append(done)
                if done.error is None:
                    self.slots.note_success(slot, handle.location.node if handle.location else "")
            self._update_progress(handle)
            is_busy = handle.progressed_at and (handle.tasks or handle.load_ref is not None)
            if is_busy and time.monotonic() - handle.progressed_at > self.stall_timeout:
                self._lose(slot, handle, f"no progress for {self.stall_timeout:g} s")
        except RayTaskError as error:  # the call failed, and the actor still runs
            if handle.load_ref is None:  # a bug in this program, which a retry would hit again
                raise JobError(f"a worker failed: {_describe_error(error)}") from error
            self._lose(slot, handle, _describe_error(error))
        except RayError as error:
            if isinstance(error, OutOfMemoryError):
                self.spec = self.spec.with_smaller_batches()  # for all workers that start from now on
            self._lose(slot, handle, _describe_error(error), with_node=_died_with_its_node(error))

    def _update_progress(self, handle: WorkerHandle) -> None:
        """Read the answer to the last call of `progress`, and make the next call. Asks for the location as well."""
        if handle.location is None:
            self._update_location(handle, 0)
        if handle.progress_ref is not None:
            answered, _ = ray.wait([handle.progress_ref], timeout=0)
            if not answered:
                return
            handle.images, steps = ray.get(handle.progress_ref)
            if steps != handle.steps or not handle.progressed_at:
                handle.steps, handle.progressed_at = steps, time.monotonic()
        handle.progress_ref = handle.actor.progress.remote()

    def _update_location(self, handle: WorkerHandle, seconds: float) -> None:
        if ray.wait([handle.locate_ref], timeout=seconds)[0]:
            handle.location = ray.get(handle.locate_ref)

    def _lose(self, slot: Slot, handle: WorkerHandle, reason: str, with_node: bool = False) -> None:
        """Return the tasks of a lost worker, and free its slot. A failed start counts as a failure of the slot.

        with_node: the worker was lost because its node was, which is no failure of the slot.
        """
        self.ended += [
            TaskResult(task=task, worker=handle.name, error=f"its worker was lost ({reason})", cause="lost")
            for task in handle.tasks.values()
        ]
        if not with_node:
            if handle.location is None:  # the worker may have ended before the first check of its progress
                with suppress(RayError):
                    self._update_location(handle, 1.0)
            for line in read_last_lines(handle.location):
                log_info(f"  {handle.name}: {line}")
        if handle.load_ref is not None:
            if not with_node:
                self._note_failure(slot, handle, reason)
            log_info(f"restarting {handle.label}: {reason}")
        self._end(slot, handle)

    def replace(self, worker: str, reason: str) -> None:
        slot, handle = next((s, s.worker) for s in self.slots if s.worker is not None and s.worker.name == worker)
        log_info(f"restarting {handle.label}: {reason}")
        self.ended += [
            TaskResult(task=task, worker=worker, error=f"its worker was replaced ({reason})", cause="returned")
            for task in handle.tasks.values()
        ]
        self._note_failure(slot, handle, reason)
        self._end(slot, handle)

    def _end(self, slot: Slot, handle: WorkerHandle) -> None:
        """End a worker. The next one in its slot starts as soon as the slot allows it."""
        self.lost_images += handle.images
        ray.kill(handle.actor)
        slot.worker = None

    def _note_failure(self, slot: Slot, handle: WorkerHandle, reason: str) -> None:
        location = handle.location or WorkerLocation("", "", "")
        self.slots.note_failure(slot, location.node, location.host, reason)

    def close(self) -> None:
        """End all actors at once. Parts that they have not published do not exist; published parts are complete."""
        for handle in self.handles:
            ray.kill(handle.actor)
        self.slots.clear()


def _died_with_its_node(error: RayError) -> bool:
    """Return whether an actor was lost because its node was lost, for example preempted."""
    return (
        bool(getattr(error, "preempted", False)) or "node has died" in str(error) or "node was terminated" in str(error)
    )


def _describe_error(error: RayError) -> str:
    """Return Ray's description of an error in one line."""
    if isinstance(error, OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended the process"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    reason = last if isinstance(error, RayTaskError) else f"{type(error).__name__}: {last}"
    return explain_lost_actor(reason[:300])
