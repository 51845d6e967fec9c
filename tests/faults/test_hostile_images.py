"""Images that end or hang the process that opens them: they are rejected by name, and the others are encoded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import img2dataset_members, write_tar

ROOT = Path(__file__).parents[2]
SABOTAGE = Path(__file__).parent / "sabotage"

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of three tars of ten samples. Two tars have an image that must not be opened."""
    for number, bad in enumerate((None, b"ABORT", b"SLEEP")):
        members = img2dataset_members(10 * number, 10)
        if bad:
            members[f"{10 * number + 4:09d}.jpg"] += bad
        write_tar(tmp_path / f"s/{number}.tar", members)
    return tmp_path / "s"


def encode(source: Path, cache: Path, vae: Path, *options: object) -> tuple[int, str]:
    argv = [source, "--to", cache, "--vae", vae, "--resolution", 64, "--workers", 2]
    argv += ["--input-limit", "seconds=3", "--json", *options]
    job = subprocess.run(
        [sys.executable, "-m", "jobs.encode", *map(str, argv)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SABOTAGE, ROOT)))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return job.returncode, job.stdout + job.stderr


@pytest.mark.fault(14, "an image ends its worker, another one hangs its own")
@pytest.mark.timeout(300)
def test_hostile_images_are_rejected_by_name_and_the_others_encoded(
    latentmill: Callable[..., tuple[int, str, str]], source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    code, out = encode(source, tmp_path / "c", micro_vae, "--stall-timeout", 10)
    assert code == 3, out  # two of thirty are more than 5%
    assert "Fatal Python error: Aborted" in out, "the last output of the lost worker is shown"
    assert_rejected_by_name(tmp_path)


@pytest.mark.fault(31, "an image ends its opener, another one hangs its own")
@pytest.mark.timeout(300)
def test_hostile_images_cost_no_worker_if_they_are_opened_in_processes(
    source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    code, out = encode(source, tmp_path / "c", micro_vae, "--open-workers", 3)
    assert code == 3, out
    assert "restarting" not in out, "no worker was lost"
    assert_rejected_by_name(tmp_path)


def assert_rejected_by_name(tmp_path: Path) -> None:
    rejects = [json.loads(line) for path in tmp_path.glob("c/_rejects/*") for line in path.read_text().splitlines()]
    assert sorted((reject["shard"], reject["key"], reject["reason"]) for reject in rejects) == [
        ("s/1.tar", "000000014", "unsafe"),
        ("s/2.tar", "000000024", "unsafe"),
    ]
    assert json.loads((tmp_path / "c/stats.json").read_text())["count"] == 28
