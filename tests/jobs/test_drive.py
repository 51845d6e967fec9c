"""The driver's loop with an engine that is a few lines long."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from jobs.drive import Done, Signals, drive, error_line, failed
from pipeline.errors import DamagedError, ShardError, Stopped
from pipeline.records import Attempt


@dataclass
class Task:
    name: str


@dataclass
class Scripted:
    """An engine that fails each task as often as it is told to."""

    failures: dict[str, int]
    lost: bool = False
    damaged_at: tuple[int, ...] = ()
    slots: int = 2
    pictures: int = 0
    waiting_for: str = ""
    running: list[Task] = field(default_factory=list)
    started: Counter[str] = field(default_factory=Counter)
    attempts: list[tuple[str, Attempt]] = field(default_factory=list)
    most: int = 0

    def submit(self, task: Task, attempt: Attempt) -> bool:
        self.started[task.name] += 1
        self.running.append(task)
        self.attempts.append((task.name, attempt))
        self.most = max(self.most, len(self.running))
        return True

    def wait(self, seconds: float, waiting: int) -> list[Done]:
        task = self.running.pop(0)
        broken = self.started[task.name] <= self.failures.get(task.name, 0)
        at = dict(enumerate(self.damaged_at, 1)).get(self.started[task.name]) if broken else None
        error = "it broke" if broken else None
        return [Done(task, None if broken else task.name, error, lost=broken and self.lost, damaged_at=at)]

    def close(self) -> None:
        self.running.clear()


def run(engine: Scripted, count: int) -> tuple[list[str], list[str]]:
    done: list[str] = []
    driven = drive([Task(str(n)) for n in range(count)], engine, Signals(), done.append, lambda: None)
    return sorted(done), [failure.name for failure in driven.failures]


def test_every_task_is_done_once_and_never_more_at_once_than_there_are_slots() -> None:
    engine = Scripted({})
    assert run(engine, 9) == ([str(n) for n in range(9)], [])
    assert set(engine.started.values()) == {1}
    assert engine.most == 2


def test_a_task_that_fails_is_tried_three_times() -> None:
    engine = Scripted({"1": 2, "2": 99})
    assert run(engine, 4) == (["0", "1", "3"], ["2"])
    assert engine.started == {"0": 1, "1": 3, "2": 3, "3": 1}


def test_a_task_may_lose_more_workers_than_it_may_fail_but_not_for_ever() -> None:
    engine = Scripted({"1": 9, "2": 99}, lost=True)
    assert run(engine, 4) == (["0", "1", "3"], ["2"])
    assert engine.started == {"0": 1, "1": 10, "2": 10, "3": 1}


def test_a_task_that_lost_its_worker_is_tried_carefully() -> None:
    failing, losing = Scripted({"0": 2}), Scripted({"0": 2}, lost=True)
    run(failing, 1)
    run(losing, 1)
    assert [attempt for _, attempt in failing.attempts] == [Attempt(), Attempt(), Attempt()]
    assert [attempt for _, attempt in losing.attempts] == [Attempt(), Attempt(careful=True), Attempt(careful=True)]


def test_where_a_shard_was_found_damaged_the_next_attempt_knows_it() -> None:
    engine = Scripted({"0": 2}, damaged_at=(700, 900))
    run(engine, 1)
    assert [attempt for _, attempt in engine.attempts] == [Attempt(), Attempt(damaged_at=700), Attempt(damaged_at=900)]
    told = failed(Task("0"), DamagedError("it is cut off", at=7))
    assert (told.error, told.damaged_at, failed(Task("0"), ShardError("x")).damaged_at) == ("it is cut off", 7, None)


def test_a_task_that_finds_no_place_is_offered_again() -> None:
    @dataclass
    class Full(Scripted):
        refusals: int = 3

        def submit(self, task: Task, attempt: Attempt) -> bool:
            if self.running and self.refusals:
                self.refusals -= 1
                return False
            return super().submit(task, attempt)

    engine = Full({})
    assert run(engine, 5) == ([str(n) for n in range(5)], [])
    assert engine.refusals == 0


def test_a_signal_stops_the_loop() -> None:
    signals = Signals()
    signals.stop.set()
    with pytest.raises(Stopped):
        drive([Task("a")], Scripted({}), signals, lambda report: None, lambda: None)


def test_an_error_is_one_line() -> None:
    assert error_line(ShardError("the shard is cut off")) == "the shard is cut off"
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        assert error_line(error).startswith("ValueError: two (")
        assert "test_drive.py" in error_line(error)
