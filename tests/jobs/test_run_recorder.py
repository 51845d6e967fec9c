"""What becomes of a run's record, and of the job, where signals come and the store refuses."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.local import LocalFileSystem

from jobs import encode, finalize, resources, retry, run_recorder
from jobs.local_executor import LocalExecutor
from jobs.run_recorder import RunRecorder
from jobs.signals import Signals
from pipeline.cache import plan, runs, stats
from pipeline.cache.reader import Cache
from pipeline.cache.runs import Run
from pipeline.errors import JobError, StorageError
from pipeline.storage.folder import Folder

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def argv(shards: Path, micro_vae: Path, tmp_path: Path) -> list[object]:
    return ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]


def records(cache: Path) -> list[dict[str, Any]]:
    """The records of runs, the last one written at the end."""
    paths = sorted(cache.glob("_runs/*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("module", "name", "outcomes"),
    [
        (encode, "load_vae", []),
        (LocalFileSystem, "ls", []),
        (plan, "hash_plan_files", ["stopped"]),
        (encode, "check_commits", ["stopped"]),
        (stats, "summarize", ["stopped"]),
    ],
)
def test_a_signal_ends_the_job_wherever_it_is(
    latentmill: Command,
    argv: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sign: signal.Signals,
    code: int,
    module: Any,
    name: str,
    outcomes: list[str],
) -> None:
    real = getattr(module, name)

    def struck(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), sign)
        return real(*given)

    monkeypatch.setattr(module, name, struck)
    returned, out, err = latentmill(*argv)
    assert (returned, out) == (code, "")
    assert "run the same command to resume" in err
    assert [record["outcome"] for record in records(tmp_path / "c")] == outcomes
    monkeypatch.undo()
    assert latentmill(*argv)[0] == 0


def test_a_record_that_cannot_be_written_does_not_end_the_job(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.01)
    write, written = Run.write, list[None]()

    def refused(self: Run, **facts: Any) -> None:
        if written:
            raise StorageError("cannot write it: no answer")
        written.append(write(self, **facts))

    monkeypatch.setattr(Run, "write", refused)
    code, _, err = latentmill(*argv)
    assert code == 0
    assert "WARNING cannot write it: no answer" in err
    assert json.loads((tmp_path / "c/stats.json").read_text())["count"] == 18


def test_failed_units_are_named_where_the_end_fails_too(
    latentmill: Command, argv: list[object], tmp_path: Path
) -> None:
    assert latentmill(*argv)[0] == 0
    first = min((tmp_path / "c/data").iterdir())
    unit = first.stem.rpartition("-")[0]
    (tmp_path / f"c/_commits/{unit}.json").unlink()
    first.write_bytes(b"foreign")
    code, _, err = latentmill(*argv)
    assert code == 1
    assert f"failed: unit {unit}: {first} is not a part" in err
    assert records(tmp_path / "c")[-1]["outcome"] == "failed"


def test_of_two_runs_on_a_store_that_cannot_keep_them_apart_the_second_is_refused(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    first, second = (RunRecorder(Run(cache, "encode", {}), Signals()) for _ in range(2))
    first.begin(single_writer=True)
    with pytest.raises(JobError, match="is writing to"), second.recording():
        second.begin(single_writer=True)
    assert [record["outcome"] for record in records(tmp_path)] == ["running", "failed"]
    first.end("done", 0)
    third = RunRecorder(Run(cache, "encode", {}), Signals())
    third.begin(single_writer=True)
    third.end("done", 0)


def test_statistics_are_of_all_that_is_there_in_the_end(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job ends between our sum and its file: the sum is made again."""
    assert latentmill(*argv, "--max-shards", 2)[0] == 0
    real = stats.encode_stats

    def slow(content: Any) -> bytes:
        monkeypatch.undo()
        assert latentmill(*argv)[0] == 0
        return real(content)

    monkeypatch.setattr(stats, "encode_stats", slow)
    info = Cache.open(str(tmp_path / "c")).info
    assert finalize.finalize_cache(Folder(str(tmp_path / "c")), info, single_writer=False)["count"] == 18
    assert json.loads((tmp_path / "c/stats.json").read_text())["count"] == 18


def test_a_run_shows_that_it_lives_while_its_end_is_written_and_nothing_is_written_after_it(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.05)
    written: list[tuple[float, str]] = []
    write, finish, slow = Run.write, finalize.finalize_cache, list[tuple[float, float]]()

    def noted(self: Run, **facts: Any) -> None:
        write(self, **facts)
        written.append((time.monotonic(), self.content["outcome"]))

    def slowly(*given: Any) -> dict[str, Any]:
        start = time.monotonic()
        time.sleep(1)
        slow.append((start, time.monotonic()))
        return finish(*given)

    monkeypatch.setattr(Run, "write", noted)
    monkeypatch.setattr(encode, "finalize_cache", slowly)
    assert latentmill(*argv)[0] == 0
    ((start, end),) = slow
    assert len([at for at, outcome in written if start < at < end and outcome == "running"]) > 3
    time.sleep(0.3)
    assert [outcome for _, outcome in written].count("done") == 1
    assert written[-1][1] == "done"
    assert [record["outcome"] for record in records(tmp_path / "c")] == ["done"]


@pytest.mark.parametrize(
    "module_and_name", [(plan, "extend_plan"), (encode, "encode_pending"), (encode, "check_commits")]
)
def test_a_run_shows_that_it_lives_from_its_plan_on(
    latentmill: Command,
    argv: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module_and_name: tuple[Any, str],
) -> None:
    """A second job, on a store that cannot keep two apart, must not take a run that is busy for a dead one."""
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(runs, "DEAD_AFTER", 2)
    module, name = module_and_name
    real, seen = getattr(module, name), list[list[str]]()

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(3.6)
        seen.append(runs.find_alive(Folder(str(tmp_path / "c")), exclude=""))
        return real(*given, **named)

    monkeypatch.setattr(module, name, slowly)
    assert latentmill(*argv)[0] == 0
    assert [len(alive) for alive in seen] == [1]


def test_a_beat_under_way_does_not_replace_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is slow to take a beat: the end waits for it, so that the end is what stands."""
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.01)
    replace, beating = Folder.replace, threading.Event()

    def slowly(self: Folder, name: str, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            beating.set()
            time.sleep(0.5)
        replace(self, name, data)

    recorder = RunRecorder(Run(Folder(str(tmp_path)), "encode", {}), Signals())
    recorder.begin(single_writer=False)
    monkeypatch.setattr(Folder, "replace", slowly)
    assert beating.wait(5)
    recorder.end("done", 0)
    time.sleep(0.7)
    assert [record["outcome"] for record in records(tmp_path)] == ["done"]


def test_a_store_that_refuses_the_beats_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.01)
    recorder, beats = RunRecorder(Run(Folder(str(tmp_path)), "encode", {}), Signals()), list[str]()
    recorder.begin(single_writer=False)
    replace = Folder.replace

    def refused(self: Folder, name: str, data: bytes) -> None:
        beats.append(name)
        raise StorageError("cannot write it: no answer")

    monkeypatch.setattr(Folder, "replace", refused)
    while len(beats) < 20:
        time.sleep(0.01)
    monkeypatch.setattr(Folder, "replace", replace)
    recorder.end("done", 0)
    assert capsys.readouterr().err.count("WARNING cannot write it: no answer") == 1
    assert [record["outcome"] for record in records(tmp_path)] == ["done"], "and it is retried"


class Recorded(LocalExecutor):
    """An executor that records when it is closed."""

    order: ClassVar[list[str]] = []

    def close(self) -> None:
        super().close()
        self.order.append("closed")


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened: executors that were closed, and ends that were begun."""
    Recorded.order.clear()
    monkeypatch.setattr(resources, "LocalExecutor", Recorded)
    for module in (encode, retry):
        monkeypatch.setattr(module, "finalize_cache", recorded(module.finalize_cache))
    return Recorded.order


def recorded(real: Callable[..., Any]) -> Callable[..., Any]:
    def finish(*given: Any) -> Any:
        Recorded.order.append("finish")
        return real(*given)

    return finish


def test_devices_are_free_before_the_end_is_written(
    latentmill: Command, argv: list[object], tmp_path: Path, order: list[str]
) -> None:
    assert latentmill(*argv, "--input-limit", "pixels=100", "--max-reject-rate", 1)[0] == 0
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    assert order == ["closed", "finish"] * 2


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_the_units_and_the_end_leaves_a_resumable_cache(
    latentmill: Command,
    argv: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: list[str],
    sign: signal.Signals,
) -> None:
    close = Recorded.close

    def struck(self: Recorded) -> None:
        close(self)
        if len(order) == 1:
            os.kill(os.getpid(), sign)

    monkeypatch.setattr(Recorded, "close", struck)
    code, out, _ = latentmill(*argv)
    assert (code, out, order) == (128 + sign, "", ["closed"])
    assert [record["outcome"] for record in records(tmp_path / "c")] == ["stopped"]
    assert latentmill(*argv)[0] == 0
