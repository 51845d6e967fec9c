"""The scheduler with failing workers and storage outages, simulated on a virtual clock."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from jobs import outage, scheduler
from jobs.executor import Cause, TaskResult, find_cause
from jobs.run_tasks import RunResult, run_tasks
from jobs.scheduler import Scheduler
from jobs.signals import Signals
from pipeline.errors import JobError, OtherUnitError, StorageError
from pipeline.records import Attempt


@dataclass(frozen=True)
class Task:
    name: str


@dataclass(frozen=True)
class Report:
    """The fields of a unit's report that the scheduler reads. damage: the damage of its shard, or empty."""

    task: str
    damage: str = ""


@dataclass(frozen=True)
class Failure:
    """An error of a task. after: the seconds until it occurs."""

    error: str
    cause: Cause = "task"
    after: float = 0.01
    damaged_at: int | None = None


Behaviour = Callable[[str, Task, Attempt, float], Failure | None]
TASK_SECONDS = 3.0  # the duration of a task


@dataclass
class Simulation:
    """Workers on a virtual clock. behaviour: returns how a task fails on a worker at a time, or None.

    A worker is `SLOT.GENERATION`: it is replaced by the next generation in its slot after `start` seconds.
    """

    slots: int
    behaviour: Behaviour
    start: float = 30.0
    can_replace: bool = True
    tasks_per_worker: int = 2
    now: float = 0.0
    images: int = 0
    waiting_for: str = ""
    generation: Counter[int] = field(default_factory=Counter)
    starts: dict[int, float] = field(default_factory=dict)
    running: list[tuple[float, Task, str, Attempt]] = field(default_factory=list)
    workers_tried: dict[str, list[str]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    returned: list[TaskResult] = field(default_factory=list)

    @property
    def workers(self) -> list[str]:
        return [f"{slot}.{self.generation[slot]}" for slot in range(self.slots) if slot not in self.starts]

    @property
    def starting(self) -> int:
        return len(self.starts)

    def submit(self, task: Task, attempt: Attempt, worker: str) -> None:
        assert worker in self.workers
        assert attempt.is_retry == (task.name in self.workers_tried)
        assert sum(assigned == worker for _, _, assigned, _ in self.running) < self.tasks_per_worker
        failure = self.behaviour(worker, task, attempt, self.now)
        self.running.append((self.now + (failure.after if failure else TASK_SECONDS), task, worker, attempt))
        self.workers_tried.setdefault(task.name, []).append(worker)

    def wait(self, seconds: float, waiting: int) -> list[TaskResult]:
        events = [*(end for end, *_ in self.running), *self.starts.values(), self.now + seconds]
        self.now = self.now if self.returned else min(events)
        self.starts = {slot: end for slot, end in self.starts.items() if end > self.now}
        ended = [run for run in self.running if run[0] <= self.now]
        self.running = [run for run in self.running if run[0] > self.now]
        done, self.returned = self.returned, []
        return done + [self._done(*run) for run in ended]

    def _done(self, end: float, task: Task, worker: str, attempt: Attempt) -> TaskResult:
        failure = self.behaviour(worker, task, attempt, end)
        if failure is None:
            damage = "cut off" if attempt.damaged_at is not None and task.name.startswith("damaged") else ""
            return TaskResult(task=task, worker=worker, report=Report(task.name, damage))
        return TaskResult(
            task=task, worker=worker, error=failure.error, cause=failure.cause, damaged_at=failure.damaged_at
        )

    def replace(self, worker: str, reason: str) -> None:
        self.replaced.append(worker)
        slot = int(worker.split(".")[0])
        self.returned += [
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
    """The result of a simulated job."""

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
        lambda counts: None,
        probe=probe,
        stall_timeout=stall_timeout,
        clock=lambda: executor.now,
    )
    done = sorted(report.task for report in reports)
    assert len(set(done)) == len(done), "a task was done twice"
    return Result(result, done, [report.task for report in reports if report.damage])


@pytest.fixture(autouse=True)
def restore_pauses(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """Restore the pauses, because the clock is virtual."""
    monkeypatch.setattr(scheduler, "FIRST_PAUSE", 2.0)


NAMES = [f"u{number:03}" for number in range(400)]


def slot_of(worker: str) -> int:
    return int(worker.split(".")[0])


def test_one_faulty_worker_of_eight_fails_no_task() -> None:
    """It fails at once, so it always has the fewest tasks."""
    executor = Simulation(8, lambda worker, *_: Failure("RuntimeError: broken") if worker == "3.0" else None)
    result = run(executor, NAMES)
    assert (len(result.done), result.failed) == (400, [])
    assert executor.replaced == ["3.0"]
    assert sum("3.0" in workers for workers in executor.workers_tried.values()) <= 3


def test_a_device_error_ends_its_worker_and_uses_no_attempt() -> None:
    failures: list[str] = []

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        return Failure("CUDA error: an illegal memory access", "device") if worker == "0.0" else None

    executor = Simulation(2, behaviour)
    result = run(executor, NAMES[:50])
    failures += result.failed
    assert (len(result.done), failures, executor.replaced) == (50, [], ["0.0"])
    assert sum("0.0" in workers for workers in executor.workers_tried.values()) <= 2


def test_damage_that_only_one_worker_finds_is_not_accepted() -> None:
    """The faulty worker finds damage at the same byte each time. The other workers find none."""

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        if slot_of(worker) == 1:
            return Failure("cut off", "damage", damaged_at=512)
        assert attempt.damaged_at in (None, 512)
        return None

    result = run(Simulation(3, behaviour), NAMES[:60])
    assert (len(result.done), result.failed, result.damaged) == (60, [], [])


def test_a_task_does_not_run_again_on_the_only_proven_worker() -> None:
    """Its failure there must be confirmed by another worker. The untried tasks prove the others meanwhile."""
    scheduling = Scheduler([Task(name) for name in NAMES[:9]], clock=lambda: 1000.0)
    first = [scheduling.assign_next(["a", "b"]) for _ in range(4)]
    mine = [assignment for assignment in first if assignment is not None and assignment.worker == "a"]
    scheduling.record_success(TaskResult(task=mine[0].task, worker="a", report=Report(mine[0].task.name)))
    scheduling.record_failure(TaskResult(task=mine[1].task, worker="a", error="cut off", cause="damage", damaged_at=7))
    scheduling.retries[mine[1].task.name].paused_until = 0.0
    scheduling.workers.get("a").paused_until = 0.0
    following = scheduling.assign_next(["a", "b"])
    assert following is not None
    assert following.task != mine[1].task


def test_damage_that_two_workers_find_is_accepted() -> None:
    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        if task.name.startswith("damaged") and attempt.damaged_at != 1024:
            return Failure("cut off", "damage", damaged_at=1024)
        return None

    executor = Simulation(4, behaviour)
    names = [f"damaged{number}" for number in range(40)] + NAMES[:40]
    result = run(executor, names)
    assert (len(result.done), result.failed, len(result.damaged)) == (80, [], 40)
    for name in names[:40]:
        first, second = executor.workers_tried[name]
        assert first != second
    assert executor.replaced == [], "no other worker completed a task that failed on them"


def test_a_task_that_always_fails_is_tried_on_three_workers() -> None:
    executor = Simulation(5, lambda worker, task, *_: Failure("bad") if task.name == "u007" else None)
    result = run(executor, NAMES[:30])
    assert result.failed == ["u007"]
    assert len(set(executor.workers_tried["u007"])) == len(executor.workers_tried["u007"]) == 3
    assert executor.replaced == []


def test_with_two_workers_the_third_attempt_is_on_either() -> None:
    executor = Simulation(2, lambda worker, task, *_: Failure("bad") if task.name == "u007" else None)
    assert run(executor, NAMES[:30]).failed == ["u007"]
    first, second, third = executor.workers_tried["u007"]
    assert first != second != third


def test_many_failing_tasks_do_not_replace_workers() -> None:
    executor = Simulation(4, lambda worker, task, *_: Failure("bad") if int(task.name[1:]) % 2 else None)
    result = run(executor, NAMES)
    assert (len(result.done), len(result.failed)) == (200, 200)
    assert executor.replaced == []


@pytest.mark.parametrize("tasks", [1, 20])
def test_the_only_worker_is_replaced_after_two_failures_in_a_row(tasks: int) -> None:
    executor = Simulation(1, lambda worker, *_: Failure("broken") if worker == "0.0" else None)
    result = run(executor, NAMES[:tasks])
    assert (len(result.done), result.failed, executor.replaced) == (tasks, [], ["0.0"])


@pytest.mark.parametrize("faulty", [4, 6])
def test_a_majority_of_faulty_workers_is_replaced(faulty: int) -> None:
    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        return Failure("broken") if worker.endswith(".0") and slot_of(worker) < faulty else None

    executor = Simulation(8, behaviour)
    result = run(executor, NAMES)
    assert sorted(executor.replaced) == [f"{slot}.0" for slot in range(faulty)]
    assert len(result.failed) <= (0 if faulty == 4 else 8), result.failed


@pytest.mark.parametrize("cause", ["task", "device"])
@pytest.mark.parametrize("start", [0.5, 30.0])
def test_a_node_on_which_every_worker_fails_does_not_fail_tasks(cause: Cause, start: float) -> None:
    """Its new workers are idle, while the others are busy."""
    executor = Simulation(2, lambda worker, *_: Failure("broken", cause) if slot_of(worker) == 1 else None, start=start)
    result = run(executor, NAMES[:100])
    assert (len(result.done), result.failed) == (100, [])


def test_a_new_worker_gets_the_task_that_failed_on_a_faulty_one() -> None:
    """No other task is left. The faulty worker has completed tasks before, the new one has not."""

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        if now > 10.0 and worker == "0.0":
            return Failure("broken")
        return Failure("lost bus", "device") if now > 10.0 and worker == "1.0" else None

    executor = Simulation(2, behaviour, start=20.0)
    result = run(executor, NAMES[:20])
    assert (len(result.done), result.failed) == (20, [])


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_only_the_task_that_breaks_its_device_fails(slots: int) -> None:
    isolated: list[bool] = []

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        if task.name == "u007":
            isolated.append(attempt.isolated)
            return Failure("CUDA error: device-side assert triggered", "device", after=1.0)
        return None

    executor = Simulation(slots, behaviour)
    result = run(executor, NAMES[:40])
    assert (len(result.done), result.failed) == (39, ["u007"])
    assert len(executor.replaced) in (2, 3), "the last worker is replaced only if tasks are left"
    assert isolated[0] is False and all(isolated[2:])


def test_occasional_failures_of_a_worker_fail_no_task() -> None:
    """The worker is replaced only after two failures in a row, if another worker completes one of the tasks."""
    seen: Counter[str] = Counter()

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        seen[task.name] += 1
        return (
            Failure("flaky") if slot_of(worker) == 0 and int(task.name[1:]) % 5 == 0 and seen[task.name] < 3 else None
        )

    executor = Simulation(4, behaviour)
    result = run(executor, NAMES)
    assert (len(result.done), result.failed) == (400, [])
    assert {slot_of(worker) for worker in executor.replaced} <= {0}, "other workers are not at fault"
    assert len(executor.replaced) <= 10, "most of its failures are single ones; usually it is replaced once or twice"


def test_an_isolated_attempt_runs_alone_on_its_worker() -> None:
    other_tasks: list[int] = []

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        if attempt.isolated:
            other_tasks.append(sum(assigned == worker for _, other, assigned, _ in executor.running if other != task))
        return Failure("killed", "lost", after=1.0) if task.name == "u003" and not attempt.isolated else None

    class Dying(Simulation):
        def _done(self, end: float, task: Task, worker: str, attempt: Attempt) -> TaskResult:
            done = super()._done(end, task, worker, attempt)
            if done.cause == "lost":
                self.replace(worker, "it died")
            return done

    executor = Dying(2, behaviour)
    result = run(executor, NAMES[:30])
    assert (len(result.done), result.failed) == (30, [])
    assert other_tasks and set(other_tasks) == {0}


class UnavailableStorage:
    """A storage that does not respond for a while. Tasks that run then fail after a minute of retries."""

    def __init__(self, since: float, until: float) -> None:
        self.since, self.until = since, until
        self.probes: list[float] = []
        self.executor = Simulation(0, self.behaviour)

    def is_unavailable(self, now: float) -> bool:
        return self.since <= now < self.until

    def behaviour(self, worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        return Failure("cannot read s3://b/x: no answer", "storage", after=60.0) if self.is_unavailable(now) else None

    def probe(self, task: Task) -> None:
        self.probes.append(self.executor.now)
        if self.is_unavailable(self.executor.now):
            raise StorageError("cannot read s3://b/cache.json: no answer", may_pass=True)


@pytest.fixture(autouse=True)
def synchronous_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run probes in the calling thread, because the clock is virtual."""

    class Thread:
        def __init__(self, target: Callable[..., None], args: tuple[object, ...], daemon: bool) -> None:
            self.target, self.args = target, args

        def start(self) -> None:
            self.target(*self.args)

    monkeypatch.setattr(outage.threading, "Thread", Thread)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_an_outage_of_minutes_fails_no_task(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    storage = UnavailableStorage(since=20.0, until=20.0 + 580.0)
    storage.executor.slots = workers
    result = run(storage.executor, NAMES[:100], storage.probe)
    assert (len(result.done), result.failed) == (100, [])
    assert storage.executor.replaced == []
    assert len(storage.probes) < 30
    pauses = [b - a for a, b in zip(storage.probes, storage.probes[1:], strict=False)]
    assert max(pauses) <= 32 and sorted(pauses)[0] < 10, "the pauses grow"
    err = capsys.readouterr().err
    assert err.count("the storage does not respond") == 1
    assert err.count("the storage responds again") == 1
    assert err.count("retrying unit ") <= workers


@pytest.mark.parametrize("quiet", [0.0, 1000.0])
def test_the_first_probe_comes_soon_after_any_quiet_time(quiet: float) -> None:
    storage = UnavailableStorage(since=quiet, until=quiet + 150.0)
    storage.executor.slots = 2
    names = [f"u{number:04}" for number in range(1500)]
    result = run(storage.executor, names, storage.probe)
    assert (len(result.done), result.failed) == (1500, [])
    assert storage.probes[0] < quiet + 60 + 10, "a failure takes a minute to occur"


def test_a_probe_that_hangs_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_times: list[float] = []

    class Hanging:
        """A thread whose first probe never ends."""

        def __init__(self, target: Callable[..., None], args: tuple[object, ...], daemon: bool) -> None:
            self.target, self.args = target, args

        def start(self) -> None:
            probe_times.append(storage.executor.now)
            if len(probe_times) > 1:
                self.target(*self.args)

    monkeypatch.setattr(outage.threading, "Thread", Hanging)
    storage = UnavailableStorage(since=20.0, until=120.0)
    storage.executor.slots = 4
    result = run(storage.executor, NAMES[:100], storage.probe)
    assert (len(result.done), result.failed) == (100, [])
    assert len(probe_times) > 1


def test_a_long_outage_ends_the_job_and_names_the_object() -> None:
    storage = UnavailableStorage(since=20.0, until=math.inf)
    storage.executor.slots = 4
    with pytest.raises(JobError, match=r"cannot read s3://b/.*no answer; run the same command to resume"):
        run(storage.executor, NAMES[:100], storage.probe, stall_timeout=300.0)
    assert storage.executor.now < 20 + 60 + 300 + 120


def test_the_stall_timeout_does_not_count_from_an_old_failure() -> None:
    """No long task has ended since a single failure at the start, and then the storage does not respond."""
    storage = UnavailableStorage(since=700.0, until=760.0)
    watch = outage.Outage(lambda task: storage.probe(Task(task.name)), 600.0, lambda: storage.executor.now)
    storage.executor.now = 1.0
    watch.record_failure(TaskResult(task=Task("u000"), worker="0.0", error="reset", cause="storage"), 2)
    for worker in ("0.0", "1.0"):
        storage.executor.now = 710.0
        watch.record_failure(TaskResult(task=Task("u001"), worker=worker, error="no answer", cause="storage"), 2)
    assert watch.poll()
    storage.executor.now = 720.0
    assert watch.poll()
    storage.executor.now = 770.0
    assert not watch.poll()


def test_one_worker_without_storage_is_replaced() -> None:
    executor = Simulation(
        4, lambda worker, *_: Failure("cannot read", "storage", after=1.0) if worker.startswith("2.0") else None
    )
    result = run(executor, NAMES)
    assert (len(result.done), result.failed, executor.replaced) == (400, [], ["2.0"])


@pytest.mark.parametrize(("faulty", "workers"), [(1, 1), (2, 4), (4, 8)])
def test_several_workers_without_storage_are_replaced(
    faulty: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network of a node is broken. The storage answers the driver at once, so this is not an outage."""

    def behaviour(worker: str, task: Task, attempt: Attempt, now: float) -> Failure | None:
        is_faulty = slot_of(worker) < faulty and worker.endswith(".0")
        return Failure("cannot read", "storage", after=1.0) if is_faulty else None

    executor = Simulation(workers, behaviour)
    result = run(executor, NAMES[:200])
    assert (len(result.done), result.failed) == (200, [])
    assert sorted(executor.replaced) == [f"{slot}.0" for slot in range(faulty)]
    assert capsys.readouterr().err.count("the storage does not respond") <= 1


def test_only_the_task_of_an_unreadable_file_fails() -> None:
    executor = Simulation(
        4, lambda worker, task, *_: Failure("cannot read", "storage", after=1.0) if task.name == "u007" else None
    )
    result = run(executor, NAMES)
    assert result.failed == ["u007"]
    assert len(result.done) == 399


def test_a_resting_worker_does_not_block_the_others() -> None:
    """The next task goes to another worker at once if the first worker may be faulty."""
    tasks = [Task(name) for name in NAMES[:4]]
    scheduling = Scheduler(tasks, clock=lambda: 1.0)
    first = scheduling.assign_next(["a", "b"])
    assert first is not None and first.worker == "a"
    assert scheduling.record_failure(TaskResult(task=first.task, worker="a", error="bad"))
    second = scheduling.assign_next(["a", "b"])
    assert second is not None and second.worker == "b"


def count_tasks(scheduling: Scheduler, workers: list[str], starting: int = 0) -> Counter[str]:
    """Assign as many tasks as possible, and return the number of tasks of each worker."""
    assigned = Counter[str]()
    while (assignment := scheduling.assign_next(workers, starting)) is not None:
        assigned[assignment.worker] += 1
    return assigned


def test_a_worker_takes_no_more_than_its_share_of_the_last_tasks() -> None:
    def schedule(tasks: int) -> Scheduler:
        return Scheduler([Task(name) for name in NAMES[:tasks]], clock=lambda: 1.0, tasks_per_worker=8)

    assert count_tasks(schedule(100), ["a", "b"]) == {"a": 8, "b": 8}
    assert count_tasks(schedule(10), ["a", "b"]) == {"a": 5, "b": 5}
    assert count_tasks(schedule(10), ["a"], starting=4) == {"a": 2}, "four more workers will be ready soon"
    assert count_tasks(schedule(3), ["a"], starting=4) == {"a": 2}, "one is read while the other is encoded"
    assert count_tasks(schedule(10), ["a"]) == {"a": 8}


def test_a_failed_device_costs_no_task_of_a_worker_with_many() -> None:
    executor = Simulation(
        4,
        lambda worker, *_: Failure("CUDA error", "device", after=1.0) if worker == "2.0" else None,
        tasks_per_worker=8,
    )
    result = run(executor, NAMES)
    assert (len(result.done), result.failed, executor.replaced) == (400, [], ["2.0"])


def test_the_units_beside_those_whose_images_failed_are_returned() -> None:
    assert find_cause(OtherUnitError("the device failed")) == "returned"
    assert find_cause(RuntimeError("CUDA error: an illegal memory access was encountered")) == "device"
