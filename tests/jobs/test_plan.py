"""`latentmill plan` against real runs of `encode` with the same settings, and the requests that it makes."""

import gzip
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from jobs import plan_summary
from pipeline.estimate.speed import Rates
from tests.conftest import encoded, img2dataset_members, slow_param, smooth, write_tar
from tests.jobs.conftest import Command

SETTINGS = ("--resolution", 64)
ENOUGH = ("--seconds", 60, "--images-per-second", 100)  # nothing is encoded, so it ends when all samples are opened


@pytest.fixture
def plan(latentmill: Command, micro_vae: Path) -> Callable[..., dict[str, Any]]:
    """Return `latentmill plan --json` with the micro model, which must succeed."""

    def run(*argv: object) -> dict[str, Any]:
        code, out, err = latentmill("plan", *argv, "--vae", micro_vae, *ENOUGH, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return run


@pytest.fixture
def check(
    plan: Callable[..., dict[str, Any]], latentmill: Command, micro_vae: Path, tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Return a function that holds a plan against a run of `encode`. It returns the plan, and the run's `stats`."""

    def run(*argv: object) -> tuple[dict[str, Any], dict[str, Any]]:
        found, cache = plan(*argv), tmp_path / "cache"
        code, out, err = latentmill("encode", *argv, "--to", cache, "--vae", micro_vae, "--workers", 0, "--json")
        assert code in (0, 3), err
        stats: dict[str, Any] = json.loads(out)["stats"]
        samples = stats["count"] + sum(stats["rejected"].values()) + sum(stats["filtered"].values())
        assert found["images"]["count"] == pytest.approx(samples, rel=0.05)
        assert found["rows"] == pytest.approx(stats["count"], rel=0.05)
        chosen = found["chosen"]
        size = sum(path.stat().st_size for path in (cache / "data").rglob("*") if path.is_file())
        assert found["cache_bytes"][chosen["store"]][chosen["dtype"]] == pytest.approx(size, rel=0.1)
        return found, stats

    return run


def write_images(folder: Path, count: int, **size: int) -> Path:
    """Write a folder of JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index:04d}.jpg").write_bytes(encoded(smooth(index, **size)))
    return folder


def test_a_plan_of_tars_agrees_with_encode(check: Any, tmp_path: Path) -> None:
    for number, count in enumerate((150, 90, 120)):
        write_tar(tmp_path / f"src/{number}.tar", img2dataset_members(1000 * number, count))
    found, _ = check(tmp_path / "src", *SETTINGS)
    assert not found["images"]["is_exact"]
    assert abs(found["images"]["count"] - 360) <= found["images"]["error"]
    assert found["shards"] == {"tar": 3}
    assert found["columns"] == {"json": 1.0, "txt": 1.0}
    assert found["formats"].keys() == {"jpeg"}


@pytest.mark.parametrize("compressed", [False, True])
def test_the_bytes_of_the_first_images_give_the_number_of_all(plan: Any, tmp_path: Path, compressed: bool) -> None:
    """Images of one size: an offset that is wrong by one image would give 98 of 100."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    tar = write_tar(tmp_path / "a.tar", {f"{index:03d}.png": encoded(noise, "PNG") for index in range(100)})
    if compressed:
        data = tar.read_bytes()
        tar.unlink()
        tar = tmp_path / "a.tar.gz"
        tar.write_bytes(gzip.compress(data, 0))  # as of images, nothing becomes smaller
    images = plan(tar, *SETTINGS)["images"]
    assert images["count"] == (pytest.approx(100, abs=3) if compressed else 100)
    assert not images["is_exact"]


def test_small_tars_are_read_whole_and_counted_exactly(check: Any, shards: Path) -> None:
    found, _ = check(shards, *SETTINGS)
    assert found["images"] == {"count": 18, "error": 0, "is_exact": True}


def test_a_folder_is_counted_exactly(check: Any, tmp_path: Path) -> None:
    found, _ = check(write_images(tmp_path / "photos", 90), *SETTINGS)
    assert found["images"] == {"count": 90, "error": 0, "is_exact": True}
    assert found["sampled"]["images"] == 64


@pytest.mark.parametrize("store", [slow_param("mode"), "moments"])
def test_parquet_is_counted_exactly_from_its_footers(check: Any, tmp_path: Path, store: str) -> None:
    (tmp_path / "src").mkdir()
    for number, count in enumerate((130, 70)):
        images = [{"bytes": encoded(smooth(1000 * number + index)), "path": None} for index in range(count)]
        pq.write_table(pa.table({"image": images, "text": ["a caption"] * count}), tmp_path / f"src/{number}.parquet")
    found, _ = check(tmp_path / "src", *SETTINGS, "--store", store, "--dtype", "float32")
    assert found["images"] == {"count": 200, "error": 0, "is_exact": True}


def test_a_zip_is_counted_exactly_from_its_directory(check: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index in range(100):
            archive.writestr(f"{index:03d}.jpg", encoded(smooth(index)))
    found, _ = check(tmp_path / "a.zip", *SETTINGS)
    assert found["images"] == {"count": 100, "error": 0, "is_exact": True}


@pytest.mark.slow
def test_arrow_files_are_estimated_from_their_record_batches(check: Any, tmp_path: Path) -> None:
    images = [{"bytes": encoded(smooth(index)), "path": None} for index in range(300)]
    table = pa.table({"image": images})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    found, _ = check(tmp_path / "a.arrow", *SETTINGS)
    assert not found["images"]["is_exact"]
    assert found["sampled"]["images"] == 64


def test_a_manifest_is_counted_exactly(check: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 70)
    rows = "".join(f"photos/{index:04d}.jpg\n" for index in range(70))
    (tmp_path / "list.csv").write_text(f"path\n{rows}", encoding="utf-8")
    found, _ = check(tmp_path / "list.csv", *SETTINGS)
    assert found["images"] == {"count": 70, "error": 0, "is_exact": True}
    assert found["sampled"]["images"] == 64


@pytest.mark.slow
def test_kinds_of_inputs_are_estimated_apart(check: Any, tmp_path: Path) -> None:
    """The images of a kind stand for that kind only: here the tar has small ones, and the folder large ones."""
    write_images(tmp_path / "src/photos", 100, height=300, width=300)
    write_tar(tmp_path / "src/a.tar", img2dataset_members(0, 20))
    found, _ = check(tmp_path / "src", *SETTINGS)
    assert found["short_sides"] == {"below 256": 20, "256-511": 100}


def test_buckets_of_mixed_sizes_agree_with_encode(check: Any, tmp_path: Path) -> None:
    members = {}
    for index in range(60):
        size = {"height": 192, "width": 96} if index % 3 else {"height": 96, "width": 192}
        members[f"{index:03d}.jpg"] = encoded(smooth(index, **size))
    found, stats = check(write_tar(tmp_path / "a.tar", members), "--buckets", 128, "--multiple-of", 32)
    assert found["enlarged"] == stats["enlarged"]
    assert sorted(found["buckets"].values()) == [20, 40]


def test_unreadable_and_small_images_are_counted(check: Any, tmp_path: Path) -> None:
    members = {}
    for index in range(60):
        data = b"no image" if index % 6 == 0 else encoded(smooth(index, height=48 if index % 6 == 1 else 96))
        members[f"{index:03d}.jpg"] = data
    found, stats = check(write_tar(tmp_path / "a.tar", members), *SETTINGS, "--min-size", 64)
    assert found["filtered"] == stats["filtered"] == {"min_size": 10}
    assert found["unreadable"]["reasons"] == stats["rejected"]
    assert found["unreadable"]["share"] == pytest.approx(1 / 6)


def test_webdataset_caches_are_estimated(check: Any, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", img2dataset_members(0, 40))
    check(tmp_path / "a.tar", *SETTINGS, "--format", "webdataset", "--flip", "both")


def test_a_large_source_costs_few_reads(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards differ in their number of images, so the estimate has an error, which must cover the truth."""
    contents = [
        write_tar(tmp_path / f"{count}.tar", img2dataset_members(0, count)).read_bytes() for count in (3, 5, 8, 11)
    ]
    fs = fsspec.filesystem("memory")
    counts = np.random.default_rng(0).integers(0, 4, 3000)
    try:
        for number, kind in enumerate(counts):
            fs.pipe_file(f"/large/{number:05d}.tar", contents[kind])
        opened: list[str] = []
        real = MemoryFileSystem._open
        monkeypatch.setattr(
            MemoryFileSystem, "_open", lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k)
        )
        found = plan("memory://large", *SETTINGS, "--workers", 4, "--price-per-hour", 2)
    finally:
        fs.rm("/large", recursive=True)
    truth = int(np.array([3, 5, 8, 11])[counts].sum())
    assert found["shards"] == {"tar": 3000}
    assert abs(found["images"]["count"] - truth) <= found["images"]["error"] < 0.1 * truth
    assert 2 <= len(opened) <= 64
    speed = found["speed"]
    assert speed["is_named"] and speed["workers"] == 4 and speed["cost"] == pytest.approx(2 * 4 * speed["hours"])


def test_the_same_seed_draws_the_same_sample(plan: Any, tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"src/{number}.tar", img2dataset_members(1000 * number, 1 + number % 7))
    first, again = (plan(tmp_path / "src", *SETTINGS, "--seed", 1) for _ in range(2))
    assert first["images"] == again["images"]


def test_nothing_is_written(plan: Any, shards: Path, tmp_path: Path) -> None:
    plan(shards, *SETTINGS, "--to", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_settings_that_encode_would_refuse_are_refused(
    latentmill: Command, micro_vae: Path, shards: Path, tmp_path: Path
) -> None:
    cache, vae = tmp_path / "cache", ("--vae", micro_vae)
    assert latentmill("encode", shards, "--to", cache, *vae, *SETTINGS, "--workers", 0)[0] == 0
    assert latentmill("plan", shards, "--to", cache, *vae, *ENOUGH)[0] == 0
    other = [latentmill(verb, shards, "--to", cache, *vae, "--resolution", 128) for verb in ("plan", "encode")]
    assert other[0] == other[1]
    assert "was made with --resolution 64, this command has --resolution 128" in other[0][2]


def test_the_text_states_the_error(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    for number, count in enumerate((150, 90)):
        write_tar(tmp_path / f"src/{number}.tar", img2dataset_members(1000 * number, count))
    code, out, _ = latentmill("plan", tmp_path / "src", "--vae", micro_vae, *SETTINGS, *ENOUGH, "--workers", 1)
    assert code == 0
    assert "±" in out.splitlines()[0] and out.splitlines()[0].endswith("images (95%)")
    assert "(per stream, per core and per device; encode rate as given by --images-per-second)\n" in out
    assert re.search(r"^time +2 s with 1 worker \(100\.0 images/s\), bound by encoding$", out, re.MULTILINE), out


def test_the_text_names_all_kinds_of_inputs(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "src/a.tar", img2dataset_members(0, 3))
    write_images(tmp_path / "src", 2)
    code, out, err = latentmill("plan", tmp_path / "src", "--vae", micro_vae, *SETTINGS, *ENOUGH)
    assert code == 0, err
    assert out.splitlines()[1].startswith("inputs     1 tar, 2 images in folders; 2 units, ")


def test_the_speed_is_measured_and_gives_the_hours(latentmill: Command, micro_vae: Path, shards: Path) -> None:
    argv = ("--vae", micro_vae, *SETTINGS, "--seconds", 0.4, "--workers", 3, "--device", "cpu", "--json")
    code, out, err = latentmill("plan", shards, *argv)
    assert code == 0, err
    speed = json.loads(out)["speed"]
    alone = 1 / (1 / speed["open"] + 1 / speed["encode"])  # one core opens and encodes
    assert not speed["is_named"] and speed["read"] > 0
    assert speed["images_per_second"] == pytest.approx(3 * min(alone, 2 * speed["read"]))
    assert speed["hours"] == pytest.approx(18 / speed["images_per_second"] / 3600)
    assert speed["bound_by"] in ("opening", "encoding")


@pytest.mark.parametrize(("gpus_per_worker", "workers", "cores"), [(1, 4, 2), (2, 2, 4), (0.5, 8, 1), (8, 1, 8)])
def test_workers_on_gpus_have_the_gpus_that_they_reserve(
    plan: Any, shards: Path, monkeypatch: pytest.MonkeyPatch, gpus_per_worker: float, workers: int, cores: int
) -> None:
    """The rate is given, so nothing is computed on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(plan_summary, "count_cores", lambda: 8)
    speed = plan(shards, *SETTINGS, "--gpus-per-worker", gpus_per_worker, "--device", "cuda")["speed"]
    assert (speed["workers"], speed["cores_per_worker"]) == (workers, cores)


def test_workers_that_share_a_device_share_its_rate() -> None:
    rates = Rates(read=None, open=100.0, encode=40.0, on_cores=False, streams=2, device_share=0.5)
    assert rates.per_worker(cores=1) == {"opening": 100.0, "encoding": 20.0}
    assert rates.cores_per_device == 0.4, "of the whole device"


def test_a_missing_source_is_an_error(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    code, out, err = latentmill("plan", tmp_path / "none", "--vae", micro_vae)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'none'} does not exist" in err


def test_a_damaged_source_is_an_error(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    code, _, err = latentmill("plan", tmp_path / "a.tar", "--vae", micro_vae)
    assert code in (1, 2)
    assert "a.tar" in err


def test_names_of_columns_cannot_control_the_terminal(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table({"image": [encoded(smooth(0))], "\x1b[2J\x07name": ["a"]}), tmp_path / "src/a.parquet")
    code, out, err = latentmill("plan", tmp_path / "src", "--vae", micro_vae, *SETTINGS, *ENOUGH)
    assert code == 0, err
    assert r"columns    \x1b[2J\x07name 100%" in out


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_damaged_shard_is_named_and_the_count_is_not_called_exact(
    latentmill: Command, micro_vae: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "src").mkdir()
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"src/{name}.zip", "w") as archive:
            archive.writestr("1.jpg", encoded(smooth(0)))
        write_tar(tmp_path / f"src/{name}.tar", img2dataset_members(0, 10))
        (tmp_path / f"src/{name}.{'tar' if kind == 'zip' else 'zip'}").unlink()
    damaged = tmp_path / f"src/b.{kind}"
    damaged.write_bytes(damaged.read_bytes()[:90])
    code, out, err = latentmill("plan", tmp_path / "src", "--vae", micro_vae, *SETTINGS, *ENOUGH, "--json")
    assert code == 0, err
    assert f"b.{kind}" in err
    assert json.loads(out)["images"] | {"error": 0} == {
        "count": 10 if kind == "tar" else 1,
        "error": 0,
        "is_exact": False,
    }
    assert json.loads(out)["damaged_inputs"] == 1
    out = latentmill("plan", tmp_path / "src", "--vae", micro_vae, *SETTINGS, *ENOUGH)[1]
    assert "± 0" not in out
    count = "10 images" if kind == "tar" else "1 image"
    assert f"images     {count}, plus whatever follows the damage in 1 input\n" in out


@pytest.mark.parametrize("option", ["--seconds", "--images-per-second", "--price-per-hour"])
def test_negative_numbers_are_refused(latentmill: Command, micro_vae: Path, shards: Path, option: str) -> None:
    code, _, err = latentmill("plan", shards, "--vae", micro_vae, option, -1)
    assert code == 2
    assert option in err
