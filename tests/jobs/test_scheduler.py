"""Workers that run and fail, and storage outages, simulated on a clock that jumps from event to event."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from jobs import outage, scheduler
from jobs.executor import Cause, TaskResult
from jobs.run_tasks import RunResult, run_tasks
from jobs.scheduler import Scheduler
from jobs.signals import Signals
from pipeline.errors import JobError, StorageError
from pipeline.records import Attempt


@dataclass(frozen=True)
class Task:
    name: str


@dataclass(frozen=True)
class Report:
    """What a unit's report is to the scheduler. damage: what is wrong with the shard that was taken up to there."""

    task: str
    damage: str = ""


@dataclass(frozen=True)
class Failing:
    """An error of a task, and how long it takes to come."""

    error: str
    cause: Cause = "task"
    after: float = 0.01
    damaged_at: int | None = None


Behaviour = Callable[[str, Task, Attempt, float], Failing | None]
SECONDS = 3.0  # a task takes


@dataclass
class Simulation:
    """Workers on a virtual clock. behaviour: how a task fails on a worker at a time; None if it does not.

    A worker is `SLOT.GENERATION`: it is replaced by the next generation in its slot after `start` seconds.
    """

    slots: int
    behaviour: Behaviour
    start: float = 30.0
    can_replace: bool = True
    now: float = 0.0
    images: int = 0
    waiting_for: str = ""
    generation: Counter[int] = field(default_factory=Counter)
    starts: dict[int, float] = field(default_factory=dict)
    running: list[tuple[float, Task, str, Attempt]] = field(default_factory=list)
    tried: dict[str, list[str]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    back: list[TaskResult] = field(default_factory=list)

    @property
    def workers(self) -> list[str]:
        return [f"{slot}.{self.generation[slot]}" for slot in range(self.slots) if slot not in self.starts]

    @property
    def starting(self) -> int:
        return len(self.starts)

    def submit(self, task: Task, attempt: Attempt, worker: str) -> None:
        assert worker in self.workers
        assert sum(on == worker for _, _, on, _ in self.running) < 2
        failing = self.behaviour(worker, task, attempt, self.now)
        self.running.append((self.now + (failing.after if failing else SECONDS), task, worker, attempt))
        self.tried.setdefault(task.name, []).append(worker)

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        events = [*(end for end, *_ in self.running), *self.starts.values(), self.now + seconds]
        self.now = self.now if self.back else min(events)
        self.starts = {slot: end for slot, end in self.starts.items() if end > self.now}
        ended = [run for run in self.running if run[0] <= self.now]
        self.running = [run for run in self.running if run[0] > self.now]
        done, self.back = self.back, []
        return done + [self._done(*run) for run in ended]

    def _done(self, end: float, task: Task, worker: str, attempt: Attempt) -> TaskResult:
        failing = self.behaviour(worker, task, attempt, end)
        if failing is None:
            damage = "cut off" if attempt.damaged_at is not None and task.name.startswith("damaged") else ""
            return TaskResult(task=task, worker=worker, report=Report(task.name, damage))
        return TaskResult(
            task=task, worker=worker, error=failing.error, cause=failing.cause, damaged_at=failing.damaged_at
        )

    def replace(self, worker: str, reason: str) -> None:
        self.replaced.append(worker)
        slot = int(worker.split(".")[0])
        self.back += [
            TaskResult(task=task, worker=on, error="replaced", cause="returned")
            for _, task, on, _ in self.running
            if on == worker
        ]
        self.running = [run for run in self.running if run[2] != worker]
        self.generation[slot] += 1
        self.starts[slot] = self.now + self.start

    def close(self) -> None:
        self.running.clear()


@dataclass
class Result:
    """What a simulated job came to."""

    run: RunResult
    done: list[str]
    damaged: list[str]

    @property
    def failed(self) -> list[str]:
        return sorted(failure.name for failure in self.run.failures)


def run(
    executor: Simulation,
    tasks: list[str],
    probe: Callable[[Task], None] = lambda task: None,
    stall_timeout: float = 600.0,
) -> Result:
    reports: list[Report] = []
    result = run_tasks(
        [Task(name) for name in tasks],
        executor,
        Signals(),
        reports.append,
        lambda: None,
        probe=probe,
        stall_timeout=stall_timeout,
        clock=lambda: executor.now,
    )
    done = sorted(report.task for report in reports)
    assert len(set(done)) == len(done), "a task was done twice"
    return Result(result, done, [report.task for report in reports if report.damage])


@pytest.fixture(autouse=True)
def real_pauses(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """The clock is virtual, and pauses cost nothing."""
    monkeypatch.setattr(scheduler, "FIRST_PAUSE", 2.0)


NAMES = [f"u{number:03}" for number in range(400)]


def slot_of(worker: str) -> int:
    return int(worker.split(".")[0])


def test_one_sick_worker_of_eight_costs_no_task() -> None:
    """It fails at once, and so is always the one with the fewest tasks."""
    executor = Simulation(8, lambda worker, *_: Failing("RuntimeError: broken") if worker == "3.0" else None)
    result = run(executor, NAMES)
    assert (len(result.done), result.failed) == (400, [])
    assert executor.replaced == ["3.0"]
    assert sum("3.0" in workers for workers in executor.tried.values()) <= 3


def test_an_error_of_the_device_ends_its_worker_at_once_and_spends_no_try() -> None:
    failures: list[str] = []

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        return Failing("CUDA error: an illegal memory access", "device") if worker == "0.0" else None

    executor = Simulation(2, behaviour)
    result = run(executor, NAMES[:50])
    failures += result.failed
    assert (len(result.done), failures, executor.replaced) == (50, [], ["0.0"])
    assert sum("0.0" in workers for workers in executor.tried.values()) <= 2


def test_a_sick_reader_never_has_a_sound_file_taken_for_damaged() -> None:
    """It finds damage at the same byte each time, and only there: nobody else does."""

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        if slot_of(worker) == 1:
            return Failing("cut off", "damage", damaged_at=512)
        assert attempt.damaged_at in (None, 512)
        return None

    result = run(Simulation(3, behaviour), NAMES[:60])
    assert (len(result.done), result.failed, result.damaged) == (60, [], [])


def test_damage_that_two_workers_find_is_accepted_and_is_neither_workers_fault() -> None:
    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        if task.name.startswith("damaged") and attempt.damaged_at != 1024:
            return Failing("cut off", "damage", damaged_at=1024)
        return None

    executor = Simulation(4, behaviour)
    names = [f"damaged{number}" for number in range(40)] + NAMES[:40]
    result = run(executor, names)
    assert (len(result.done), result.failed, len(result.damaged)) == (80, [], 40)
    for name in names[:40]:
        first, second = executor.tried[name]
        assert first != second
    assert executor.replaced == [], "no other worker did what failed on them"


def test_a_task_that_fails_everywhere_is_tried_on_three_workers_and_given_up() -> None:
    executor = Simulation(5, lambda worker, task, *_: Failing("bad") if task.name == "u007" else None)
    result = run(executor, NAMES[:30])
    assert result.failed == ["u007"]
    assert len(set(executor.tried["u007"])) == len(executor.tried["u007"]) == 3
    assert executor.replaced == []


def test_with_two_workers_the_third_try_is_on_either() -> None:
    executor = Simulation(2, lambda worker, task, *_: Failing("bad") if task.name == "u007" else None)
    assert run(executor, NAMES[:30]).failed == ["u007"]
    first, second, third = executor.tried["u007"]
    assert first != second != third


def test_many_bad_tasks_do_not_have_the_workers_replaced_again_and_again() -> None:
    executor = Simulation(4, lambda worker, task, *_: Failing("bad") if int(task.name[1:]) % 2 else None)
    result = run(executor, NAMES)
    assert (len(result.done), len(result.failed)) == (200, 200)
    assert executor.replaced == []


@pytest.mark.parametrize("tasks", [1, 20])
def test_the_only_worker_is_replaced_when_it_fails_twice_in_a_row(tasks: int) -> None:
    executor = Simulation(1, lambda worker, *_: Failing("broken") if worker == "0.0" else None)
    result = run(executor, NAMES[:tasks])
    assert (len(result.done), result.failed, executor.replaced) == (tasks, [], ["0.0"])


@pytest.mark.parametrize("sick", [4, 6])
def test_a_majority_of_sick_workers_is_replaced(sick: int) -> None:
    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        return Failing("broken") if worker.endswith(".0") and slot_of(worker) < sick else None

    executor = Simulation(8, behaviour)
    result = run(executor, NAMES)
    assert sorted(executor.replaced) == [f"{slot}.0" for slot in range(sick)]
    assert len(result.failed) <= (0 if sick == 4 else 8), result.failed


@pytest.mark.parametrize("cause", ["task", "device"])
@pytest.mark.parametrize("start", [0.5, 30.0])
def test_a_node_on_which_every_worker_fails_costs_no_task(cause: Cause, start: float) -> None:
    """Its new workers are idle, and the others are not."""
    executor = Simulation(2, lambda worker, *_: Failing("broken", cause) if slot_of(worker) == 1 else None, start=start)
    result = run(executor, NAMES[:100])
    assert (len(result.done), result.failed) == (100, [])


def test_a_new_worker_gets_what_failed_on_one_that_has_become_sick() -> None:
    """Nothing else is left: the sick one has done something, the new one has not."""

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        if now > 10.0 and worker == "0.0":
            return Failing("broken")
        return Failing("lost bus", "device") if now > 10.0 and worker == "1.0" else None

    executor = Simulation(2, behaviour, start=20.0)
    result = run(executor, NAMES[:20])
    assert (len(result.done), result.failed) == (20, [])


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_task_of_which_the_device_fails_is_given_up_and_nothing_else(slots: int) -> None:
    isolated: list[bool] = []

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        if task.name == "u007":
            isolated.append(attempt.isolated)
            return Failing("CUDA error: device-side assert triggered", "device", after=1.0)
        return None

    executor = Simulation(slots, behaviour)
    result = run(executor, NAMES[:40])
    assert (len(result.done), result.failed) == (39, ["u007"])
    assert len(executor.replaced) in (2, 3), "the last one only if there is something left to do"
    assert isolated[0] is False and all(isolated[2:])


def test_a_worker_that_fails_now_and_then_is_kept() -> None:
    seen: Counter[str] = Counter()

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        seen[task.name] += 1
        return (
            Failing("flaky") if slot_of(worker) == 0 and int(task.name[1:]) % 5 == 0 and seen[task.name] < 3 else None
        )

    executor = Simulation(4, behaviour)
    result = run(executor, NAMES)
    assert (len(result.done), result.failed) == (400, [])


def test_an_isolated_attempt_has_its_worker_to_itself() -> None:
    beside: list[int] = []

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        if attempt.isolated:
            beside.append(sum(on == worker for _, other, on, _ in executor.running if other != task))
        return Failing("killed", "lost", after=1.0) if task.name == "u003" and not attempt.isolated else None

    class Dying(Simulation):
        def _done(self, end: float, task: Task, worker: str, attempt: Attempt) -> TaskResult:
            done = super()._done(end, task, worker, attempt)
            if done.cause == "lost":
                self.replace(worker, "it died")
            return done

    executor = Dying(2, behaviour)
    result = run(executor, NAMES[:30])
    assert (len(result.done), result.failed) == (30, [])
    assert beside and set(beside) == {0}


class Away:
    """A storage that is away for a while: all tasks that run then fail, after a minute of asking again."""

    def __init__(self, since: float, until: float) -> None:
        self.since, self.until = since, until
        self.probes: list[float] = []
        self.executor = Simulation(0, self.behaviour)

    def is_away(self, now: float) -> bool:
        return self.since <= now < self.until

    def behaviour(self, worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        return Failing("cannot read s3://b/x: no answer", "storage", after=60.0) if self.is_away(now) else None

    def probe(self, task: Task) -> None:
        self.probes.append(self.executor.now)
        if self.is_away(self.executor.now):
            raise StorageError("cannot read s3://b/cache.json: no answer", may_pass=True)


@pytest.fixture(autouse=True)
def probes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes are answered in the thread that asks: the clock is virtual."""

    class Thread:
        def __init__(self, target: Callable[..., None], args: tuple[object, ...], daemon: bool) -> None:
            self.target, self.args = target, args

        def start(self) -> None:
            self.target(*self.args)

    monkeypatch.setattr(outage.threading, "Thread", Thread)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_an_outage_of_minutes_costs_no_task(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    away = Away(since=20.0, until=20.0 + 580.0)
    away.executor.slots = workers
    result = run(away.executor, NAMES[:100], away.probe)
    assert (len(result.done), result.failed) == (100, [])
    assert away.executor.replaced == []
    assert len(away.probes) < 30
    pauses = [b - a for a, b in zip(away.probes, away.probes[1:], strict=False)]
    assert max(pauses) <= 32 and sorted(pauses)[0] < 10, "they grow"
    err = capsys.readouterr().err
    assert err.count("the storage does not respond") == 1
    assert err.count("the storage responds again") == 1
    assert err.count("retrying unit ") <= workers


@pytest.mark.parametrize("quiet", [0.0, 1000.0])
def test_the_first_probe_comes_soon_however_long_nothing_was_wrong(quiet: float) -> None:
    away = Away(since=quiet, until=quiet + 150.0)
    away.executor.slots = 2
    names = [f"u{number:04}" for number in range(1500)]
    result = run(away.executor, names, away.probe)
    assert (len(result.done), result.failed) == (1500, [])
    assert away.probes[0] < quiet + 60 + 10, "failures take a minute to come"


def test_a_probe_that_hangs_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Hanging:
        """A thread whose first probe never ends."""

        def __init__(self, target: Callable[..., None], args: tuple[object, ...], daemon: bool) -> None:
            self.target, self.args = target, args

        def start(self) -> None:
            asked.append(away.executor.now)
            if len(asked) > 1:
                self.target(*self.args)

    monkeypatch.setattr(outage.threading, "Thread", Hanging)
    away = Away(since=20.0, until=120.0)
    away.executor.slots = 4
    result = run(away.executor, NAMES[:100], away.probe)
    assert (len(result.done), result.failed) == (100, [])
    assert len(asked) > 1


def test_a_storage_that_stays_away_ends_the_job_and_is_named() -> None:
    away = Away(since=20.0, until=math.inf)
    away.executor.slots = 4
    with pytest.raises(JobError, match=r"cannot read s3://b/.*no answer; run the same command to resume"):
        run(away.executor, NAMES[:100], away.probe, stall_timeout=300.0)
    assert away.executor.now < 20 + 60 + 300 + 120


def test_the_stall_timeout_does_not_count_from_a_failure_of_long_ago() -> None:
    """Tasks of half an hour: nothing was done since a single failure at the start, and then the storage is away."""
    away = Away(since=700.0, until=760.0)
    watch = outage.Outage(lambda task: away.probe(Task(task.name)), 600.0, lambda: away.executor.now)
    away.executor.now = 1.0
    watch.record_failure(TaskResult(task=Task("u000"), worker="0.0", error="reset", cause="storage"), 2)
    for worker in ("0.0", "1.0"):
        away.executor.now = 710.0
        watch.record_failure(TaskResult(task=Task("u001"), worker=worker, error="no answer", cause="storage"), 2)
    assert watch.poll()
    away.executor.now = 720.0
    assert watch.poll()
    away.executor.now = 770.0
    assert not watch.poll()


def test_one_worker_without_its_storage_is_replaced_and_no_outage() -> None:
    executor = Simulation(
        4, lambda worker, *_: Failing("cannot read", "storage", after=1.0) if worker.startswith("2.0") else None
    )
    result = run(executor, NAMES)
    assert (len(result.done), result.failed, executor.replaced) == (400, [], ["2.0"])


@pytest.mark.parametrize(("sick", "workers"), [(1, 1), (2, 4), (4, 8)])
def test_workers_without_their_storage_are_replaced_though_they_are_many(
    sick: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node whose network is broken: the storage answers the driver at once, so it is no outage."""

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failing | None:
        is_sick = slot_of(worker) < sick and worker.endswith(".0")
        return Failing("cannot read", "storage", after=1.0) if is_sick else None

    executor = Simulation(workers, behaviour)
    result = run(executor, NAMES[:200])
    assert (len(result.done), result.failed) == (200, [])
    assert sorted(executor.replaced) == [f"{slot}.0" for slot in range(sick)]
    assert capsys.readouterr().err.count("the storage does not respond") <= 1


def test_a_single_file_that_can_never_be_read_is_given_up_and_nothing_else() -> None:
    executor = Simulation(
        4, lambda worker, task, *_: Failing("cannot read", "storage", after=1.0) if task.name == "u007" else None
    )
    result = run(executor, NAMES)
    assert result.failed == ["u007"]
    assert len(result.done) == 399


def test_a_resting_worker_does_not_hold_the_others_up() -> None:
    """A scheduler asked for a task does not wait for a worker that may be sick."""
    tasks = [Task(name) for name in NAMES[:4]]
    scheduling = Scheduler(tasks, clock=lambda: 1.0)
    first = scheduling.assign_next(["a", "b"])
    assert first is not None and first.worker == "a"
    assert scheduling.record_failure(TaskResult(task=first.task, worker="a", error="bad"))
    second = scheduling.assign_next(["a", "b"])
    assert second is not None and second.worker == "b"
