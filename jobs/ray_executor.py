"""The executor on Ray: actors that each hold a model, on one machine or on a cluster. See also `ray_node`.

A lost actor is replaced by a new one, and its tasks are returned to the driver. Ray neither restarts actors nor retries
calls, because only the driver has the list of open tasks. A part that a lost actor still writes is harmless
(`pipeline.cache.parts`).
"""

import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from jobs.executor import TaskResult, Worker, WorkerProgress, WorkerSpec, make_failed_result
from jobs.messages import log_info
from jobs.ray_address import (
    CONNECT_SECONDS,
    advise_about_token,
    call_with_timeout,
    check_listening,
    resolve_address,
)
from jobs.ray_node import (
    WorkerLocation,
    count_cores_of_this_worker,
    describe_error,
    died_with_its_node,
    locate_this_worker,
    read_last_lines,
)
from jobs.ray_temp import directory_for_ray
from jobs.signals import keep_sigterm_handler
from jobs.slots import Slot, Slots, describe_start
from jobs.worker_handle import WorkerHandle
from jobs.worker_packages import make_runtime_env, package_directory, working_in
from pipeline.errors import JobError, UsageError
from pipeline.records import Attempt
from pipeline.weights import Vae

CHECK_SECONDS = 1.0  # between two checks of workers
PROGRESS_CALLS = 50  # workers that are asked for their progress in a check: each costs the driver 0.3 ms
GATHER_SECONDS, LONGEST_GATHER = 1e-4, 0.25  # per worker: answers and tasks are cheaper for the driver in batches
IDLE_SECONDS = 60.0  # between two calls to a worker without tasks, which only show that it is not lost

Counters = tuple[int, int, float]  # `Worker.images`, `Worker.steps` and `Worker.busy_seconds`
Collect = Callable[[WorkerHandle, Any], None]  # takes the result of a call of a worker


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

    def progress(self) -> Counters:
        """Return the worker's progress. Answers while the model is loading as well, to show that it runs."""
        worker = self.worker
        return (worker.images, worker.steps, worker.busy_seconds) if worker else (0, 0, 0.0)

    def run(self, task: Any, attempt: Attempt, name: str) -> tuple[TaskResult, Counters]:
        """Run a task. The progress saves the driver a call of `progress`."""
        assert self.worker is not None  # the driver submits no task before `load` has returned
        try:
            done = TaskResult(task=task, worker=name, report=self.worker.run(task, attempt))
        except Exception as error:  # the driver decides about the task, for any error
            done = make_failed_result(task, name, error)
        return done, self.progress()


class RayExecutor:
    """`workers` actors, each with several tasks under way.

    resources: what each actor reserves, by Ray's names: CPU, GPU, TPU.
    grows: request more actors while tasks wait. Then an autoscaler adds nodes, and nodes that join are used.
    stall_timeout: seconds without progress (`Worker.steps`) after which an actor that loads or has tasks is restarted.
    is_local: the Ray is this job's own, so nothing else uses its resources.

    Ray puts the result of each call into `_answers`, so the cost of a task does not depend on the number of workers.
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
        self.lost, self.restarts = WorkerProgress(0, 0.0), 0  # of the workers that were ended
        self.workers: tuple[str, ...] = ()  # replaced by another tuple after each change
        self._numbers = count()
        self._first_workers = workers
        self._answers: SimpleQueue[tuple[WorkerHandle, Collect, Future[Any]]] = SimpleQueue()
        self._ready: dict[str, WorkerHandle] = {}
        self._starting: dict[str, WorkerHandle] = {}
        self._turns: deque[WorkerHandle] = deque()  # in which their progress is checked; actors that run
        self._next_check = 0.0
        self.slots = Slots(workers, stall_timeout)
        self._vacant: dict[Slot, None] = dict.fromkeys(self.slots)
        self._start_missing()

    @property
    def handles(self) -> list[WorkerHandle]:
        """All actors, including those that are starting."""
        return [*self._ready.values(), *self._starting.values()]

    def _start(self, slot: Slot, excluded_nodes: Set[str]) -> None:
        labels = {"ray.io/node-id": f"!in({','.join(sorted(excluded_nodes))})"}
        placement = {"label_selector": labels} if excluded_nodes else {}
        others = {name: count for name, count in self.resources.items() if name not in ("CPU", "GPU") and count}
        reserved = {"num_cpus": self.resources["CPU"], "num_gpus": self.resources.get("GPU", 0), "resources": others}
        options = {"max_concurrency": self.tasks_per_worker + 2, **reserved, **placement}
        actor = RayWorker.options(**options).remote()  # type: ignore[attr-defined]
        handle = WorkerHandle(f"worker-{next(self._numbers)}", actor, slot, frozenset(excluded_nodes))
        slot.worker, slot.may_move = handle, False
        self._starting[handle.name] = handle
        self._await(handle, actor.load.remote(self.spec, self.vae), self._collect_load)
        handle.locating = self._await(handle, actor.locate.remote(), self._collect_location)

    def _await(self, handle: WorkerHandle, ref: Any, collect: Collect) -> Future[Any]:
        """Let `collect` be called with the result of a call once it has one. Ray calls the callback in its thread."""
        future: Future[Any] = ref.future()
        future.add_done_callback(lambda done: self._answers.put((handle, collect, done)))
        return future

    def _start_missing(self) -> None:
        """Start workers in free slots.

        A worker that still waits for resources is started again if a node that it must not run on may be used now.
        """
        if not self._vacant and not self._starting:
            return
        avoided = self.slots.find_avoided_nodes(_list_nodes)
        for handle in list(self._starting.values()):
            if handle.excluded_nodes - avoided and not handle.progressed_at:
                self._end(handle)
        for slot in [slot for slot in self._vacant if self.slots.may_start(slot, avoided)]:
            del self._vacant[slot]
            self._start(slot, avoided)

    @property
    def images(self) -> int:
        return self.lost.images + sum(handle.progress.images for handle in self.handles)

    @property
    def busy_seconds(self) -> float:
        return self.lost.busy_seconds + sum(handle.progress.busy_seconds for handle in self.handles)

    @property
    def progress(self) -> dict[str, WorkerProgress]:
        return {handle.label: handle.progress for handle in self._ready.values()}

    @property
    def starting(self) -> int:
        return len(self._starting)

    @property
    def waiting_for(self) -> str:
        if self.workers:
            return ""
        if not self.starting:
            return "waiting for the next attempt to start a worker, after several failed"
        wanted = {} if any(handle.location for handle in self.handles) else self.resources  # a process runs already
        return describe_start(self.starting, wanted, _get_available(), _get_resources(), self.is_local)

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        handle = self._ready[worker]
        handle.tasks[task.name] = task
        handle.progressed_at = time.monotonic()
        self._await(handle, handle.actor.run.remote(task, attempt, worker), self._collect_task)

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        """Return the tasks that ended, after at most `seconds`, or once a worker is ready. Replaces lost actors."""
        end = time.monotonic() + (0 if self.ended else seconds)
        if self.grows:
            self._follow_demand(waiting)
        workers = self.workers
        while True:
            if time.monotonic() >= self._next_check:
                self._check_workers()
            self._collect_answers(max(0.0, min(end, self._next_check) - time.monotonic()))
            if self.ended or self.workers is not workers or time.monotonic() >= end:
                done, self.ended = self.ended, []
                return done

    def _follow_demand(self, waiting: int) -> None:
        """Start 1 worker, then 2, then 4, as they get ready, but no more than tasks wait. If none waits, end them."""
        unready = len(self._vacant) + len(self._starting)
        joined = max(0, len(self._ready) - self._first_workers)
        if missing := max(0, min(waiting, 1 + joined) - unready):
            added = [Slot() for _ in range(missing)]
            self.slots += added
            self._vacant.update(dict.fromkeys(added))
            self._next_check = 0.0
        elif not waiting and self._ready and unready:
            for handle in list(self._starting.values()):
                self._end(handle)
            self._vacant.clear()
            self.slots[:] = [handle.slot for handle in self._ready.values()]

    def _check_workers(self) -> None:
        """Start missing workers, and check the progress of those whose turn it is: each several times in a timeout."""
        self._next_check = time.monotonic() + CHECK_SECONDS
        self._start_missing()
        workers = len(self._turns)
        number = min(workers, max(PROGRESS_CALLS, math.ceil(4 * CHECK_SECONDS * workers / self.stall_timeout)))
        for _ in range(number):
            handle = self._turns.popleft()
            if not handle.is_over:
                self._turns.append(handle)
                self._check_progress(handle, seconds=CHECK_SECONDS * workers / number)

    def _check_progress(self, handle: WorkerHandle, seconds: float) -> None:
        """Replace a worker that hangs. Otherwise ask for its progress, which fails if the worker is lost.

        seconds: between two checks of the worker. If it has completed a task since the last one, it is not asked.
        """
        now = time.monotonic()
        if handle.is_busy and now - handle.progressed_at > self.stall_timeout:
            self._lose(handle, f"no progress for {self.stall_timeout:g} s")
        elif not handle.is_asked and now - handle.reported_at >= (seconds if handle.is_busy else IDLE_SECONDS):
            handle.is_asked, handle.reported_at = True, now
            self._await(handle, handle.actor.progress.remote(), self._collect_progress)

    def _collect_answers(self, seconds: float) -> None:
        """Wait at most `seconds` for an answer, and collect all that have come."""
        with suppress(Empty):
            answer = self._answers.get(timeout=seconds)
            time.sleep(min(GATHER_SECONDS * len(self._ready), LONGEST_GATHER))
            while True:
                self._collect(*answer)
                answer = self._answers.get_nowait()

    def _collect(self, handle: WorkerHandle, collect: Collect, future: Future[Any]) -> None:
        """Collect a finished call of a worker. Replaces the worker if it is lost."""
        if handle.is_over:
            return
        try:
            collect(handle, future.result())
        except RayTaskError as error:  # the call failed, and the actor still runs
            if handle.is_loaded:  # a bug in this program, which a retry would hit again
                raise JobError(f"a worker failed: {describe_error(error)}") from error
            self._lose(handle, describe_error(error))
        except RayError as error:
            if isinstance(error, OutOfMemoryError):
                self.spec = self.spec.with_smaller_batches()  # for all workers that start from now on
            self._lose(handle, describe_error(error), with_node=died_with_its_node(error))

    def _collect_location(self, handle: WorkerHandle, location: WorkerLocation) -> None:
        handle.location, handle.progressed_at = location, time.monotonic()
        self._turns.append(handle)

    def _collect_load(self, handle: WorkerHandle, _: None) -> None:
        handle.is_loaded = True
        self._ready[handle.name] = self._starting.pop(handle.name)
        self.workers = tuple(self._ready)

    def _collect_progress(self, handle: WorkerHandle, progress: Counters) -> None:
        handle.is_asked = False
        self._note_progress(handle, progress)

    def _note_progress(self, handle: WorkerHandle, progress: Counters) -> None:
        images, steps, busy_seconds = progress
        handle.progress = WorkerProgress(images, busy_seconds)
        if steps != handle.steps:
            handle.steps, handle.progressed_at = steps, time.monotonic()

    def _collect_task(self, handle: WorkerHandle, result: tuple[TaskResult, Counters]) -> None:
        done, progress = result
        del handle.tasks[done.task.name]
        self._note_progress(handle, progress)
        handle.progressed_at = handle.reported_at = time.monotonic()
        self.ended.append(done)
        if done.error is None:
            self.slots.note_success(handle.slot, handle.node)

    def _lose(self, handle: WorkerHandle, reason: str, with_node: bool = False) -> None:
        """Return the tasks of a lost worker, and free its slot. A failed start counts as a failure of the slot.

        with_node: the worker was lost because its node was, which is no failure of the slot.
        """
        self.ended += [
            TaskResult(task=task, worker=handle.name, error=f"its worker was lost ({reason})", cause="lost")
            for task in handle.tasks.values()
        ]
        self.restarts += 1
        if not with_node:
            if handle.location is None:  # the worker may have ended right after its start
                with suppress(RayError, TimeoutError):
                    handle.location = handle.locating.result(timeout=1.0)
            for line in read_last_lines(handle.location):
                log_info(f"  {handle.name}: {line}")
        if not handle.is_loaded:
            if not with_node:
                self._note_failure(handle, reason)
            log_info(f"restarting {handle.label}: {reason}")
        self._end(handle)

    def replace(self, worker: str, reason: str) -> None:
        handle = self._ready[worker]
        log_info(f"restarting {handle.label}: {reason}")
        self.ended += [
            TaskResult(task=task, worker=worker, error=f"its worker was replaced ({reason})", cause="returned")
            for task in handle.tasks.values()
        ]
        self.restarts += 1
        self._note_failure(handle, reason)
        self._end(handle)

    def _end(self, handle: WorkerHandle) -> None:
        """End a worker. The next one in its slot starts as soon as the slot allows it."""
        images, busy_seconds = handle.progress
        self.lost = WorkerProgress(self.lost.images + images, self.lost.busy_seconds + busy_seconds)
        ray.kill(handle.actor)
        handle.slot.worker = None
        self._vacant[handle.slot] = None
        self._starting.pop(handle.name, None)
        if self._ready.pop(handle.name, None):
            self.workers = tuple(self._ready)
        self._next_check = 0.0

    def _note_failure(self, handle: WorkerHandle, reason: str) -> None:
        location = handle.location or WorkerLocation("", "", "")
        self.slots.note_failure(handle.slot, location.node, location.host, reason)

    def close(self) -> None:
        """End all actors at once. Parts that they have not published do not exist; published parts are complete."""
        for handle in self.handles:
            ray.kill(handle.actor)
        self.slots.clear()
