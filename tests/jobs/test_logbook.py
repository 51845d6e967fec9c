"""What becomes of a run's record, and of the job, where signals come and the store refuses."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from jobs import encode, logbook, standing
from jobs.drive import Signals
from jobs.logbook import Logbook
from pipeline import plan, stats
from pipeline.errors import JobError, StorageError
from pipeline.runs import Run
from pipeline.storage import Folder

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def argv(shards: Path, micro_vae: Path, tmp_path: Path) -> list[object]:
    return ["encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]


def records(cache: Path) -> list[dict[str, Any]]:
    """The records of runs, the last one written at the end."""
    paths = sorted(cache.glob("_runs/*"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("module", "name", "outcomes"),
    [
        (encode, "load_vae", []),
        (LocalFileSystem, "ls", []),
        (plan, "hashes", ["stopped"]),
        (encode, "check_commits", ["stopped"]),
        (stats, "summary", ["stopped"]),
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
        return real(*given, **named)

    monkeypatch.setattr(module, name, struck)
    returned, out, err = latentmill(*argv)
    assert (returned, out) == (code, "")
    assert "the same command goes on" in err
    assert [record["outcome"] for record in records(tmp_path / "c")] == outcomes
    monkeypatch.undo()
    assert latentmill(*argv)[0] == 0


def test_a_record_that_cannot_be_written_does_not_end_the_job(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logbook, "SECONDS_BETWEEN", 0.0)
    write, written = Run.write, list[None]()

    def refused(self: Run, **facts: Any) -> None:
        if written:
            raise StorageError("cannot write it: no answer")
        written.append(write(self, **facts))

    monkeypatch.setattr(Run, "write", refused)
    code, _, err = latentmill(*argv)
    assert code == 0
    assert "note: cannot write it: no answer" in err
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
    first, second = (Logbook(Run(cache, "encode", {}), Signals(), dict) for _ in range(2))
    first.begin(weak=True)
    with pytest.raises(JobError, match="is at work on"), second.kept():
        second.begin(weak=True)
    assert [record["outcome"] for record in records(tmp_path)] == ["running", "failed"]
    first.ended("done", 0)
    Logbook(Run(cache, "encode", {}), Signals(), dict).begin(weak=True)


def test_statistics_are_of_all_that_is_there_in_the_end(
    latentmill: Command, argv: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job ends between our sum and its file: the sum is made again."""
    assert latentmill(*argv, "--max-shards", 2)[0] == 0
    real = stats.as_bytes

    def slow(content: Any) -> bytes:
        monkeypatch.undo()
        assert latentmill(*argv)[0] == 0
        return real(content)

    monkeypatch.setattr(stats, "as_bytes", slow)
    cache = json.loads((tmp_path / "c/cache.json").read_text())
    assert standing.finish(Folder(str(tmp_path / "c")), cache, weak=False)["count"] == 18
    assert json.loads((tmp_path / "c/stats.json").read_text())["count"] == 18
