"""The status of a cache whose job is running, has ended, or has crashed."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.maintenance.status import read_status
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]
NOW = datetime.datetime(2026, 5, 1, 12, 0, tzinfo=datetime.UTC)


@pytest.fixture
def cache(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Path:
    """Return a cache with two of three units done, each with five rows and one reject."""
    for number in range(3):
        members = img2dataset_members(10 * number, 6)
        members[f"{10 * number + 2:09d}.jpg"] = b"no image"
        write_tar(tmp_path / f"shards/{number}.tar", members)
    job = ("encode", tmp_path / "shards", "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64)
    assert latentmill(*job, "--workers", 0, "--max-shards", 2, "--max-reject-rate", 1)[0] == 0
    return tmp_path / "c"


def rewrite_run(cache: Path, **facts: Any) -> None:
    (path,) = (cache / "_runs").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_partial_run_leaves_the_cache_planned(cache: Path, latentmill: Command) -> None:
    code, out, _ = latentmill("status", cache)
    assert code == 0
    assert out.splitlines()[0] == f"{cache}: planned"
    assert "units      2 of 3 done, 6" in out
    assert "rows       10\n" in out
    assert "rejected   2 not_an_image\n" in out
    content = json.loads(latentmill("status", cache, "--json")[1])
    assert content["units"] == {"planned": 3, "done": 2}
    assert (content["images_per_second"], content["seconds_left"]) == (None, None)


def test_a_finished_cache_is_done(cache: Path, latentmill: Command, micro_vae: Path) -> None:
    source = cache.parent / "shards"
    latentmill("encode", source, "--to", cache, "--vae", micro_vae, "--workers", 0, "--max-reject-rate", 1)
    content = json.loads(latentmill("status", cache, "--json")[1])
    assert (content["state"], content["rows"], content["rejected"]) == ("done", 15, {"not_an_image": 3})
    assert [run["outcome"] for run in content["runs"]] == ["done", "done"]


@pytest.mark.parametrize(("outcome", "state"), [("running", "silent"), ("failed", "failed"), ("stopped", "stopped")])
def test_the_state_names_how_the_last_run_ended(cache: Path, latentmill: Command, outcome: str, state: str) -> None:
    rewrite_run(cache, outcome=outcome, ended=None, alive="2026-05-01T11:50:00+00:00")
    assert read_status(Folder(str(cache)), NOW)["state"] == state
    out = latentmill("status", cache)[1]
    assert ("no heartbeat since 2026-05-01T11:50:00+00:00" in out) == (outcome == "running")
