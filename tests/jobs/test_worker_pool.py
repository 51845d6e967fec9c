"""The states of workers: who is free, in which order, and at which cost with many workers."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from jobs import worker_pool
from jobs.executor import TaskResult
from jobs.scheduler import Scheduler
from jobs.worker_pool import WorkerPool


@dataclass(frozen=True)
class Task:
    name: str


def make_pool(*ready: str) -> WorkerPool:
    pool = WorkerPool()
    pool.set_ready(ready)
    return pool


def test_the_free_worker_has_the_fewest_tasks_and_is_the_first_of_those() -> None:
    pool = make_pool("a", "b", "c")
    order = []
    for number in range(6):
        name = pool.find_free(limit=2, now=0.0)
        assert name is not None
        pool.add_task(name, str(number), is_exclusive=False)
        order.append(name)
    assert order == ["a", "b", "c", "a", "b", "c"]
    assert pool.find_free(limit=2, now=0.0) is None
    pool.remove_task("c", "2")
    assert pool.find_free(limit=2, now=0.0) == "c"
    assert pool.find_free(limit=1, now=0.0) is None


def test_a_worker_with_an_isolated_task_or_a_device_error_is_not_free() -> None:
    pool = make_pool("a", "b")
    pool.add_task("a", "t", is_exclusive=True)
    pool.note_device_error("b", "illegal access")
    assert pool.find_free(limit=2, now=0.0) is None
    pool.remove_task("a", "t")
    assert pool.find_free(limit=2, now=0.0) == "a"


def test_a_worker_with_a_few_errors_has_one_task_and_pauses() -> None:
    pool = make_pool("a", "b")
    pool.note_error("a", "t", "bad").paused_until = 5.0
    assert pool.find_free(limit=2, now=4.0, excluded=["b"]) is None
    assert pool.find_free(limit=2, now=5.0, excluded=["b"]) == "a"
    pool.add_task("a", "u", is_exclusive=False)
    assert pool.find_free(limit=2, now=5.0, excluded=["b"]) is None
    pool.set_ready(("a",))
    assert pool.find_free(limit=2, now=0.0) == "a", "the only worker is not throttled"


def test_errors_are_forgotten_with_their_worker_and_after_a_success() -> None:
    pool = make_pool("a", "b", "c")
    for name in ("a", "b"):
        pool.note_error(name, "t", "bad")
    assert list(pool.suspects) == ["a", "b"]
    pool.drop("b")
    pool.set_ready(("a", "c"))
    pool.note_success("c", "t", is_damaged=False)
    assert pool.states["a"].is_at_fault
    assert (list(pool.suspects), pool.proven) == (["a"], {"c"})
    pool.note_success("a", "u", is_damaged=False)
    assert not pool.suspects and not pool.states["a"].is_at_fault


def test_nobody_is_at_fault_for_a_damaged_shard() -> None:
    pool = make_pool("a", "b")
    pool.note_error("a", "t", "cut off")
    pool.note_success("b", "t", is_damaged=True)
    assert not pool.suspects and not pool.states["a"].is_at_fault


def test_proven_workers_are_found_without_the_others() -> None:
    pool = make_pool("a", "b")
    assert not pool.has_others([], proven_only=True)
    assert pool.find_free(limit=2, now=0.0, proven_only=True) is None
    pool.note_success("b", "t", is_damaged=False)
    assert pool.find_free(limit=2, now=0.0, proven_only=True) == "b"
    assert pool.has_others(["a"], proven_only=True) and not pool.has_others(["b"], proven_only=True)
    assert pool.has_others(["b"])
    pool.note_error("a", "u", "bad")
    assert pool.find_free(limit=2, now=9.0, excluded=["b"], proven_only=True) is None
    assert pool.find_free(limit=2, now=9.0, excluded=["b"]) == "a"
    pool.drop("b")
    pool.set_ready(("a",))
    assert not pool.has_others([], proven_only=True)
    assert not pool.proven


def test_a_dropped_worker_is_new_if_it_is_still_ready() -> None:
    pool = make_pool("a", "b")
    pool.note_device_error("a", "illegal access")
    assert pool.find_free(limit=2, now=0.0, excluded=["b"]) is None
    pool.drop("a")
    pool.set_ready(pool.ready)
    assert pool.find_free(limit=2, now=0.0, excluded=["b"]) == "a"


@pytest.mark.parametrize("workers", [10, 1000])
def test_a_task_costs_the_same_with_many_workers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the workers that are looked at: a place is computed, or a state is read by its name."""
    looked_at = Counter[str]()

    class States(dict[str, worker_pool.WorkerState]):
        def __getitem__(self, name: str) -> worker_pool.WorkerState:
            looked_at["state"] += 1
            return super().__getitem__(name)

    def place(self: WorkerPool, name: str, place: Any = WorkerPool._place) -> None:
        looked_at["place"] += 1
        place(self, name)

    monkeypatch.setattr(WorkerPool, "_place", place)
    names = tuple(f"w{number}" for number in range(workers))
    scheduling = Scheduler([Task(str(number)) for number in range(2 * workers + 100)], clock=lambda: 1.0)
    scheduling.workers.states = States()
    running = []
    while assignment := scheduling.assign_next(names):
        running.append(assignment)
    scheduling.record_failure(TaskResult(task=running[0].task, worker=running[0].worker, error="bad"))
    looked_at.clear()
    for assignment in running[1:101]:
        scheduling.record_success(TaskResult(task=assignment.task, worker=assignment.worker))
        assert scheduling.assign_next(names) is not None
        assert not list(scheduling.find_faulty(names))
    assert looked_at["place"] <= 100 * 4
    assert looked_at["state"] <= 100 * 16
