"""The current directory while Ray starts."""

import os
import threading
from pathlib import Path

import pytest

from jobs import worker_packages
from jobs.worker_packages import working_in
from pipeline.errors import UsageError


def test_a_directory_that_was_recreated_is_entered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked, other = tmp_path / "unpacked", tmp_path / "other"
    unpacked.mkdir()
    other.mkdir()
    monkeypatch.chdir(unpacked)
    with working_in(str(other)):
        assert Path.cwd() == other
        unpacked.rmdir()
        timer = threading.Timer(0.3, unpacked.mkdir)
        timer.start()
    timer.join()
    assert Path.cwd() == unpacked


def test_a_directory_that_was_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_packages, "RECREATE_SECONDS", 0.1)
    removed = tmp_path / "gone"
    removed.mkdir()
    monkeypatch.chdir(removed)
    with pytest.raises(UsageError, match=f"{removed} is gone"), working_in(str(tmp_path)):
        removed.rmdir()
    os.chdir(tmp_path)
