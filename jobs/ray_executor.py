"""The executor on Ray: actors that each hold a model, on one machine or on a cluster. Only this module imports ray.

An actor that is lost is replaced by a new one, and its tasks go back to the driver: Ray neither restarts actors nor
runs calls again, because the driver knows better what is left to do. What a lost actor may still write is harmless
(`pipeline.cache.parts`).
"""

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.connect import SECONDS, call_with_timeout, check_listening, resolve_address
from jobs.engine import IN_FLIGHT, TaskResult, Worker, WorkerSpec, failed_result
from jobs.messages import log_info
from jobs.ray_temp import directory_for_ray
from jobs.slots import Slot, Slots
from jobs.worker_packages import make_runtime_env, package_directory, working_in
from pipeline.errors import JobError, UsageError
from pipeline.records import Attempt
from pipeline.weights import Vae

LAST_LINES = 20  # of a lost worker's log


@contextmanager
def connect(address: str) -> Iterator[None]:
    """A connection to the cluster at `address` or RAY_ADDRESS; without either, a local Ray for as long as this lasts.

    Meanwhile standard output is standard error: Ray prints there when a worker dies, and ours is for results.
    """
    named = resolve_address(address)
    with redirect_stdout(sys.stderr), _existing(named) if named else _local():
        try:
            yield
        finally:
            with _our_signals():
                ray.shutdown()


@contextmanager
def _existing(address: str) -> Iterator[None]:
    """A connection to a cluster that stands. Raises UsageError where it does not answer within a minute."""
    where = f"{address} (RAY_ADDRESS)" if address == os.environ.get("RAY_ADDRESS") else address
    log_info(f"connecting to the Ray cluster at {where}")
    code = make_runtime_env()

    def connect() -> None:
        check_listening(address)
        ray.init(address=address, runtime_env=code, log_to_driver=False, logging_level=logging.ERROR)

    with package_directory() as ours:
        try:
            with working_in(ours):
                call_with_timeout(connect, SECONDS)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise UsageError(f"cannot reach the Ray cluster at {where}: {_unreachable(error)}") from error
        yield


def _unreachable(error: Exception) -> str:
    """Why a cluster cannot be reached, and what to do."""
    if isinstance(error, TimeoutError):
        return f"no answer within {SECONDS:g} s; is it running, and is this the address of its head (HOST:6379)?"
    if isinstance(error, OSError) and error.errno:
        said = (error.strerror or str(error)).lower()
        return f"{said}; start it, correct the address, or leave it out for a local Ray"
    said = str(error).splitlines()[0].split(". ")[0].rstrip(".")
    if isinstance(error, ConnectionError | RayError):
        said += "; where it asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
    return said


@contextmanager
def _local() -> Iterator[None]:
    """A local Ray."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with directory_for_ray() as free, package_directory(free) as ours:
        with working_in(ours), _our_signals():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=1 << 30,
            )
        yield


@contextmanager
def _our_signals() -> Iterator[None]:
    """Keep our handler of SIGTERM: `ray.init` puts one in its place that ends the process with 15, and after
    `ray.shutdown` the signal ends it, too.
    """
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as asked:  # by Ray's handler, before we were back
        signal.signal(signal.SIGTERM, ours)
        if asked.code != signal.SIGTERM:
            raise
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, ours)


def _resources() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _available() -> dict[str, float]:
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def _nodes() -> set[str]:
    """The ids of the nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def can_grow(address: str) -> bool:
    """Whether more nodes may join: not a Ray of our own."""
    return bool(resolve_address(address))


def gpus() -> float:
    """How many GPUs the cluster has."""
    return _resources().get("GPU", 0.0)


def cpus() -> float:
    """How many CPUs the cluster has."""
    return _resources().get("CPU", 0.0)


@dataclass(frozen=True, slots=True)
class WorkerLocation:
    """Where a worker runs. node: Ray's id of it. log: the file that its standard error goes to; empty if unknown."""

    node: str
    host: str
    log: str


@ray.remote(max_restarts=0, max_task_retries=0)
class RayWorker:
    """A process with one worker. Several of its calls run at once, in threads."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def home(self) -> WorkerLocation:
        """Answers as soon as the process runs."""
        try:
            log = os.readlink("/proc/self/fd/2")
        except OSError:  # not Linux
            log = ""
        return WorkerLocation(ray.get_runtime_context().get_node_id(), os.uname().nodename, log)

    def load(self, job: WorkerSpec, vae: Vae) -> None:
        """Returns once the model is loaded."""
        self.worker = job.build(vae, threading.Event())

    def progress(self) -> tuple[int, int]:
        """Images, and steps of any kind. Answers while the model is loaded, too: so its process is seen to run."""
        return (self.worker.images, self.worker.steps) if self.worker else (0, 0)

    def run(self, task: Any, attempt: Attempt, name: str) -> TaskResult:
        assert self.worker is not None  # tasks are for those that are loaded
        try:
            return TaskResult(task=task, worker=name, report=self.worker.run(task, attempt))
        except Exception as error:  # whatever it was, the driver decides what becomes of the task
            return failed_result(task, name, error)


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """What the driver knows of an actor: the calls under way, and how far it has come.

    starting: the call that loads the model, until it has. homing: the call that asks where it runs, until it is known.
    moved: when it was last seen to get on; 0 while it waits for a place in the cluster. elsewhere: the nodes that it
    must not be on.
    """

    name: str
    actor: Any
    starting: Any
    homing: Any
    elsewhere: frozenset[str]
    home: WorkerLocation | None = None
    tasks: dict[Any, Any] = field(default_factory=dict)
    asked: Any = None
    images: int = 0
    steps: int = 0
    moved: float = 0.0


class RayExecutor:
    """`workers` actors, each with two tasks under way.

    grows: ask for one actor more than there are for as long as tasks wait, so that an autoscaler sees that more nodes
    would be used, and nodes that join are.
    stall_timeout: seconds without any progress (`Worker.steps`) after which an actor that loads or has tasks is hung.
    """

    can_replace = True

    def __init__(
        self, job: WorkerSpec, vae: Vae, workers: int, gpus: float, cpus: int, stall_timeout: float, grows: bool = False
    ) -> None:
        self.grows = grows
        self.stall_timeout = stall_timeout
        self.spec, self.vae = job, ray.put(vae)
        self.resources = {"num_cpus": cpus, "num_gpus": gpus}
        self.ended: list[TaskResult] = []
        self.lost_images = 0
        self._numbers = count()
        self.slots = Slots(workers, stall_timeout)
        self._start_missing()

    @property
    def remotes(self) -> list[WorkerHandle]:
        """The actors, also those that are starting."""
        return [slot.worker for slot in self.slots if slot.worker is not None]

    def _start(self, elsewhere: Set[str]) -> WorkerHandle:
        where = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(elsewhere))})"}} if elsewhere else {}
        options = {"max_concurrency": IN_FLIGHT + 2, **self.resources, **where}
        actor = RayWorker.options(**options).remote()  # type: ignore[attr-defined]
        starting, homing = actor.load.remote(self.spec, self.vae), actor.home.remote()
        return WorkerHandle(f"worker-{next(self._numbers)}", actor, starting, homing, frozenset(elsewhere))

    def _start_missing(self) -> None:
        """Start workers in slots that are free, and again those that wait, but not for a node that may be used."""
        avoided = self.slots.avoided(_nodes)
        for slot in self.slots:
            remote = slot.worker
            if remote is not None and remote.starting is not None and not remote.moved and remote.elsewhere - avoided:
                ray.kill(remote.actor)
                slot.worker = None
            if self.slots.may_start(slot, avoided):
                slot.worker, slot.may_move = self._start(avoided), False

    @property
    def workers(self) -> Sequence[str]:
        return [remote.name for remote in self.remotes if remote.starting is None]

    @property
    def images(self) -> int:
        return self.lost_images + sum(remote.images for remote in self.remotes)

    @property
    def starting(self) -> int:
        return sum(remote.starting is not None for remote in self.remotes)

    @property
    def waiting_for(self) -> str:
        starting = self.starting
        if self.workers:
            return ""
        if not starting:
            return "the next try to start a worker, after several failed"
        wanted = [(name[4:-1].upper(), count) for name, count in self.resources.items() if count]
        free, there = _available(), _resources()
        has = ", ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s" for name, _ in wanted)
        each = " and ".join(f"{count:g} {name}" for name, count in wanted)
        return f"{starting} worker{'s' if starting > 1 else ''} to start ({each} each; free in the cluster: {has})"

    def submit(self, task: Any, attempt: Attempt, worker: str) -> None:
        remote = next(remote for remote in self.remotes if remote.name == worker)
        remote.tasks[remote.actor.run.remote(task, attempt, worker)] = task
        remote.moved = time.monotonic()

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        """Tasks that ended, after at most `seconds`; lost actors are replaced on the way."""
        if self.grows:
            self._follow_demand(waiting)
        self._start_missing()
        refs = [ref for remote in self.remotes for ref in (*remote.tasks, remote.starting) if ref is not None]
        if not refs:
            time.sleep(0 if self.ended else seconds)
            return self._take_ended()
        ready, _ = ray.wait(refs, num_returns=1, timeout=0 if self.ended else seconds)
        if ready:  # whatever else is ready by now comes along
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for slot in self.slots:
            if slot.worker is not None:
                self._look_after(slot, slot.worker, ready)
        return self._take_ended()

    def _take_ended(self) -> list[TaskResult]:
        done, self.ended = self.ended, []
        return done

    def _follow_demand(self, waiting: int) -> None:
        """Have one worker starting while tasks wait, and none when they do not."""
        idle = [slot for slot in self.slots if slot.worker is None or slot.worker.starting is not None]
        if waiting and not idle:
            self.slots.append(Slot())
        elif not waiting and len(idle) < len(self.slots):
            for slot in idle:
                if slot.worker is not None:
                    ray.kill(slot.worker.actor)
                self.slots.remove(slot)

    def _look_after(self, slot: Slot, remote: WorkerHandle, ready: list[Any]) -> None:
        """Take in what a worker has finished; replace it if it is lost."""
        try:
            if remote.starting in ready:
                ray.get(remote.starting)
                remote.starting = None
            for ref in [ref for ref in remote.tasks if ref in ready]:
                done = ray.get(ref)
                del remote.tasks[ref]
                remote.moved = time.monotonic()
                self.ended.append(done)
                if done.error is None:
                    self.slots.note_success(slot, remote.home.node if remote.home else "")
            self._ask(remote)
            busy = remote.moved and (remote.tasks or remote.starting is not None)
            if busy and time.monotonic() - remote.moved > self.stall_timeout:
                self._lose(slot, remote, f"it stood still for {self.stall_timeout:g} s")
        except RayTaskError as error:  # the actor lives
            if remote.starting is None:  # a mistake of ours, which would come again
                raise JobError(f"a worker failed: {_cause(error)}") from error
            self._learn_home(remote, 1.0)
            self._lose(slot, remote, _cause(error))
        except RayError as error:
            if isinstance(error, OutOfMemoryError):
                self.spec = self.spec.with_smaller_slices()  # of all workers that start from now on
            self._lose(slot, remote, _cause(error), with_node=_died_with_its_node(error))

    def _ask(self, remote: WorkerHandle) -> None:
        """Keep one question for its progress under way, and learn where it runs."""
        if remote.home is None:
            self._learn_home(remote, 0)
        if remote.asked is not None:
            answered, _ = ray.wait([remote.asked], timeout=0)
            if not answered:
                return
            remote.images, steps = ray.get(remote.asked)
            if steps != remote.steps or not remote.moved:
                remote.steps, remote.moved = steps, time.monotonic()
        remote.asked = remote.actor.progress.remote()

    def _learn_home(self, remote: WorkerHandle, seconds: float) -> None:
        if ray.wait([remote.homing], timeout=seconds)[0]:
            remote.home = ray.get(remote.homing)

    def _lose(self, slot: Slot, remote: WorkerHandle, why: str, with_node: bool = False) -> None:
        """Give back the tasks of a worker that is lost, and start another. A start that failed counts as a failure."""
        self.ended += [
            TaskResult(task=task, worker=remote.name, error=f"its worker was lost ({why})", cause="lost")
            for task in remote.tasks.values()
        ]
        if not with_node:
            for line in _last_lines(remote.home):
                log_info(f"  {remote.name}: {line}")
        if remote.starting is not None:
            if not with_node:
                self._note_failure(slot, remote, why)
            log_info(f"a worker is started again: {why}")
        self._end(slot, remote)

    def replace(self, worker: str, why: str) -> None:
        slot, remote = next((s, s.worker) for s in self.slots if s.worker is not None and s.worker.name == worker)
        host = f" on {remote.home.host}" if remote.home else ""
        log_info(f"a worker{host} is replaced, because it fails: {why}")
        self.ended += [
            TaskResult(task=task, worker=worker, error=f"its worker was replaced ({why})", cause="returned")
            for task in remote.tasks.values()
        ]
        self._note_failure(slot, remote, why)
        self._end(slot, remote)

    def _end(self, slot: Slot, remote: WorkerHandle) -> None:
        """End a worker; the next one in its slot starts as soon as it may."""
        self.lost_images += remote.images
        ray.kill(remote.actor)
        slot.worker = None

    def _note_failure(self, slot: Slot, remote: WorkerHandle, why: str) -> None:
        home = remote.home or WorkerLocation("", "", "")
        self.slots.note_failure(slot, home.node, home.host, why)

    def close(self) -> None:
        """End all actors at once: what they have not published is not there, what they have is whole."""
        for remote in self.remotes:
            ray.kill(remote.actor)
        self.slots.clear()


def _died_with_its_node(error: RayError) -> bool:
    """Whether an actor was lost because its node was: preempted, say."""
    return (
        bool(getattr(error, "preempted", False)) or "node has died" in str(error) or "node was terminated" in str(error)
    )


def _last_lines(home: WorkerLocation | None) -> Sequence[str]:
    """What a worker wrote last on its standard error: read here, or by a task on its node."""
    if home is None or not home.log:
        return []
    if home.node == ray.get_runtime_context().get_node_id():
        return _tail(home.log)
    there = NodeAffinitySchedulingStrategy(home.node, soft=False)
    try:
        return ray.get(ray.remote(_tail).options(num_cpus=0, scheduling_strategy=there).remote(home.log), timeout=5)
    except RayError:  # its node is gone, or too slow
        return []


def _tail(path: str) -> list[str]:
    """The last lines of a log, without Ray's own."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = deque(file, 4 * LAST_LINES)
    except OSError:
        return []
    return [line.rstrip()[:300] for line in lines if line.strip() and not line.startswith(":")][-LAST_LINES:]


def _cause(error: RayError) -> str:
    """Ray's account of a loss, in one line."""
    if isinstance(error, OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return (last if isinstance(error, RayTaskError) else f"{type(error).__name__}: {last}")[:300]
