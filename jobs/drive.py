"""The driver's loop, the same with Ray and without: which task runs next, what is tried again, when to give up."""

import random
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from jobs.progress import say
from pipeline.encode import Vae
from pipeline.errors import DamagedError, LatentmillError, Stopped
from pipeline.records import Attempt

TRIES = 3
LOSSES = 10  # of the worker under a task: nodes are preempted again and again, but a task may also kill them
PAUSE = 2.0  # seconds before a task is tried again, twice as long the second time: stores have bad moments
IN_FLIGHT = 2  # tasks a replica: while one encodes, the other reads, opens and writes


class Task(Protocol):
    """A unit, or a sheet: something with a name that a worker can do again without harm."""

    @property
    def name(self) -> str: ...


class Worker(Protocol):
    """A replica with all that it needs. `run` may be called from several threads."""

    def run(self, task: Any, attempt: Attempt) -> Any: ...

    @property
    def pictures(self) -> int:
        """Pictures that went through the model so far: for the progress bar."""
        ...

    @property
    def steps(self) -> int:
        """A count that moves as long as the worker does: where it stands still, the worker has hung."""
        ...


class Job(Protocol):
    """A light description that travels to a worker's process and becomes the worker there."""

    def build(self, vae: Vae, stop: threading.Event) -> Worker: ...

    def in_smaller_slices(self) -> "Job":
        """The same job, for workers that ran out of their machine's memory."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A task that came to its end. error: why it failed, in one line; None where it did not. lost: with its worker.

    damaged_at: the byte at which it found its shard damaged.
    """

    task: Any
    report: Any
    error: str | None
    lost: bool = False
    damaged_at: int | None = None


class Engine(Protocol):
    """Where tasks run. `slots` tasks may be under way at once, now."""

    @property
    def slots(self) -> int: ...

    @property
    def pictures(self) -> int: ...

    @property
    def waiting_for(self) -> str:
        """What the engine waits for before it can run anything, in a few words; empty where it can."""
        ...

    def submit(self, task: Any, attempt: Attempt) -> bool:
        """Start a task. False where there is no place for it now: a careful attempt is alone with its worker."""
        ...

    def wait(self, seconds: float, waiting: int) -> list[Done]:
        """Tasks that ended, after at most `seconds`. waiting: how many tasks have no slot yet."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that was given up, and its last error."""

    name: str
    error: str


@dataclass(slots=True)
class Driven:
    """How a drive went. seconds: from the moment the first replica was ready to the end of the last task."""

    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0


class Signals:
    """Whether a signal has asked us to stop, and which.

    Where the program looks at it all the time, in `drive`, a signal is noted; elsewhere Stopped is raised at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.stop = threading.Event()
        self._looking = False

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.stop.is_set():
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        if self.number:
            return
        self.number = number
        self.stop.set()
        if not self._looking:
            raise Stopped

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take in SIGINT and SIGTERM inside this block."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Inside this block `check` is called often."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False


def until_stopped(job: Callable[[Signals], int], told: str) -> int:
    """Run a job; its exit code, or the one of the signal that ended it. told: what is said then."""
    signals = Signals()
    try:
        with signals.caught():
            return job(signals)
    except Stopped:
        say(f"stopped; {told}")
        return signals.exit_code


def drive(
    tasks: Sequence[Task],
    engine: Engine,
    signals: Signals,
    on_done: Callable[[Any], None],
    on_tick: Callable[[], None],
) -> Driven:
    """Run all tasks, in shuffled order so that two drivers seldom meet; a failed one goes to the end of the queue.

    on_done gets the report of each task that succeeded; on_tick is called about once a second.
    Returns the tasks that failed three times, or lost ten workers, and the time it took.
    Raises Stopped when a signal asked for it.
    """
    queue = deque(random.sample(list(tasks), len(tasks)))
    tries, losses = Counter[str](), Counter[str]()
    rests: dict[str, float] = {}
    damage: dict[str, int] = {}
    driven = Driven()
    under_way, ready = 0, 0.0
    with signals.looked_at():
        while queue or under_way:
            signals.check()
            ready = ready or (time.perf_counter() if engine.slots else 0.0)
            while under_way < engine.slots and (task := _next(queue, rests)):
                name = task.name
                attempt = Attempt(careful=losses[name] > 0, damaged_at=damage.get(name))
                if not engine.submit(task, attempt):
                    break
                queue.remove(task)
                under_way += 1
            if not under_way:
                time.sleep(0.05)  # all that is left rests, or no worker is ready
            for done in engine.wait(1.0, len(queue)):
                under_way -= 1
                if done.error is None:
                    on_done(done.report)
                    continue
                if done.damaged_at is not None:
                    damage[done.task.name] = done.damaged_at
                (losses if done.lost else tries)[done.task.name] += 1
                if tries[done.task.name] < TRIES and losses[done.task.name] < LOSSES:
                    if not signals.stop.is_set():  # else it failed of that
                        say(f"to be tried again: {done.task.name}: {done.error}")
                    queue.append(done.task)
                    rests[done.task.name] = time.monotonic() + PAUSE * tries[done.task.name]
                else:
                    driven.failures.append(Failure(done.task.name, done.error))
            on_tick()
            driven.seconds = time.perf_counter() - ready if ready else 0.0
    signals.check()
    return driven


def _next(queue: Iterable[Task], rests: Mapping[str, float]) -> Task | None:
    """The first task that does not rest after a failure."""
    now = time.monotonic()
    return next((task for task in queue if rests.get(task.name, 0.0) <= now), None)


def failed(task: Any, error: BaseException) -> Done:
    """The end of a task that raised this."""
    return Done(task, None, error_line(error), damaged_at=error.at if isinstance(error, DamagedError) else None)


def error_line(error: BaseException) -> str:
    """Why a task failed, in one line; what is not an error of ours names the line of code."""
    if isinstance(error, Stopped):
        return "it was stopped"
    if isinstance(error, LatentmillError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({where[0].filename}:{where[0].lineno})" if where else ""
    return f"{type(error).__name__}: {error}".splitlines()[0] + place
