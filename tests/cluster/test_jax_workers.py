"""`--backend jax` on a local Ray: two workers give the bytes of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import img2dataset_members, write_tar

pytest.importorskip("flax")
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_two_workers_give_the_cache_of_one_process(micro_vae: Path, tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s/{number:05d}.tar", img2dataset_members(20 * number, 20))
    digests = []
    for workers in (0, 2):
        argv = ["s", "--to", f"c{workers}", "--vae", str(micro_vae), "--resolution", "64", "--backend", "jax"]
        job = subprocess.run(
            [sys.executable, "-m", "jobs.encode", *argv, "--workers", str(workers), "--json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert job.returncode == 0, job.stderr
        digests.append(json.loads(job.stdout)["stats"]["digest"])
    assert digests[0] == digests[1]
    commits = [json.loads(path.read_text()) for path in (tmp_path / "c2/_commits").iterdir()]
    assert {commit["compute"]["backend"] for commit in commits} == {"jax"}
