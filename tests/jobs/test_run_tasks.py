"""The driver's loop with a small scripted executor."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from jobs.executor import TaskCounts, TaskResult, format_error, make_failed_result
from jobs.run_tasks import run_tasks
from jobs.signals import Signals
from pipeline.errors import DamagedError, ShardError, Stopped
from pipeline.records import Attempt


@dataclass
class Task:
    name: str


@dataclass
class ScriptedExecutor:
    """An executor of one worker that fails each task a given number of times. A lost worker is replaced."""

    failures: dict[str, int]
    lost: bool = False
    images: int = 0
    waiting_for: str = ""
    can_replace: bool = False
    tasks_per_worker: int = 2
    starting: int = 0
    restarts: int = 0
    generation: int = 0
    running: list[tuple[Task, str]] = field(default_factory=list)
    started: Counter[str] = field(default_factory=Counter)
    attempts: list[tuple[str, Attempt]] = field(default_factory=list)
    most_running: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def workers(self) -> list[str]:
        return [str(self.generation)]

    def submit(self, task: Task, attempt: Attempt, worker: str) -> None:
        assert worker in self.workers
        self.started[task.name] += 1
        self.running.append((task, worker))
        self.attempts.append((task.name, attempt))
        self.most_running = max(self.most_running, len(self.running))

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        if not self.running:
            return []
        task, worker = self.running.pop(0)
        if self.losses[task.name] + self.failed[task.name] >= self.failures.get(task.name, 0):
            return [TaskResult(task=task, worker=worker, report=task.name)]
        if not self.lost:
            self.failed[task.name] += 1
            return [TaskResult(task=task, worker=worker, error="it broke")]
        self.losses[task.name] += 1
        self.generation += 1
        others, self.running = self.running, []
        returned = [TaskResult(task=task, worker=worker, error="replaced", cause="returned") for task, worker in others]
        return [TaskResult(task=task, worker=worker, error="it broke", cause="lost"), *returned]

    def replace(self, worker: str, reason: str) -> None:
        raise AssertionError("the only worker must not be replaced")

    def close(self) -> None:
        self.running.clear()


def run(executor: ScriptedExecutor, count: int) -> tuple[list[str], list[str]]:
    done: list[str] = []
    result = run_tasks([Task(str(n)) for n in range(count)], executor, Signals(), done.append, lambda counts: None)
    return sorted(done), [failure.name for failure in result.failures]


def test_each_task_runs_once_and_a_worker_has_at_most_two() -> None:
    executor = ScriptedExecutor({})
    assert run(executor, 9) == ([str(n) for n in range(9)], [])
    assert set(executor.started.values()) == {1}
    assert executor.most_running == 2


def test_tasks_that_follow_from_others_run_after_them() -> None:
    executor, done, more = ScriptedExecutor({"2": 99}), list[str](), [[Task("4"), Task("5")], [Task("6")]]

    def find_more() -> list[Task]:
        assert not executor.running
        return more.pop(0) if more else []

    tasks = [Task(str(n)) for n in range(4)]
    result = run_tasks(tasks, executor, Signals(), done.append, lambda counts: None, find_more=find_more)
    assert (sorted(done[:3]), sorted(done[3:5]), done[5:]) == (["0", "1", "3"], ["4", "5"], ["6"])
    assert [failure.name for failure in result.failures] == ["2"]


def test_a_failing_task_is_tried_three_times() -> None:
    executor = ScriptedExecutor({"1": 2, "2": 99})
    assert run(executor, 4) == (["0", "1", "3"], ["2"])
    assert executor.started == {"0": 1, "1": 3, "2": 3, "3": 1}


def test_a_task_may_lose_at_most_ten_workers() -> None:
    executor = ScriptedExecutor({"1": 9, "2": 99}, lost=True)
    assert run(executor, 4) == (["0", "1", "3"], ["2"])
    assert executor.losses == {"1": 9, "2": 10}


def test_a_task_that_lost_its_worker_is_retried_in_isolation() -> None:
    executor = ScriptedExecutor({"0": 2}, lost=True)
    run(executor, 1)
    first, *others = [attempt for _, attempt in executor.attempts]
    assert (first, others) == (Attempt(), 2 * [Attempt(isolated=True, is_retry=True)])


def test_the_result_of_a_damaged_task_has_the_position() -> None:
    result = make_failed_result(Task("0"), "w", DamagedError("it is cut off", at=7))
    assert (result.error, result.cause, result.damaged_at) == ("it is cut off", "damage", 7)
    assert make_failed_result(Task("0"), "w", ShardError("x")).damaged_at is None


def test_a_signal_stops_the_loop() -> None:
    signals = Signals()
    signals.stop.set()
    with pytest.raises(Stopped):
        run_tasks([Task("a")], ScriptedExecutor({}), signals, lambda report: None, lambda counts: None)


def test_an_error_is_one_line() -> None:
    assert format_error(ShardError("the shard is cut off")) == "the shard is cut off"
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        assert format_error(error).startswith("ValueError: two (")
        assert "test_run_tasks.py" in format_error(error)


@pytest.mark.parametrize(("seconds_per_task", "least", "most"), [(0.0, 2, 2), (0.01, 6, 8), (3.0, 500, 501)])
def test_ticks_come_once_per_second_however_many_tasks_end(seconds_per_task: float, least: int, most: int) -> None:
    now, ticks, done = [100.0], list[int](), list[str]()

    class Timed(ScriptedExecutor):
        def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
            now[0] += seconds_per_task
            return super().wait(seconds, waiting)

    tasks = [Task(str(n)) for n in range(500)]
    run_tasks(tasks, Timed({}), Signals(), done.append, lambda counts: ticks.append(len(done)), clock=lambda: now[0])
    assert least <= len(ticks) <= most
    assert ticks[-1] == 500, "the last tick has the final counts"


def test_the_last_tick_before_a_stop_has_the_counts_until_then() -> None:
    signals, ticks, done = Signals(), list[int](), list[str]()

    def on_done(task: str) -> None:
        done.append(task)
        if len(done) == 7:
            signals.stop.set()

    tasks = [Task(str(n)) for n in range(20)]
    with pytest.raises(Stopped):
        run_tasks(
            tasks, ScriptedExecutor({}), signals, on_done, lambda counts: ticks.append(len(done)), clock=lambda: 0.0
        )
    assert ticks[-1] == len(done) == 7


def test_a_tick_has_the_number_of_tasks_in_each_state() -> None:
    executor, seen, done = ScriptedExecutor({"0": 3}), list[tuple[TaskCounts, int]](), list[str]()

    def on_tick(counts: TaskCounts) -> None:
        seen.append((counts, len(done)))

    tasks = [Task(str(n)) for n in range(5)]
    run_tasks(tasks, executor, Signals(), done.append, on_tick, clock=lambda: 2.0 * len(seen))
    assert {counts.waiting + counts.under_way + counts.failed + finished for counts, finished in seen} == {5}
    assert max(counts.under_way for counts, _ in seen) > 0
    assert seen[-1] == (TaskCounts(waiting=0, under_way=0, failed=1), 4)


class LateExecutor(ScriptedExecutor):
    """An executor whose worker becomes ready while the loop waits for the second time."""

    waits = 0

    @property
    def workers(self) -> list[str]:
        return ["0"] if self.waits > 1 else []

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        self.waits += 1
        return super().wait(seconds, waiting)


def test_a_worker_is_noted_when_it_becomes_ready() -> None:
    """A short job would otherwise end before it is noted, and the summary would not say how busy the device was."""
    executor, seen = LateExecutor({}), list[int]()

    def on_tick(counts: TaskCounts) -> None:
        seen.append(len(executor.workers))

    run_tasks([Task("0")], executor, Signals(), lambda report: None, on_tick, clock=lambda: 0.0)
    assert seen == [0, 1, 1], "at the start, when the worker is ready, and at the end"
