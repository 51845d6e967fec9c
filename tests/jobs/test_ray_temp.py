"""Temporary directories in which a local Ray cannot live."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import ray_temp
from jobs.ray_temp import directory_for_ray, explain_unfit
from pipeline.errors import UsageError
from tests.conftest import STAMP

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A directory as Slurm makes them for its jobs."""
    path = tmp_path / "slurm_jobdir/1355700/node0016/local_scratch/some_project/tmp"
    path.mkdir(parents=True)
    return path


def refuse(monkeypatch: pytest.MonkeyPatch, directory: str, number: int) -> None:
    """No file can be made in a directory."""
    real = tempfile.TemporaryFile

    def make(dir: str) -> Any:
        if dir == directory:
            raise OSError(number, os.strerror(number))
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", make)


def fill(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    real = shutil.disk_usage

    def usage(path: str) -> Any:
        return real(path)._replace(free=3 << 20) if path == directory else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("usual", "break_it", "why"),
    [
        ("{long}", lambda m, d: None, "bytes too long for the paths of Ray's sockets"),
        ("/nowhere/at/all", lambda m, d: None, "cannot be written to: no such file or directory"),
        ("relative", lambda m, d: None, "is not an absolute path"),
        ("/var", lambda m, d: refuse(m, d, errno.EROFS), "cannot be written to: read-only file system"),
        ("/var", lambda m, d: refuse(m, d, errno.ENOSPC), "cannot be written to: no space left on device"),
        ("/var", fill, "has only 3 MiB left, too few for Ray's files"),
    ],
)
def test_where_ray_cannot_live_it_gets_a_directory_of_ours(
    long: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    usual: str,
    break_it: Callable[[pytest.MonkeyPatch, str], None],
    why: str,
) -> None:
    usual = usual.format(long=long)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, usual)
    break_it(monkeypatch, usual)
    with directory_for_ray() as ours:
        assert os.environ["RAY_TMPDIR"] == ours
        assert os.path.isdir(ours)
        assert len(ours) <= ray_temp.MAX_BYTES
        assert explain_unfit(ours) is None
    assert not os.path.exists(ours)
    assert os.environ.get("RAY_TMPDIR") == (usual if name == "RAY_TMPDIR" else None)
    said = capsys.readouterr().err
    assert re.match(rf"{STAMP} INFO " + re.escape(f"Ray's files are in {ours}: {name} {usual} "), said)
    assert said.endswith(why + "\n")


def test_where_ray_can_live_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="x-") as short:
        monkeypatch.setenv("TMPDIR", short)
        with directory_for_ray() as usual:
            assert (usual, os.environ.get("RAY_TMPDIR")) == (short, None)
    assert capsys.readouterr().err == ""


def test_where_there_is_no_place_it_is_said(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setattr(ray_temp, "MAX_BYTES", 3)
    with pytest.raises(
        UsageError, match=r"no directory is usable for the files of a local Ray: RAY_TMPDIR .* set RAY_TMPDIR"
    ):
        directory_for_ray().__enter__()


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_runs_in_such_a_directory_and_leaves_nothing(
    shards: Path, micro_vae: Path, tmp_path: Path, long: Path
) -> None:
    argv = [shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 1]
    job = subprocess.run(
        [sys.executable, "-m", "jobs.encode", *map(str, argv)],
        cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert job.returncode == 0, job.stderr
    (ours,) = re.findall(rf"^{STAMP} INFO Ray's files are in (\S+): ", job.stderr, re.MULTILINE)
    assert not Path(ours).exists()
    assert list(long.iterdir()) == []
