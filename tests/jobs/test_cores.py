"""The number of cores that a process may use."""

from pathlib import Path

import pytest

from jobs import cores
from jobs.cores import count_cores


@pytest.mark.parametrize(
    ("limit", "expected"),
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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    monkeypatch.setattr(cores, "CPU_LIMIT", file)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert count_cores() == expected


def test_without_a_cgroup_all_cores_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cores, "CPU_LIMIT", tmp_path / "missing")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: range(3), raising=False)
    assert count_cores() == 3
