"""The status of a cache whose job is running, has ended, or has crashed."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import encode
from jobs.status import format_status
from pipeline.cache import plan
from pipeline.cache.runs import Run
from pipeline.errors import StorageError
from pipeline.maintenance.status import read_status
from pipeline.records import ListedFile
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
    settings = "--transform center-crop --resolution 64 --exif apply --alpha white --color keep --flip none"
    assert f"  settings   {settings} --store mode --dtype float16\n" in out
    assert code == 0
    assert out.splitlines()[0] == f"{cache}: planned"
    assert "units      2 of 3 done, 6" in out
    assert "rows       10\n" in out
    assert "rejected   2: 2 not_an_image\n" in out
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


@pytest.mark.slow
def test_the_reason_of_a_failure_is_shown_without_secrets(
    latentmill: Command, micro_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise StorageError("cannot list it: no answer to pl4nted-s3cret")

    write_tar(tmp_path / "shards/0.tar", img2dataset_members(0, 1))
    options = ("--vae", micro_vae, "--resolution", 64, "--workers", 0)
    job = ("encode", tmp_path / "shards", "--to", tmp_path / "c", *options)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pl4nted-s3cret")
    monkeypatch.setattr(encode, "encode_pending", fail)
    assert latentmill(*job)[0] == 1
    _, out, _ = latentmill("status", tmp_path / "c")
    assert out.startswith(f"{tmp_path}/c: failed\n")
    assert "  failed     cannot list it: no answer to ***\n" in out
    rewrite_run(tmp_path / "c", error="cannot list \x1b[2J")
    assert r"  failed     cannot list \x1b[2J" in latentmill("status", tmp_path / "c")[1]
    monkeypatch.undo()
    (tmp_path / "shards/0.tar").unlink()
    write_tar(tmp_path / "shards/1.tar", {"0.jpg": b""})
    assert latentmill(*job, "--max-reject-rate", 1)[0] == 1
    error = f"1 unit failed: cannot read {tmp_path}/shards/0.tar: no such file or directory"
    runs = json.loads(latentmill("status", tmp_path / "c", "--json")[1])["runs"]
    assert error in [run["error"] for run in runs], "the order of runs that start in one second is not defined"


def test_images_of_units_under_way_count(cache: Path) -> None:
    """Two of three units are done, with twelve samples; the third has six."""
    finished = read_status(Folder(str(cache)), NOW)
    assert (finished["units"]["done"], finished["share"]) == (2, pytest.approx(2 / 3, abs=0.02))
    for images, share in ((10, 2 / 3), (13, 5 / 6), (1000, 1.0)):
        rewrite_run(cache, outcome="running", ended=None, alive=NOW.isoformat(), images=images)
        status = read_status(Folder(str(cache)), NOW)
        assert (status["state"], status["share"]) == ("running", pytest.approx(share, abs=0.02))
        assert f"2 of 3 done, {status['share']:.0%} of the bytes" in "\n".join(
            format_status({**status, "settings": {}})
        )


def test_the_first_unit_of_a_folder_counts_before_it_is_done(tmp_path: Path) -> None:
    images = [ListedFile(root="/p", path=f"p/{n}.jpg", bytes=size, etag="") for n, size in enumerate((50, 150))]
    cache = Folder(str(tmp_path))
    plan.extend_plan(cache, images)
    run = Run(cache, "encode", {})
    run.write(images=1, counts=None)  # a damaged record
    status = read_status(cache, datetime.datetime.now(datetime.UTC))
    assert (status["state"], status["share"]) == ("running", 0.0)
    run.write(images=1, counts={})  # no unit is done
    assert read_status(cache, datetime.datetime.now(datetime.UTC))["share"] == 0.5
