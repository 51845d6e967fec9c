"""The executor on Ray with simulated workers and a virtual clock: its bookkeeping, its ramp, and its costs."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from bench.simulated_ray import SimulatedActor, SimulatedRay, SimulatedRef, simulated_ray
from jobs import ray_executor
from jobs.executor import TaskResult
from jobs.ray_executor import RayExecutor
from jobs.ray_node import WorkerLocation
from pipeline.records import Attempt


@dataclass(frozen=True)
class Task:
    name: str


@dataclass(frozen=True)
class Spec:
    tasks_per_worker: int = 2


@dataclass
class Workers:
    """Simulated workers. Actors start and answer at once, but they load and complete tasks when a test says so.

    steps: of each actor. silent: actors that do not answer any more.
    loading: the running calls of `load`, by actor. running: the running tasks.
    """

    steps: dict[SimulatedActor, int] = field(default_factory=dict)
    silent: set[SimulatedActor] = field(default_factory=set)
    loading: dict[SimulatedActor, SimulatedRef] = field(default_factory=dict)
    running: dict[str, tuple[SimulatedActor, SimulatedRef]] = field(default_factory=dict)
    asked: list[SimulatedActor] = field(default_factory=list)

    def answer(self, actor: SimulatedActor, method: str, arguments: tuple[Any, ...]) -> SimulatedRef:
        ref = SimulatedRef()
        if method == "load":
            self.loading[actor] = ref
        elif method == "run":
            self.running[arguments[0].name] = actor, ref
        elif method == "locate":
            ref.result.set_result(WorkerLocation("node", "host", ""))
        else:
            self.asked.append(actor)
            if actor not in self.silent:
                steps = self.steps.get(actor, 0)
                ref.result.set_result((10 * steps, steps, 0.5 * steps))
        return ref

    def load(self, except_for: int = -1) -> int:
        """Let all starting actors be loaded but one. Returns how many there were that were not ended."""
        loading = [actor for actor in self.loading if not actor.is_killed and actor.number != except_for]
        for actor in loading:
            self.loading.pop(actor).result.set_result(None)
        return len(loading)

    def complete(self, name: str, worker: str, steps: int = 1) -> None:
        _, ref = self.running.pop(name)
        ref.result.set_result(
            (TaskResult(task=Task(name), worker=worker, report=name), (10 * steps, steps, 0.5 * steps))
        )

    def die(self, name: str) -> None:
        """Let the call of a task fail, because its actor died."""
        self.running.pop(name)[1].result.set_exception(ActorDiedError())


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    virtual = Clock()
    monkeypatch.setattr(ray_executor, "time", virtual)
    return virtual


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def ray(workers: Workers, clock: Clock) -> Iterator[SimulatedRay]:
    with simulated_ray(workers.answer) as simulated:
        yield simulated


def start(number: int, grows: bool = False, stall_timeout: float = 600.0) -> RayExecutor:
    """Return an executor whose workers are starting."""
    return RayExecutor(Spec(), b"", number, {"CPU": 1}, stall_timeout, grows)  # type: ignore[arg-type]


def start_ready(workers: Workers, number: int, stall_timeout: float = 600.0) -> RayExecutor:
    """Return an executor whose workers are ready."""
    executor = start(number, stall_timeout=stall_timeout)
    executor.wait(0, 1)
    workers.load()
    executor.wait(0, 1)
    assert len(executor.workers) == number
    return executor


def pass_seconds(executor: RayExecutor, clock: Clock, seconds: int) -> list[TaskResult]:
    """Return the tasks that end in this time."""
    ended = []
    for _ in range(seconds):
        clock.now += 1.0
        ended += executor.wait(0, 1)
        ended += executor.wait(0, 1)  # collects the answers to the calls that the first one made
    return ended


def test_workers_join_in_doubling_numbers(ray: SimulatedRay, workers: Workers) -> None:
    executor = start(2, grows=True)
    numbers = []
    for _ in range(7):
        executor.wait(0, 100)
        numbers.append(workers.load())
        executor.wait(0, 100)
    assert numbers == [2, 1, 2, 4, 8, 16, 32]


def test_no_more_workers_start_than_tasks_wait(ray: SimulatedRay, workers: Workers) -> None:
    executor = start(1, grows=True)
    for _ in range(4):
        executor.wait(0, 3)
        assert executor.starting <= 3
        workers.load()
        executor.wait(0, 3)
    executor.wait(0, 3)
    assert executor.starting == 3
    executor.wait(0, 0)
    assert (executor.starting, executor.restarts) == (0, 0), "they are not needed any more"
    assert sum(actor.is_killed for actor in ray.actors) == 3
    assert len(executor.slots) == len(executor.workers)
    executor.wait(0, 1)
    assert executor.starting == 1, "tasks may wait again"


def test_one_worker_that_does_not_start_does_not_stop_the_ramp(ray: SimulatedRay, workers: Workers) -> None:
    executor, numbers = start(1, grows=True), []
    for _ in range(6):
        executor.wait(0, 100)
        numbers.append(workers.load(except_for=3))
        executor.wait(0, 100)
    assert numbers == [1, 1, 1, 2, 4, 8]


def test_without_growth_no_worker_joins(ray: SimulatedRay, workers: Workers) -> None:
    executor = start_ready(workers, 2)
    executor.wait(0, 100)
    assert (executor.starting, len(ray.actors)) == (0, 2)


def test_progress_is_asked_in_turns_and_counted(ray: SimulatedRay, workers: Workers, clock: Clock) -> None:
    executor = start_ready(workers, 200)
    for number, worker in enumerate(executor.workers):
        executor.submit(Task(str(number)), Attempt(), worker)
    pass_seconds(executor, clock, 8)
    ray.calls.clear()
    workers.asked.clear()
    workers.steps = dict.fromkeys(ray.actors, 3)
    for second in range(4):
        pass_seconds(executor, clock, 1)
        assert ray.calls["progress"] == 50 * (second + 1)
    assert set(workers.asked) == set(ray.actors)
    assert executor.images == 200 * 30


def test_a_worker_that_completes_tasks_is_not_asked(ray: SimulatedRay, workers: Workers, clock: Clock) -> None:
    executor = start_ready(workers, 1)
    (worker,) = executor.workers
    pass_seconds(executor, clock, 3)
    ray.calls.clear()
    executor.submit(Task("long"), Attempt(), worker)
    for second in range(10):
        executor.submit(Task(str(second)), Attempt(), worker)
        clock.now += 0.5
        workers.complete(str(second), worker, steps=second)
        executor.wait(0, 1)
        clock.now += 0.6
        executor.wait(0, 1)
    assert ray.calls["progress"] == 0
    assert (executor.images, executor.busy_seconds) == (90, 4.5), "the result of a task has the progress as well"
    executor.replace(worker, "it is faulty")
    assert (executor.images, executor.busy_seconds) == (90, 4.5), "what it did counts"


def test_idle_workers_are_seldom_asked(ray: SimulatedRay, workers: Workers, clock: Clock) -> None:
    executor = start_ready(workers, 10)
    pass_seconds(executor, clock, 10)
    ray.calls.clear()
    pass_seconds(executor, clock, 120)
    assert 10 <= ray.calls["progress"] <= 20


@pytest.mark.parametrize(("number", "stall_timeout"), [(1, 20.0), (300, 20.0), (300, 2.0)])
def test_a_worker_that_hangs_is_replaced(
    ray: SimulatedRay, workers: Workers, clock: Clock, number: int, stall_timeout: float
) -> None:
    """The first does not answer, the second answers without progress, the others make progress."""
    executor = start_ready(workers, number, stall_timeout)
    names, tasks = executor.workers, [str(n) for n in range(number)]
    for task, worker in zip(tasks, names, strict=True):
        executor.submit(Task(task), Attempt(), worker)
    workers.silent = {ray.actors[0]}
    lost, seconds = list[TaskResult](), 0
    while clock.now < 1000.0 + 1.5 * stall_timeout + 2:
        seconds += 1
        workers.steps = dict.fromkeys(ray.actors[2:], seconds)
        ended = pass_seconds(executor, clock, 1)
        assert not ended or clock.now > 1000.0 + stall_timeout
        lost += ended
    assert sorted((done.task.name, done.worker, done.cause) for done in lost) == [
        (task, worker, "lost") for task, worker in zip(tasks[:2], names[:2], strict=False)
    ]
    assert [actor.is_killed for actor in ray.actors[:3]] == [True, True, False][:number] + [False] * (number == 1)
    assert executor.starting == len(lost), "another worker starts in the slot"


def test_a_worker_that_hangs_while_it_loads_is_replaced(ray: SimulatedRay, clock: Clock) -> None:
    executor = start(1, stall_timeout=20.0)
    pass_seconds(executor, clock, 30)
    assert [actor.is_killed for actor in ray.actors] == [True, False]


def test_a_lost_worker_returns_all_of_its_tasks_once(ray: SimulatedRay, workers: Workers, clock: Clock) -> None:
    executor = start_ready(workers, 3)
    first, second, _ = executor.workers
    for name, worker in (("a", first), ("b", first), ("c", second)):
        executor.submit(Task(name), Attempt(), worker)
    workers.die("a")
    lost = executor.wait(0, 0)
    assert [(done.task.name, done.worker, done.cause) for done in lost] == [("a", first, "lost"), ("b", first, "lost")]
    assert first not in executor.workers
    workers.die("b")
    workers.complete("c", second)
    assert [done.task.name for done in executor.wait(0, 0)] == ["c"], "the second call is that of an ended worker"
    executor.wait(0, 0)
    assert (executor.starting, len(executor.handles), len(executor.slots)) == (1, 3, 3)
    assert executor.restarts == 1
    executor.replace(second, "it is faulty")
    assert executor.restarts == 2


def test_a_result_that_comes_after_a_replacement_does_not_count(ray: SimulatedRay, workers: Workers) -> None:
    executor = start_ready(workers, 2)
    first, _ = executor.workers
    executor.submit(Task("a"), Attempt(), first)
    executor.replace(first, "it is faulty")
    workers.complete("a", first)
    assert [(done.task.name, done.cause) for done in executor.wait(0, 0)] == [("a", "returned")]
    assert executor.wait(0, 0) == []


def test_an_idle_worker_that_died_is_noticed(ray: SimulatedRay, workers: Workers, clock: Clock) -> None:
    executor = start_ready(workers, 2)
    answer = workers.answer

    def die(actor: SimulatedActor, method: str, arguments: tuple[Any, ...]) -> SimulatedRef:
        ref = SimulatedRef() if actor is ray.actors[0] else answer(actor, method, arguments)
        if actor is ray.actors[0]:
            ref.result.set_exception(ActorDiedError())
        return ref

    ray.answer = die
    pass_seconds(executor, clock, 62)
    assert executor.workers == ("worker-1",)
    assert executor.starting == 1


def count_lines(executor: RayExecutor, workers: Workers) -> int:
    """Return the number of lines of the executor that run to submit a task and to collect it."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != ray_executor.__file__:
            return None
        lines += event == "line"
        return trace

    worker, before = executor.workers[-1], sys.gettrace()
    sys.settrace(trace)
    try:
        executor.submit(Task("t"), Attempt(), worker)
        workers.complete("t", worker)
        (done,) = executor.wait(0, 5)
    finally:
        sys.settrace(before)
    assert done.task == Task("t")
    return lines


def test_a_task_costs_the_same_with_many_workers(ray: SimulatedRay, workers: Workers) -> None:
    few = start_ready(workers, 5)
    lines = count_lines(few, workers)
    many = start_ready(workers, 500)
    for number, worker in enumerate(many.workers[:-1]):
        many.submit(Task(str(number)), Attempt(), worker)
    assert count_lines(many, workers) == lines > 10
