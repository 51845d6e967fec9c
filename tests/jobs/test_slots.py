"""Where workers are started again after failures, on a clock that the test moves."""

from dataclasses import dataclass

import pytest

from jobs.slots import AVOID, Slots
from pipeline.errors import JobError


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def slots(number: int, clock: Clock, stall_timeout: float = 600.0) -> Slots:
    found = Slots(number, stall_timeout, clock)
    for slot in found:
        slot.worker = "a worker"
    return found


def fail(found: Slots, number: int, node: str = "") -> None:
    found[number].worker = None
    found.note_failure(found[number], node, f"host of {node}", "CUDA error")


def test_workers_that_never_did_anything_end_the_job_after_three_failures_in_every_slot(clock: Clock) -> None:
    found = slots(2, clock)
    for _ in range(20):
        fail(found, 0)
    fail(found, 1)
    fail(found, 1)
    with pytest.raises(JobError, match="workers cannot start: CUDA error"):
        fail(found, 1)


def test_after_a_success_a_slot_that_fails_rests_and_the_job_goes_on(clock: Clock) -> None:
    found = slots(2, clock)
    found.note_success(found[1], "n1")
    fail(found, 0)
    assert found.may_start(found[0], frozenset())
    for _ in range(10):
        fail(found, 0)
        assert not found.may_start(found[0], frozenset())
        clock.now += AVOID + 1
        found.note_success(found[1], "n1")
        assert found.may_start(found[0], frozenset())


def test_a_job_ends_if_nothing_was_done_for_long_and_every_slot_fails(clock: Clock) -> None:
    found = slots(1, clock, stall_timeout=100.0)
    found.note_success(found[0], "n1")
    for _ in range(5):
        fail(found, 0)
    clock.now += 101
    with pytest.raises(JobError):
        fail(found, 0)


def test_a_node_on_which_two_in_a_row_fail_is_avoided_for_a_while_and_said_once(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    found = slots(3, clock)
    found.note_success(found[2], "good")
    fail(found, 0, "bad")
    assert found.avoided(lambda: {"good", "bad"}) == frozenset()
    fail(found, 0, "bad")
    fail(found, 1, "bad")
    assert found.avoided(lambda: {"good", "bad"}) == {"bad"}
    assert found.may_start(found[0], found.avoided(lambda: {"good", "bad"})), "on the other node"
    assert capsys.readouterr().err.count("two workers in a row failed on host of bad") == 1
    clock.now += AVOID + 1
    assert found.avoided(lambda: {"good", "bad"}) == frozenset()


def test_the_only_node_is_not_avoided_its_slots_rest(clock: Clock) -> None:
    found = slots(2, clock)
    found.note_success(found[1], "only")
    fail(found, 0, "only")
    fail(found, 0, "only")
    assert found.avoided(lambda: {"only"}) == frozenset()
    assert not found.may_start(found[0], frozenset())


def test_a_node_whose_other_workers_succeed_is_not_avoided(clock: Clock) -> None:
    """One of its accelerators is broken: its slot rests, also where other nodes are avoided."""
    found = slots(2, clock)
    for _ in range(3):
        found.note_success(found[1], "n1")
        fail(found, 0, "n1")
    assert found.avoided(lambda: {"n1", "n2"}) == frozenset()
    assert not found.may_start(found[0], frozenset({"n2"}))
