"""`latentmill status --watch` with records that a test writes, and a virtual clock."""

import datetime
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import watch
from jobs.watch import follow, format_line, format_view, open_view, watch_cache
from pipeline.cache import runs
from pipeline.errors import NoCacheError, StorageError
from pipeline.maintenance.watch import RunWatch
from pipeline.storage.folder import Folder

Command = Callable[..., tuple[int, str, str]]
START = datetime.datetime(2026, 5, 1, 12, 0, tzinfo=datetime.UTC)
RUNNING = {
    "units": 10,
    "pending": 8,
    "counts": {"units": 3},
    "images": 1234,
    "images_per_second": 20.0,
    "seconds_left": 90,
    "share": 0.4,
    "waiting_for": "",
    "workers": {"ready": 4, "starting": 1, "restarts": 2},
    "tasks": {"waiting": 3, "under_way": 2, "failed": 0},
    "device_busy": 0.5,
    "device_busy_last_minute": 0.87,
    "bottleneck": "opening",
    "rejects": {"not_an_image": 5, "rest_of_shard": 1},
}


class Store:
    """A cache whose runs a test writes. It counts the requests, and its clock advances when the watch sleeps.

    script: what happens at each sleep.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.seconds = folder, 0.0
        self.requests: list[str] = []
        self.script: Iterator[Callable[[], None]] = iter(())
        self.shown: list[Any] = []
        for name in ("read", "list_files", "iterate_names"):
            monkeypatch.setattr(Folder, name, self._counted(getattr(Folder, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(folder: Folder, name: str = "") -> Any:
            self.requests.append(name)
            return real(folder, name)

        return call

    def write(self, name: str = "20260501T120000Z-a", **facts: Any) -> None:
        content = {
            "verb": "encode",
            "started": START.isoformat(),
            "alive": self.now.isoformat(),
            "ended": None,
            "outcome": "running",
            "exit_code": None,
            **facts,
        }
        (self.folder / "_runs").mkdir(exist_ok=True)
        (self.folder / f"_runs/{name}.json").write_text(json.dumps(content))

    def end(self, name: str = "20260501T120000Z-a", outcome: str = "done", code: int = 0, **facts: Any) -> None:
        self.write(name, outcome=outcome, exit_code=code, ended=self.now.isoformat(), **{**RUNNING, **facts})

    @property
    def now(self) -> datetime.datetime:
        return START + datetime.timedelta(seconds=self.seconds)

    def open(self) -> Folder:
        return Folder(str(self.folder))

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        if (step := next(self.script, None)) is not None:
            step()

    def follow(self, *script: Callable[[], None]) -> list[Any]:
        """Follow the runs while these steps happen. Returns what was shown."""
        self.script = iter(script)
        cache = RunWatch(Folder(str(self.folder)), clock=lambda: self.seconds)
        follow(cache, self.shown.append, self.sleep, lambda: self.now)
        return self.shown


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(tmp_path, monkeypatch)


def test_the_watch_shows_the_record_and_ends_with_the_run(store: Store) -> None:
    store.write(**RUNNING)
    first, second, last = store.follow(
        lambda: store.write(**{**RUNNING, "counts": {"units": 5}}), lambda: store.end(counts={"units": 8})
    )
    assert [content["state"] for content in (first, second, last)] == ["running", "running", "done"]
    assert [content["units"]["done"] for content in (first, second, last)] == [5, 7, 10]
    assert (first["images_per_second"], first["seconds_left"], first["units"]["planned"]) == (20.0, 90, 10)
    (run,) = first["runs"]
    assert run["workers"] == {"ready": 4, "starting": 1, "restarts": 2}
    assert run["tasks"] == {"waiting": 3, "under_way": 2, "failed": 0}
    assert (run["device_busy"], run["bottleneck"], run["damaged_shards"]) == (0.87, "opening", 1)
    assert (last["images_per_second"], last["runs"][0]["exit_code"]) == (None, 0)
    assert last["runs"][0]["device_busy"] == 0.5, "that of the whole run"


def test_a_refresh_is_one_request_and_runs_are_listed_once_a_minute(store: Store) -> None:
    store.write(**RUNNING)
    steps = [lambda: store.write(**RUNNING)] * 120
    store.follow(*steps, store.end)
    assert len(store.shown) == 122
    assert store.requests.count("_runs") == 11, "ten minutes have passed"
    assert sum(name.endswith(".json") for name in store.requests) == 122
    assert len(store.requests) == 122 + 11, "a single run needs no list of the commits"


def test_a_run_that_begins_later_is_followed_too(store: Store) -> None:
    store.write(**RUNNING)
    (store.folder / "_commits").mkdir()
    for unit in ("a-0123456789abcdef", "b-0123456789abcdef"):
        (store.folder / f"_commits/{unit}.json").write_text("")

    def begin() -> None:
        store.write("20260501T120010Z-b", **{**RUNNING, "pending": 7, "counts": {"units": 1}, "seconds_left": None})

    def commit() -> None:
        for number in range(6):
            (store.folder / f"_commits/c{number}-0123456789abcdef.json").write_text("")
        (store.folder / "_commits/c-0123456789abcdef-00000r1.json").write_text("")

    nothing = [lambda: None] * 11
    steps = [begin, *nothing, commit, *nothing, store.end, lambda: store.end("20260501T120010Z-b", "failed", 1)]
    shown = store.follow(*steps)
    assert [len(content["runs"]) for content in shown] == [1] * 12 + [2] * 15
    assert shown[12]["images_per_second"] == 40.0
    assert shown[-3]["units"] == {"planned": 10, "done": 8}, "the list of the commits counts, without retry parts"
    assert store.requests.count("_commits") == 2, "once a minute, while two runs are alive"
    assert [content["state"] for content in shown[-2:]] == ["running", "failed"]


def test_without_a_run_that_is_alive_the_last_one_is_shown_once(store: Store) -> None:
    for name, outcome in (("20260501T100000Z-a", "failed"), ("20260501T110000Z-b", "stopped")):
        store.end(name, outcome, 143)
    (content,) = store.follow()
    assert (content["state"], len(content["runs"])) == ("stopped", 1)


def test_a_cache_without_runs_has_nothing_to_watch(store: Store) -> None:
    (content,) = store.follow()
    assert (content["state"], content["runs"]) == ("none", [])
    assert "no job has written to this cache yet" in "\n".join(format_view(content))


def test_a_run_without_heartbeats_ends_the_watch(store: Store) -> None:
    store.write(**RUNNING)
    shown = store.follow()
    assert store.seconds == pytest.approx(runs.DEAD_AFTER + 5, abs=5)
    assert shown[-1]["state"] == "silent"
    assert f"no heartbeat since {START.isoformat()}; run the same command again to resume" in format_view(shown[-1])[2]


def test_a_storage_that_does_not_answer_is_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(**RUNNING)
    real = Folder.read

    def refuse(error: StorageError) -> None:
        def fail(folder: Folder, name: str) -> bytes:
            raise error

        monkeypatch.setattr(Folder, "read", fail)

    def recover() -> None:
        monkeypatch.setattr(Folder, "read", real)
        store.end()

    shown = store.follow(lambda: refuse(StorageError("cannot read it: no answer", may_pass=True)), recover)
    assert [content["state"] for content in shown] == ["running", "done"]
    assert "cannot read it: no answer; trying again in 5 s" in capsys.readouterr().err
    store.write(**RUNNING)
    with pytest.raises(StorageError, match="forbidden"):
        store.follow(lambda: refuse(StorageError("forbidden")))


@pytest.mark.parametrize("damaged", [{"counts": 3, "workers": None, "tasks": [], "rejects": {"a": "b"}, "units": "x"}])
def test_a_record_with_other_types_is_shown_without_them(store: Store, damaged: dict[str, Any]) -> None:
    store.write(**{**RUNNING, **damaged})
    (first, _) = store.follow(store.end)
    assert first["units"] == {"planned": 0, "done": 0}
    assert (first["runs"][0]["rejected"], first["runs"][0]["workers"]["ready"]) == ({}, 0)
    assert "4 ready" not in "\n".join(format_view(first))


def test_the_view_says_what_a_run_does(store: Store) -> None:
    store.write(**RUNNING)
    first, last = store.follow(lambda: store.end(outcome="failed", code=1, error="the disk is full"))
    assert format_view(first)[1:] == [
        "  units      5 of 10 done, 52% of the work, 20.0 images per second, about 1 min 30 s left",
        "  encode since 2026-05-01T12:00:00+00:00: heartbeat 0 s ago",
        "    images     1,234 encoded, 20.0 per second in the last minute",
        "    tasks      2 under way, 3 waiting, 0 failed",
        "    workers    4 ready, 1 starting, 2 restarts",
        "    device     busy for 87% of the time; the bottleneck is opening",
        "    rejected   6: 5 not_an_image, 1 rest_of_shard",
        "    damaged    1 shard",
    ]
    end = "encode since 2026-05-01T12:00:00+00:00: failed at 2026-05-01T12:00:05+00:00, exit code 1: the disk is full"
    assert format_view(last)[2] == f"  {end}"
    assert format_line(first) == (
        "running: 5 of 10 units, 52%, 20.0 images per second, about 1 min 30 s left, 4 workers, 2 restarts, "
        "device busy 87%, 6 rejected, 1 damaged shard"
    )


def test_an_error_cannot_control_the_terminal(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.end(outcome="failed", code=1, error="cannot read a\x1b[2J\x07.tar")
    store.follow()
    watch_cache(store.open, as_json=False, sleep=store.sleep)
    for text in ("\n".join(format_view(store.shown[-1])), capsys.readouterr().out):
        assert r"cannot read a\x1b[2J\x07.tar" in text
        assert "\x1b" not in text


def test_a_run_that_waits_for_workers_says_so(store: Store) -> None:
    store.write(**{**RUNNING, "waiting_for": "starting 2 workers"})
    first, _ = store.follow(store.end)
    assert format_view(first)[2].endswith("heartbeat 0 s ago; starting 2 workers")
    assert ", starting 2 workers, " in format_line(first)


def test_a_run_that_has_just_begun_has_no_figures_yet(store: Store) -> None:
    store.write()
    first, last = store.follow(lambda: store.end(outcome="stopped", code=143, counts={"units": 0}))
    assert (first["share"], first["runs"][0]["device_busy"]) == (0.0, None)
    assert format_view(first)[2].endswith("heartbeat 0 s ago; listing and planning")
    assert last["runs"][0]["device_busy"] is None, "it covers finished units, and there is none"


def test_a_terminal_gets_a_live_view(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(watch, "Console", lambda: Console(file=terminal, force_terminal=True, width=300))
    store.write(**RUNNING)
    with open_view(as_json=False) as show:
        (first, last) = store.follow(store.end)
        show(first)
        show(last)
    text = terminal.getvalue()
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line).strip() for line in text.splitlines()]
    assert lines[0] == "━" * 31 + "╺" + "━" * 28, "52% of a bar of 60 characters"
    assert lines[1] == f"{store.folder}: running"
    assert "5 of 10 done, 52% of the work, 20.0 images per second" in text and "exit code 0" in text
    assert "\x1b[1A" in text, "the second view replaces the first"
    assert text.endswith("\x1b[?25h"), "the cursor is shown again"


def record_now(store: Store) -> None:
    """Write heartbeats of the real time, as the command compares them with the real clock."""
    store.seconds = (datetime.datetime.now(datetime.UTC) - START).total_seconds()


@pytest.mark.parametrize("as_json", [False, True])
def test_lines_are_printed_once_per_heartbeat(store: Store, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    record_now(store)
    store.write(**RUNNING)
    store.script = iter([lambda: None, lambda: store.write(**RUNNING), lambda: None, store.end])
    assert watch_cache(store.open, as_json, store.sleep) == 0
    lines = capsys.readouterr().out.splitlines()
    if as_json:
        assert [json.loads(line)["state"] for line in lines] == ["running", "running", "done"]
    else:
        assert [line.split(":")[0] for line in lines[:3]] == ["running", "running", "done"]
        assert len(lines) == 4 and lines[3].endswith("exit code 0")


def test_ctrl_c_ends_the_watch_and_not_the_job(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    record_now(store)
    store.write(**RUNNING)
    store.script = iter([interrupt])
    assert watch_cache(store.open, False, store.sleep) == 130
    assert "no longer watching; the job goes on" in capsys.readouterr().err


def test_a_watch_that_begins_before_the_job_waits_for_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache appears after two attempts, its first run after three more, and the run ends."""
    missing = iter([True, True, False])

    def open_cache() -> Folder:
        if next(missing):
            raise NoCacheError("there is no latentmill cache at x")
        return store.open()

    def end() -> None:
        record_now(store)
        store.end()

    store.script = iter([*4 * [lambda: None], end])
    assert watch_cache(open_cache, False, store.sleep) == 0
    out, err = capsys.readouterr()
    assert err.count("there is no latentmill cache at x; waiting for a job to create it") == 1
    assert (out.count("no job has written"), out.count("done: 5 of 10 units")) == (1, 1), out


def test_the_command_shows_the_record_of_a_real_run(
    latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path
) -> None:
    job = ("encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill(*job)[0] == 0
    code, out, _ = latentmill("status", tmp_path / "c", "--watch", "--json")
    content = json.loads(out)
    assert (code, content["state"], content["units"]) == (0, "done", {"planned": 3, "done": 3})
    (run,) = content["runs"]
    assert (run["images"], content["share"], run["rejected"]) == (18, 1.0, {})
    assert run["workers"] == {"ready": 1, "starting": 0, "restarts": 0}
    assert run["tasks"] == {"waiting": 0, "under_way": 0, "failed": 0}
    assert latentmill("status", tmp_path / "c", "--watch")[1].startswith(
        "done: 3 of 3 units, 100%, 1 worker, 0 restarts"
    )
