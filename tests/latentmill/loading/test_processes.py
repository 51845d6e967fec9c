"""Trainings in processes of their own: two ranks, and one that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.make_cache import CacheSpec, write_cache
from latentmill import Cache, Loader

ROOT = Path(__file__).parents[3]
Make = Callable[..., Path]


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.latentmill.loading.trainer", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_two_ranks_share_an_epoch_and_read_the_files_that_rank_0_sees(small_cache: Make, tmp_path: Path) -> None:
    write_cache(tmp_path / "empty", CacheSpec(buckets={(64, 64): 0}, parts=0))
    (tmp_path / "empty/data").rmdir()
    ranks = [
        start("ranks", small_cache(), tmp_path / "meeting", tmp_path / "empty", RANK=str(rank), WORLD_SIZE="2")
        for rank in range(2)
    ]
    results: list[dict[str, Any]] = []
    for rank in ranks:
        out, err = rank.communicate(timeout=100)
        assert rank.returncode == 0, err
        results.append(json.loads(out))
    first = {row["key"] for row in Cache.open(str(small_cache())).rows(Cache.open(str(small_cache())).files()[0])}
    keys = [key for result in results for key in result["keys"]]
    assert sorted(keys) == sorted({f"{number:09d}" for number in range(18)} - first)
    assert results[0]["states"] == results[1]["states"] == [results[0]["states"][0]] * 2, "one state for all ranks"
    assert [result["steps"] for result in results] == [5, 5], "after `refresh`, both have 18 rows"
    assert [result["error"] for result in results] == ["", "batch_size is 2 on rank 0, but 3 on this rank"]
    assert all("no batch for each rank" in result["missing"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_training_that_is_killed_has_each_row_once(small_cache: Make, tmp_path: Path, steps: int) -> None:
    checkpoint = tmp_path / "checkpoint.json"
    process = start("killed", small_cache(), checkpoint)
    deadline = time.monotonic() + 60
    while not checkpoint.exists() or json.loads(checkpoint.read_text())[1]["sessions"][0][-1] < steps:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen, state = json.loads(checkpoint.read_text())
    assert 2 * steps <= len(seen) < 18
    for ranks in (1, 2):
        rest = list[str]()
        for rank in range(ranks):
            loader = Loader(Cache.open(str(small_cache())), 2 // ranks, rank=rank, world=ranks)
            loader.load_state_dict(state)
            rest += [key for batch in loader for key in batch["key"]]
        assert sorted(seen + rest) == [f"{number:09d}" for number in range(18)]
