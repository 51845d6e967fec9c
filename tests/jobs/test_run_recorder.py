"""The record of a run: after signals, after errors of the store, and with concurrent jobs."""

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
from tests.conftest import slow_param

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def argv(shards: Path, micro_vae: Path, tmp_path: Path) -> list[object]:
    return ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]


def read_records(cache: Path) -> list[dict[str, Any]]:
    """Return the records of runs in the order in which they were written."""
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
def test_a_signal_ends_the_job_in_every_phase(
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

    def send_signal(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), sign)
        return real(*args)

    monkeypatch.setattr(module, name, send_signal)
    returned, out, err = latentmill(*argv)
    assert (returned, out) == (code, "")
    assert "run the same command to resume" in err
    assert [record["outcome"] for record in read_records(tmp_path / "c")] == outcomes
    monkeypatch.undo()
    assert latentmill(*argv)[0] == 0


def test_a_record_that_cannot_be_written_does_not_end_the_job(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.01)
    write, written = Run.write, list[None]()

    def refuse(self: Run, **facts: Any) -> None:
        if written:
            raise StorageError("cannot write it: no answer")
        written.append(write(self, **facts))

    monkeypatch.setattr(Run, "write", refuse)
    code, _, err = latentmill(*argv)
    assert code == 0
    assert "WARNING cannot write it: no answer" in err
    assert json.loads((tmp_path / "c/stats.json").read_text())["count"] == 18


def test_failed_units_are_named_if_finalizing_fails_too(
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
    assert read_records(tmp_path / "c")[-1]["outcome"] == "failed"


def test_a_second_run_on_a_single_writer_store_is_refused(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    first, second = (RunRecorder(Run(cache, "encode", {}), Signals()) for _ in range(2))
    first.begin(single_writer=True)
    with pytest.raises(JobError, match="is writing to"), second.recording():
        second.begin(single_writer=True)
    assert [record["outcome"] for record in read_records(tmp_path)] == ["running", "failed"]
    first.end("done", 0)
    third = RunRecorder(Run(cache, "encode", {}), Signals())
    third.begin(single_writer=True)
    third.end("done", 0)


def test_statistics_include_the_parts_of_a_concurrent_job(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job ends after the sum is computed and before it is written, so the sum is computed again."""
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


def test_heartbeats_continue_while_finalizing_and_then_stop(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.05)
    written: list[tuple[float, str]] = []
    write, finish, slow = Run.write, finalize.finalize_cache, list[tuple[float, float]]()

    def note_write(self: Run, **facts: Any) -> None:
        write(self, **facts)
        written.append((time.monotonic(), self.content["outcome"]))

    def run_slowly(*args: Any) -> dict[str, Any]:
        start = time.monotonic()
        time.sleep(1)
        slow.append((start, time.monotonic()))
        return finish(*args)

    monkeypatch.setattr(Run, "write", note_write)
    monkeypatch.setattr(encode, "finalize_cache", run_slowly)
    assert latentmill(*argv)[0] == 0
    ((start, end),) = slow
    assert len([at for at, outcome in written if start < at < end and outcome == "running"]) > 3
    time.sleep(0.3)
    assert [outcome for _, outcome in written].count("done") == 1
    assert written[-1][1] == "done"
    assert [record["outcome"] for record in read_records(tmp_path / "c")] == ["done"]


@pytest.mark.parametrize(
    "module_and_name",
    [(plan, "extend_plan"), slow_param((encode, "encode_pending")), slow_param((encode, "check_commits"))],
)
def test_heartbeats_start_before_planning(
    latentmill: Command,
    argv: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module_and_name: tuple[Any, str],
) -> None:
    """On a store with a single writer, a second job must not treat a busy run as dead."""
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(runs, "DEAD_AFTER", 2)
    module, name = module_and_name
    real, seen = getattr(module, name), list[list[str]]()

    def run_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(3.6)
        seen.append(runs.find_alive(Folder(str(tmp_path / "c")), exclude=""))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, run_slowly)
    assert latentmill(*argv)[0] == 0
    assert [len(alive) for alive in seen] == [1]


def test_a_job_that_has_just_begun_soon_records_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_recorder, "FIRST_SECONDS", 0.05)  # and HEARTBEAT_SECONDS remains 30
    recorder = RunRecorder(Run(Folder(str(tmp_path)), "encode", {}), Signals())
    waits: list[float | None] = []
    wait = recorder._is_over.wait

    def note_wait(seconds: float | None = None) -> bool:
        waits.append(seconds)
        return wait(seconds)

    monkeypatch.setattr(recorder._is_over, "wait", note_wait)
    with recorder.recording():
        recorder.begin(single_writer=False)
        recorder.update(units=7)
        until = time.monotonic() + 10
        while (read_records(tmp_path)[0].get("units") != 7 or len(waits) < 2) and time.monotonic() < until:
            time.sleep(0.01)
        assert read_records(tmp_path)[0]["units"] == 7
    assert waits[:2] == [0.05, 0.1]


def test_a_slow_heartbeat_does_not_replace_the_final_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final record waits for a heartbeat that the store writes slowly."""
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.01)
    replace, heartbeat_started = Folder.replace, threading.Event()

    def run_slowly(self: Folder, name: str, data: bytes) -> None:
        if threading.current_thread() is not threading.main_thread():
            heartbeat_started.set()
            time.sleep(0.5)
        replace(self, name, data)

    recorder = RunRecorder(Run(Folder(str(tmp_path)), "encode", {}), Signals())
    recorder.begin(single_writer=False)
    monkeypatch.setattr(Folder, "replace", run_slowly)
    assert heartbeat_started.wait(5)
    recorder.end("done", 0)
    time.sleep(0.7)
    assert [record["outcome"] for record in read_records(tmp_path)] == ["done"]


def test_failed_heartbeats_give_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.01)
    recorder, heartbeats = RunRecorder(Run(Folder(str(tmp_path)), "encode", {}), Signals()), list[str]()
    recorder.begin(single_writer=False)
    replace = Folder.replace

    def refuse(self: Folder, name: str, data: bytes) -> None:
        heartbeats.append(name)
        raise StorageError("cannot write it: no answer")

    monkeypatch.setattr(Folder, "replace", refuse)
    while len(heartbeats) < 20:
        time.sleep(0.01)
    monkeypatch.setattr(Folder, "replace", replace)
    recorder.end("done", 0)
    assert capsys.readouterr().err.count("WARNING cannot write it: no answer") == 1
    assert [record["outcome"] for record in read_records(tmp_path)] == ["done"], (
        "the final record is written in spite of earlier errors"
    )


class RecordedExecutor(LocalExecutor):
    """An executor that records when it is closed."""

    order: ClassVar[list[str]] = []

    def close(self) -> None:
        super().close()
        self.order.append("closed")


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of events: executors that are closed and caches that are finalized."""
    RecordedExecutor.order.clear()
    monkeypatch.setattr(resources, "LocalExecutor", RecordedExecutor)
    for module in (encode, retry):
        monkeypatch.setattr(module, "finalize_cache", record_call(module.finalize_cache))
    return RecordedExecutor.order


def record_call(real: Callable[..., Any]) -> Callable[..., Any]:
    def finish(*args: Any) -> Any:
        RecordedExecutor.order.append("finish")
        return real(*args)

    return finish


def test_executors_are_closed_before_the_cache_is_finalized(
    latentmill: Command, argv: list[object], tmp_path: Path, order: list[str]
) -> None:
    assert latentmill(*argv, "--input-limit", "pixels=100", "--max-reject-rate", 1)[0] == 0
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    assert order == ["closed", "finish"] * 2


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_finalizing_leaves_a_resumable_cache(
    latentmill: Command,
    argv: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: list[str],
    sign: signal.Signals,
) -> None:
    close = RecordedExecutor.close

    def send_signal(self: RecordedExecutor) -> None:
        close(self)
        if len(order) == 1:
            os.kill(os.getpid(), sign)

    monkeypatch.setattr(RecordedExecutor, "close", send_signal)
    code, out, _ = latentmill(*argv)
    assert (code, out, order) == (128 + sign, "", ["closed"])
    assert [record["outcome"] for record in read_records(tmp_path / "c")] == ["stopped"]
    assert latentmill(*argv)[0] == 0
