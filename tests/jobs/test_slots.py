"""Restarts of workers after failures, with a virtual clock."""

from dataclasses import dataclass

import pytest

from jobs.slots import AVOID_SECONDS, Slots, describe_start
from pipeline.errors import JobError


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_slots(number: int, clock: Clock, stall_timeout: float = 600.0) -> Slots:
    all_slots = Slots(number, stall_timeout, clock)
    for slot in all_slots:
        slot.worker = "a worker"
    return all_slots


def fail(all_slots: Slots, number: int, node: str = "") -> None:
    all_slots[number].worker = None
    all_slots.note_failure(all_slots[number], node, f"host of {node}", "CUDA error")


def test_without_any_success_three_failures_per_slot_end_the_job(clock: Clock) -> None:
    all_slots = make_slots(2, clock)
    for _ in range(20):
        fail(all_slots, 0)
    fail(all_slots, 1)
    fail(all_slots, 1)
    with pytest.raises(JobError, match="workers cannot start: CUDA error"):
        fail(all_slots, 1)


def test_after_a_success_a_failing_slot_rests(clock: Clock) -> None:
    all_slots = make_slots(2, clock)
    all_slots.note_success(all_slots[1], "n1")
    fail(all_slots, 0)
    assert all_slots.may_start(all_slots[0], frozenset())
    for _ in range(10):
        fail(all_slots, 0)
        assert not all_slots.may_start(all_slots[0], frozenset())
        clock.now += AVOID_SECONDS + 1
        all_slots.note_success(all_slots[1], "n1")
        assert all_slots.may_start(all_slots[0], frozenset())


def test_a_job_ends_if_every_slot_fails_until_the_stall_timeout(clock: Clock) -> None:
    all_slots = make_slots(1, clock, stall_timeout=100.0)
    all_slots.note_success(all_slots[0], "n1")
    for _ in range(5):
        fail(all_slots, 0)
    clock.now += 101
    with pytest.raises(JobError):
        fail(all_slots, 0)


def test_a_node_with_two_failures_in_a_row_is_avoided_for_a_while(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    all_slots = make_slots(3, clock)
    all_slots.note_success(all_slots[2], "good")
    fail(all_slots, 0, "bad")
    assert all_slots.find_avoided_nodes(lambda: {"good", "bad"}) == frozenset()
    fail(all_slots, 0, "bad")
    fail(all_slots, 1, "bad")
    assert all_slots.find_avoided_nodes(lambda: {"good", "bad"}) == {"bad"}
    assert all_slots.may_start(all_slots[0], all_slots.find_avoided_nodes(lambda: {"good", "bad"})), "on the other node"
    assert capsys.readouterr().err.count("two workers in a row failed on host of bad") == 1
    clock.now += AVOID_SECONDS + 1
    assert all_slots.find_avoided_nodes(lambda: {"good", "bad"}) == frozenset()


def test_the_only_node_is_not_avoided_but_its_slots_rest(clock: Clock) -> None:
    all_slots = make_slots(2, clock)
    all_slots.note_success(all_slots[1], "only")
    fail(all_slots, 0, "only")
    fail(all_slots, 0, "only")
    assert all_slots.find_avoided_nodes(lambda: {"only"}) == frozenset()
    assert not all_slots.may_start(all_slots[0], frozenset())


def test_a_node_whose_other_workers_succeed_is_not_avoided(clock: Clock) -> None:
    """If one accelerator of a node is broken, its slot rests, even if other nodes are avoided."""
    all_slots = make_slots(2, clock)
    for _ in range(3):
        all_slots.note_success(all_slots[1], "n1")
        fail(all_slots, 0, "n1")
    assert all_slots.find_avoided_nodes(lambda: {"n1", "n2"}) == frozenset()
    assert not all_slots.may_start(all_slots[0], frozenset({"n2"}))


ONE_CPU = {"CPU": 1, "GPU": 0}


@pytest.mark.parametrize(
    ("starting", "resources", "free", "total", "is_local", "expected"),
    [
        (1, ONE_CPU, {"CPU": 1}, {"CPU": 2}, False, "starting 1 worker"),
        (2, ONE_CPU, {}, {"CPU": 2}, True, "starting 2 workers"),  # they hold the CPUs already
        (2, {}, {}, {}, False, "starting 2 workers"),
        (
            1,
            ONE_CPU,
            {},
            {"CPU": 2},
            False,
            "waiting for 1 worker to start (1 CPU each; free in the cluster: 0 of 2 CPUs)",
        ),
        (
            2,
            {"CPU": 4, "GPU": 1},
            {"CPU": 2},
            {"CPU": 2},
            True,
            "waiting for 2 workers to start (4 CPU and 1 GPU each; free on this machine: 2 of 2 CPUs, 0 of 0 GPUs)",
        ),
    ],
)
def test_a_start_names_resources_only_if_they_are_missing(
    starting: int,
    resources: dict[str, float],
    free: dict[str, float],
    total: dict[str, float],
    is_local: bool,
    expected: str,
) -> None:
    assert describe_start(starting, resources, free, total, is_local) == expected
