"""The current directory while a Ray starts."""

import os
import threading
from pathlib import Path

import pytest

from jobs import worker_packages
from jobs.worker_packages import working_in
from pipeline.errors import UsageError


def test_a_directory_that_is_unpacked_again_meanwhile_is_returned_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked, other = tmp_path / "unpacked", tmp_path / "other"
    unpacked.mkdir()
    other.mkdir()
    monkeypatch.chdir(unpacked)
    with working_in(str(other)):
        assert Path.cwd() == other
        unpacked.rmdir()
        again = threading.Timer(0.3, unpacked.mkdir)
        again.start()
    again.join()
    assert Path.cwd() == unpacked


def test_a_directory_that_stays_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_packages, "RECREATE_SECONDS", 0.1)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    with pytest.raises(UsageError, match=f"{gone} is gone"), working_in(str(tmp_path)):
        gone.rmdir()
    os.chdir(tmp_path)
