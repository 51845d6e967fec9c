"""The engine on Ray: actors that each hold a replica, on this machine or on a cluster. The only module that knows ray.

An actor that is lost is replaced by a new one, and its tasks go back to the driver: Ray neither restarts actors nor
runs calls again, because the driver knows better what is left to do. What a lost actor may still write is harmless
(`pipeline.commit`).
"""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from jobs.drive import IN_FLIGHT, Done, Job, Worker, error_line
from jobs.progress import say
from jobs.reach import SECONDS, check_listens, cluster_named, in_time
from jobs.scratch import directory_for_ray
from pipeline.encode import Vae
from pipeline.errors import JobError, UsageError
from pipeline.records import Attempt

FAILED_STARTS = 3  # in a row, by their own fault, and the job ends
LOST_STARTS = 20  # the same, hung or with their nodes
OURS = ("vae", "pipeline", "jobs")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster at `address` or RAY_ADDRESS; without either, a local Ray for as long as this lasts.

    Meanwhile standard output is standard error: Ray prints there when a worker dies, and ours is for results.
    """
    named = cluster_named(address)
    with redirect_stdout(sys.stderr), _existing(named) if named else _local():
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _existing(address: str) -> Iterator[None]:
    """A connection to a cluster that stands. Raises UsageError where it does not answer within a minute."""
    where = f"{address} (RAY_ADDRESS)" if address == os.environ.get("RAY_ADDRESS") else address
    say(f"connecting to the Ray cluster at {where}")
    code = _our_code()

    def connect() -> None:
        check_listens(address)
        ray.init(address=address, runtime_env=code, log_to_driver=False, logging_level=logging.ERROR)

    with _among_ours() as ours:
        try:
            with chdir(ours):
                in_time(connect, SECONDS)
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


def _our_code() -> dict[str, Any]:
    """What sends our packages along, so that workers run the driver's; not where a submitted working directory has."""
    root = Path(__file__).resolve().parents[1]
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
    if submitted is not None:
        sent = submitted.get("runtime_env", {}).get("working_dir")
        if not sent or root == Path.cwd():
            return {}
    return {"py_modules": [str(root / name) for name in OURS]}


@contextmanager
def _among_ours(below: str | None = None) -> Iterator[str]:
    """A directory with nothing in it but links to our packages.

    Ray puts the driver's current directory first on its workers' path, where a user's `vae.py` or folder `jobs/` would
    be taken for ours. (A runtime_env with an empty working_dir does the same, but 2.5 s later: the workers that Ray
    starts ahead cannot be used then.)
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="latentmill-", dir=below) as directory:
        for name in OURS:
            Path(directory, name).symlink_to(root / name)
        yield directory


@contextmanager
def _local() -> Iterator[None]:
    """A local Ray."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with directory_for_ray() as free, _among_ours(free) as ours:
        with chdir(ours), _our_signals():
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
    """Keep our handler of SIGTERM: `ray.init` puts one in its place that ends the process with 15."""
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


def can_grow(address: str) -> bool:
    """Whether more nodes may join: not a Ray of our own."""
    return bool(cluster_named(address))


def gpus() -> float:
    """How many GPUs the cluster has."""
    return _resources().get("GPU", 0.0)


def cpus() -> float:
    """How many CPUs the cluster has."""
    return _resources().get("CPU", 0.0)


@ray.remote(max_restarts=0, max_task_retries=0)
class Actor:
    """A process with one worker. Several of its calls run at once, in threads."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def load(self, job: Job, vae: Vae) -> None:
        """Returns once the replica is loaded."""
        self.worker = job.build(vae, threading.Event())

    def progress(self) -> tuple[int, int]:
        """Pictures, and steps of any kind. Answers while the replica is loaded, too: so its process is seen to run."""
        return (self.worker.pictures, self.worker.steps) if self.worker else (0, 0)

    def run(self, task: Any, attempt: Attempt) -> Done:
        assert self.worker is not None  # tasks are for those that are loaded
        try:
            return Done(task, self.worker.run(task, attempt), None)
        except Exception as error:  # whatever it was, the driver decides what becomes of the task
            return Done(task, None, error_line(error))


@dataclass(slots=True, eq=False)
class Remote:
    """What the driver knows of an actor: the calls under way, and how far it has come.

    starting: the call that loads the replica, until it has. alone: what it does now is tried carefully, and nothing
    beside it. moved: when it was last seen to get on; 0 while it waits for a place in the cluster.
    """

    actor: Any
    starting: Any
    tasks: dict[Any, Any] = field(default_factory=dict)
    alone: bool = False
    asked: Any = None
    pictures: int = 0
    steps: int = 0
    moved: float = 0.0


class RayEngine:
    """`workers` actors, each with two tasks under way.

    grows: ask for one actor more than there are for as long as tasks wait, so that an autoscaler sees that more nodes
    would be used, and nodes that join are.
    patience: seconds without any progress (`Worker.steps`) after which an actor that loads or has tasks is hung.
    """

    def __init__(
        self, job: Job, vae: Vae, workers: int, gpus: float, cpus: int, patience: float, grows: bool = False
    ) -> None:
        self.grows = grows
        self.patience = patience
        self.job, self.vae = job, ray.put(vae)
        self.resources = {"num_cpus": cpus, "num_gpus": gpus}
        self.replicas = [self._start() for _ in range(workers)]
        self.ended: list[Done] = []
        self.lost_pictures = 0
        self.failed_starts = 0

    def _start(self) -> Remote:
        actor = Actor.options(max_concurrency=IN_FLIGHT + 1, **self.resources).remote()  # type: ignore[attr-defined]
        return Remote(actor, actor.load.remote(self.job, self.vae))

    @property
    def slots(self) -> int:
        running = [replica for replica in self.replicas if replica.starting is None]
        return sum(len(replica.tasks) if replica.alone else IN_FLIGHT for replica in running)

    @property
    def pictures(self) -> int:
        return self.lost_pictures + sum(replica.pictures for replica in self.replicas)

    @property
    def waiting_for(self) -> str:
        starting = sum(replica.starting is not None for replica in self.replicas)
        if self.slots or not starting:
            return ""
        wanted = [(name[4:-1].upper(), count) for name, count in self.resources.items() if count]
        free, there = _available(), _resources()
        has = ", ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s" for name, _ in wanted)
        each = " and ".join(f"{count:g} {name}" for name, count in wanted)
        return f"{starting} worker{'s' if starting > 1 else ''} to start ({each} each; free in the cluster: {has})"

    def submit(self, task: Any, attempt: Attempt) -> bool:
        """Give the task to the replica with the fewest; a careful attempt only to one that has none."""
        most = 1 if attempt.careful else IN_FLIGHT
        free = [r for r in self.replicas if r.starting is None and not r.alone and len(r.tasks) < most]
        if not free:
            return False
        replica = min(free, key=lambda replica: len(replica.tasks))
        replica.tasks[replica.actor.run.remote(task, attempt)] = task
        replica.alone, replica.moved = attempt.careful, time.monotonic()
        return True

    def wait(self, seconds: float, waiting: int) -> list[Done]:
        """Tasks that ended, after at most `seconds`; lost actors are replaced on the way."""
        if self.grows:
            self._follow_demand(waiting)
        refs = [ref for replica in self.replicas for ref in (*replica.tasks, replica.starting) if ref is not None]
        if not refs:
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=seconds)
        if ready:  # whatever else is ready by now comes along
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for replica in list(self.replicas):
            self._look_after(replica, ready)
        done, self.ended = self.ended, []
        return done

    def _follow_demand(self, waiting: int) -> None:
        """Have one replica starting while tasks wait, and none when they do not."""
        starting = [replica for replica in self.replicas if replica.starting is not None]
        if waiting and not starting:
            self.replicas.append(self._start())
        elif not waiting and len(starting) < len(self.replicas):
            for replica in starting:
                ray.kill(replica.actor)
                self.replicas.remove(replica)

    def _look_after(self, replica: Remote, ready: list[Any]) -> None:
        """Take in what a replica has finished; replace it where it is lost."""
        try:
            if replica.starting in ready:
                ray.get(replica.starting)
                replica.starting = None
                self.failed_starts = 0
            for ref in [ref for ref in replica.tasks if ref in ready]:
                self.ended.append(ray.get(ref))
                del replica.tasks[ref]
                replica.alone, replica.moved = False, time.monotonic()
            self._ask(replica)
            busy = replica.moved and (replica.tasks or replica.starting is not None)
            if busy and time.monotonic() - replica.moved > self.patience:
                self._replace(replica, f"it stood still for {self.patience:g} s")
        except RayTaskError as error:  # the actor lives
            if replica.starting is None:  # a mistake of ours, which would come again
                raise JobError(f"a worker failed: {_cause(error)}") from error
            self._replace(replica, _cause(error), FAILED_STARTS)
        except RayError as error:
            if isinstance(error, OutOfMemoryError):
                self.job = self.job.in_smaller_slices()  # of all workers that start from now on
            self._replace(replica, _cause(error))

    def _ask(self, replica: Remote) -> None:
        """Keep one question for its progress under way."""
        if replica.asked is not None:
            answered, _ = ray.wait([replica.asked], timeout=0)
            if not answered:
                return
            replica.pictures, steps = ray.get(replica.asked)
            if steps != replica.steps or not replica.moved:
                replica.steps, replica.moved = steps, time.monotonic()
        replica.asked = replica.actor.progress.remote()

    def _replace(self, replica: Remote, why: str, starts: int = LOST_STARTS) -> None:
        """Start another one. Raises JobError where `starts` in a row were lost before they were ready."""
        if replica.starting is not None:
            self.failed_starts += 1
            if self.failed_starts >= starts:
                raise JobError(f"workers cannot start: {why}")
            say(f"a worker is started again: {why}")
        reason = f"its worker was lost ({why})"
        self.ended += [Done(task, None, reason, lost=True) for task in replica.tasks.values()]
        self.lost_pictures += replica.pictures
        ray.kill(replica.actor)
        self.replicas[self.replicas.index(replica)] = self._start()

    def close(self) -> None:
        """End all actors at once: what they have not published is not there, what they have is whole."""
        for replica in self.replicas:
            ray.kill(replica.actor)


def _cause(error: RayError) -> str:
    """Ray's account of a loss, in one line."""
    if isinstance(error, OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
