"""Workers for `jobs.ray_executor` that are no processes, so that a thousand of them fit into one."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jobs import ray_executor

Answer = Callable[["SimulatedActor", str, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class SimulatedRef:
    """The reference of a call. The result is set by whoever runs the call."""

    result: Future[Any] = field(default_factory=Future)

    def future(self) -> Future[Any]:
        return self.result


@dataclass(eq=False)
class SimulatedActor:
    """An actor. Its calls are made by `answer`, which returns their references."""

    number: int
    options: dict[str, Any]
    ray: "SimulatedRay"
    is_killed: bool = False

    def __getattr__(self, method: str) -> "SimulatedMethod":
        return SimulatedMethod(self, method)


@dataclass(frozen=True)
class SimulatedMethod:
    """A method of an actor, which is called as Ray's are."""

    actor: SimulatedActor
    name: str

    def remote(self, *arguments: Any) -> Any:
        self.actor.ray.calls[self.name] += 1
        return self.actor.ray.answer(self.actor, self.name, arguments)


@dataclass
class SimulatedRay:
    """The part of the module `ray` that the executor uses, and the class of its actors.

    answer: makes a call of an actor's method and returns its reference: a SimulatedRef, or one of Ray.
    calls: how many there were, by method.
    """

    answer: Answer
    calls: Counter[str] = field(default_factory=Counter)
    actors: list[SimulatedActor] = field(default_factory=list)

    def options(self, **options: Any) -> "ActorClass":
        return ActorClass(self, options)

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: SimulatedActor) -> None:
        actor.is_killed = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "node", "Alive": True}]


@dataclass(frozen=True)
class ActorClass:
    """The class of actors with options such as their resources."""

    ray: SimulatedRay
    options: dict[str, Any]

    def remote(self) -> SimulatedActor:
        actor = SimulatedActor(len(self.ray.actors), self.options, self.ray)
        self.ray.actors.append(actor)
        return actor


@contextmanager
def simulated_ray(answer: Answer) -> Iterator[SimulatedRay]:
    """Let executors use a SimulatedRay inside this block."""
    simulated, module = SimulatedRay(answer), vars(ray_executor)
    before = {name: module[name] for name in ("ray", "RayWorker")}
    module.update(ray=simulated, RayWorker=simulated)
    try:
        yield simulated
    finally:
        module.update(before)
