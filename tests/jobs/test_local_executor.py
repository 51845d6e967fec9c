"""The executor of `--workers 0`."""

from pathlib import Path

import pytest

from jobs import local_executor
from jobs.local_executor import count_cores


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000\n", 64),
        ("800000 100000\n", 8),
        ("50000 100000\n", 1),
        ("9900000 100000\n", 64),
        ("850000 100000\n", 8),
        ("", 64),
    ],
)
def test_the_limit_of_a_container_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, cores: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    monkeypatch.setattr(local_executor, "CPU_LIMIT", file)
    monkeypatch.setattr(local_executor.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert count_cores() == cores


def test_without_a_cgroup_all_cores_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_executor, "CPU_LIMIT", tmp_path / "missing")
    monkeypatch.setattr(local_executor.os, "sched_getaffinity", lambda pid: range(3), raising=False)
    assert count_cores() == 3
