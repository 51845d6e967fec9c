"""Temporary directories that are unfit for a local Ray."""

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
def long_directory(tmp_path: Path) -> Path:
    """Return a directory with a long path, such as Slurm makes for a job."""
    path = tmp_path / "slurm_jobdir/1355700/node0016/local_scratch/some_project/tmp"
    path.mkdir(parents=True)
    return path


def refuse_files(monkeypatch: pytest.MonkeyPatch, directory: str, number: int) -> None:
    """Let the creation of files in a directory fail."""
    real = tempfile.TemporaryFile

    def make(dir: str) -> Any:
        if dir == directory:
            raise OSError(number, os.strerror(number))
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", make)


def fill_disk(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    real = shutil.disk_usage

    def usage(path: str) -> Any:
        return real(path)._replace(free=3 << 20) if path == directory else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("directory", "make_unfit", "reason"),
    [
        ("{long_directory}", lambda m, d: None, "bytes too long for the paths of Ray's sockets"),
        ("/nowhere/at/all", lambda m, d: None, "cannot be written to: no such file or directory"),
        ("relative", lambda m, d: None, "is not an absolute path"),
        ("/var", lambda m, d: refuse_files(m, d, errno.EROFS), "cannot be written to: read-only file system"),
        ("/var", lambda m, d: refuse_files(m, d, errno.ENOSPC), "cannot be written to: no space left on device"),
        ("/var", fill_disk, "has only 3 MiB left, too few for Ray's files"),
    ],
)
def test_an_unfit_directory_is_replaced_by_a_new_one(
    long_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    directory: str,
    make_unfit: Callable[[pytest.MonkeyPatch, str], None],
    reason: str,
) -> None:
    directory = directory.format(long_directory=long_directory)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, directory)
    make_unfit(monkeypatch, directory)
    with directory_for_ray() as replacement:
        assert os.environ["RAY_TMPDIR"] == replacement
        assert os.path.isdir(replacement)
        assert len(replacement) <= ray_temp.MAX_BYTES
        assert explain_unfit(replacement) is None
    assert not os.path.exists(replacement)
    assert os.environ.get("RAY_TMPDIR") == (directory if name == "RAY_TMPDIR" else None)
    message = capsys.readouterr().err
    assert re.match(rf"{STAMP} INFO " + re.escape(f"Ray's files are in {replacement}: {name} {directory} "), message)
    assert message.endswith(reason + "\n")


def test_a_fit_directory_is_used_without_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="x-") as short:
        monkeypatch.setenv("TMPDIR", short)
        with directory_for_ray() as directory:
            assert (directory, os.environ.get("RAY_TMPDIR")) == (short, None)
    assert capsys.readouterr().err == ""


def test_no_fit_directory_is_an_error(long_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(long_directory))
    monkeypatch.setattr(ray_temp, "MAX_BYTES", 3)
    with pytest.raises(
        UsageError, match=r"no directory is usable for the files of a local Ray: RAY_TMPDIR .* set RAY_TMPDIR"
    ):
        directory_for_ray().__enter__()


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_with_an_unfit_directory_succeeds_and_removes_its_files(
    shards: Path, micro_vae: Path, tmp_path: Path, long_directory: Path
) -> None:
    argv = [shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 1]
    job = subprocess.run(
        [sys.executable, "-m", "jobs.encode", *map(str, argv)],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"},
            "TMPDIR": str(long_directory),
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert job.returncode == 0, job.stderr
    (replacement,) = re.findall(rf"^{STAMP} INFO Ray's files are in (\S+): ", job.stderr, re.MULTILINE)
    assert not Path(replacement).exists()
    assert list(long_directory.iterdir()) == []
