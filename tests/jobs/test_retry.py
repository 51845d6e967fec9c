"""Retry of rejected samples: those that now succeed are added, and existing files are not changed."""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import img2dataset_members, slow_param, write_tar

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of two tars of ten samples. Images 3, 4 and 15 are larger than the others, 7 is not an image."""
    for number in range(2):
        members = img2dataset_members(10 * number, 10)
        for key, size in (("000000003", 200), ("000000004", 300), ("000000015", 200)):
            if f"{key}.jpg" in members:
                members[f"{key}.jpg"] = img2dataset_members(int(key), 1, height=size, width=size)[f"{key}.jpg"]
        if number == 0:
            members["000000007.jpg"] = b"no image"
        write_tar(tmp_path / f"s/{number}.tar", members)
    return tmp_path / "s"


@pytest.fixture(params=["parquet", slow_param("webdataset")])
def cache(request: pytest.FixtureRequest, latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path) -> Path:
    """Return a cache in which the larger images are rejected."""
    argv = ["encode", source, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    argv += ["--rows-per-part", 4, "--format", request.param, "--input-limit", "pixels=13000"]
    assert latentmill(*argv)[0] == 3
    return tmp_path / "c"


def read_stats(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "stats.json").read_text()))


def read_parts(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "data").iterdir()}


def compute_digest_by_shell(cache: Path) -> str:
    lines = subprocess.run(
        "sha256sum _empty/* data/* 2>/dev/null", shell=True, cwd=cache, env={"LC_ALL": "C"}, capture_output=True
    ).stdout
    return hashlib.sha256(lines).hexdigest()


def test_samples_that_now_succeed_become_a_part_and_others_stay_rejected(latentmill: Command, cache: Path) -> None:
    before, parts_before = read_stats(cache), read_parts(cache)
    assert before["rejected"] == {"not_an_image": 1, "too_many_pixels": 3}
    code, out, err = latentmill("retry", cache, "--workers", 0, "--input-limit", "pixels=50000")
    assert code == 0, err
    assert "retried 4 rejected samples\n  rows       2 more, 18 in all" in out
    after, parts_after = read_stats(cache), read_parts(cache)
    assert (after["count"], after["rejected"]) == (18, {"not_an_image": 1, "too_many_pixels": 1})
    assert {name: content for name, content in parts_after.items() if name in parts_before} == parts_before
    assert sorted(name.split("-")[-1].split(".")[0] for name in parts_after.keys() - parts_before.keys()) == [
        "00000r1",
        "00001r1",
    ]
    assert after["digest"] == compute_digest_by_shell(cache)

    assert latentmill("retry", cache, "--workers", 0)[1].startswith("retried 2 rejected samples\n  rows       1 more")
    assert read_stats(cache)["rejected"] == {"not_an_image": 1}
    assert any("00001r1" in name for name in read_parts(cache))
    digest = read_stats(cache)["digest"]
    assert latentmill("retry", cache, "--workers", 0)[1].startswith("retried 1 rejected sample\n  rows       0 more")
    assert read_stats(cache)["digest"] == digest, "a retry that gains nothing writes nothing"


def test_the_summary_names_the_setting_that_leaves_a_repaired_image_out(
    latentmill: Command, micro_vae: Path, tmp_path: Path
) -> None:
    members = img2dataset_members(0, 3) | {"000000001.jpg": b"no image"}
    write_tar(tmp_path / "s/0.tar", members)
    argv = ["--vae", micro_vae, "--resolution", 64, "--min-size", 40, "--workers", 0]
    assert latentmill("encode", tmp_path / "s", "--to", tmp_path / "c", *argv)[0] == 3
    write_tar(tmp_path / "s/0.tar", members | img2dataset_members(1, 1, height=20, width=20))
    code, out, err = latentmill("retry", tmp_path / "c", "--workers", 0, "--same-source")
    assert code == 0, err
    assert "rows       0 more, 2 in all\n  rejected   0\n  filtered   1: 1 min_size\n" in out
    assert latentmill("verify", tmp_path / "c")[0] == 0


def test_the_rows_equal_those_of_a_run_without_rejects(
    latentmill: Command, cache: Path, source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    latentmill("retry", cache, "--workers", 0)
    form = json.loads((cache / "cache.json").read_text())["identity"]["container"]
    argv = ["encode", source, "--to", tmp_path / "reference", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    latentmill(*argv, "--rows-per-part", 4, "--format", form)
    retried, reference = read_stats(cache), read_stats(tmp_path / "reference")
    assert (retried["count"], retried["rejected"]) == (reference["count"], reference["rejected"])
    assert retried["mean"] == pytest.approx(reference["mean"], rel=1e-12)
    assert retried["std"] == pytest.approx(reference["std"], rel=1e-12)
    if form == "parquet":
        rows, expected = (
            {row["key"]: row for path in folder.glob("data/*") for row in pq.read_table(path).to_pylist()}
            for folder in (cache, tmp_path / "reference")
        )
        assert rows == expected


def test_encode_and_status_count_the_rows_of_a_retry(
    latentmill: Command, cache: Path, source: Path, micro_vae: Path
) -> None:
    latentmill("retry", cache, "--workers", 0)
    after = read_stats(cache)
    content = json.loads(latentmill("status", cache, "--json")[1])
    assert (content["rows"], content["rejected"]) == (19, {"not_an_image": 1})
    assert (content["state"], content["parts_of_units_under_way"]) == ("done", 0)
    argv = ["encode", source, "--to", cache, "--vae", micro_vae, "--workers", 0, "--max-reject-rate", 0.06]
    code, out, _ = latentmill(*argv)
    assert (code, out.startswith("encoded 0 images")) == (0, True)
    assert read_stats(cache) == after


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [13000, 100_000])
def test_lost_parts_are_encoded_again_without_the_samples_of_a_retry(
    latentmill: Command, cache: Path, source: Path, micro_vae: Path, pixels: int
) -> None:
    latentmill("retry", cache, "--workers", 0, "--input-limit", "pixels=50000")
    before = read_stats(cache)
    for path in [*(cache / "data").iterdir(), *(cache / "_commits").iterdir()]:
        if not re.search(r"r1\.", path.name):
            path.unlink()
    argv = ["encode", source, "--to", cache, "--vae", micro_vae, "--workers", 0]
    code, _, err = latentmill(*argv, "--input-limit", f"pixels={pixels}", "--max-reject-rate", 0.1)
    assert code == 0, err
    is_same_limit = pixels == 13000
    assert (read_stats(cache)["digest"] == before["digest"]) == is_same_limit
    assert read_stats(cache)["count"] == (18 if is_same_limit else 19)
    assert read_stats(cache)["rejected"] == (
        {"not_an_image": 1, "too_many_pixels": 1} if is_same_limit else {"not_an_image": 1}
    )
    code, out, _ = latentmill("verify", cache, "--recount")
    assert code == 0, out


def test_a_repaired_and_retried_image_is_not_encoded_twice(
    latentmill: Command, micro_vae: Path, tmp_path: Path
) -> None:
    (tmp_path / "p").mkdir()
    for name, image in img2dataset_members(0, 3).items():
        if name.endswith("jpg"):
            (tmp_path / "p" / name).write_bytes(image)
    broken = tmp_path / "p/000000001.jpg"
    intact = broken.read_bytes()
    broken.write_bytes(intact[:-100])
    argv = ["encode", tmp_path / "p", "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    code, _, err = latentmill(*argv)
    assert code == 3
    message = "1 of 3 samples (33.3%) rejected, the limit is 5% (--max-reject-rate): exit code 3; the other images are"
    assert f"WARNING {message} in the cache. After a repair, run `latentmill retry {tmp_path}/c`\n" in err
    broken.write_bytes(intact)
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    other = tmp_path / "p/000000002.jpg"
    planned = other.stat()
    other.touch()
    _, _, err = latentmill(*argv)
    os.utime(other, ns=(planned.st_atime_ns, planned.st_mtime_ns))
    notes = [line.split("INFO ")[1] for line in err.splitlines() if "changed" in line]
    assert notes == [
        "inputs that have changed since they were planned: 1 (p/000000002.jpg); the cache still holds the old version; "
        "to encode the new version, use another --to",
        "inputs that have changed since they were planned: 1 (p/000000001.jpg); `latentmill retry` has encoded "
        "rejected samples of them, as they were at that time. `latentmill verify --recount` finds later changes; to "
        "encode these, use another --to",
    ]
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0
    for path in (*tmp_path.glob("c/data/*-00000.parquet"), *tmp_path.glob("c/_commits/p-????????????????.json")):
        path.unlink()
    assert latentmill(*argv)[0] == 0
    assert (read_stats(tmp_path / "c")["count"], read_stats(tmp_path / "c")["rejected"]) == (3, {})
    code, out, _ = latentmill("verify", tmp_path / "c")
    assert code == 0, out


@pytest.mark.slow
def test_rejects_before_a_damage_are_retried(
    latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    intact = (source / "0.tar").read_bytes()
    (source / "0.tar").write_bytes(intact[: intact.index(b"000000009.jpg") + 700])
    argv = ["encode", source, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    latentmill(*argv, "--input-limit", "pixels=13000")
    assert read_stats(tmp_path / "c")["rejected"] == {"not_an_image": 1, "rest_of_shard": 1, "too_many_pixels": 3}
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    assert read_stats(tmp_path / "c")["rejected"] == {"not_an_image": 1, "rest_of_shard": 1}
    assert latentmill("verify", tmp_path / "c")[0] == 0


def test_a_sample_that_is_missing_now_stays_rejected(
    latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    argv = ["encode", source, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    latentmill(*argv, "--input-limit", "pixels=13000")
    before = read_stats(tmp_path / "c")["rejected"]
    size = (source / "0.tar").stat().st_size
    write_tar(source / "0.tar", img2dataset_members(0, 3))
    with (source / "0.tar").open("ab") as tar:
        tar.truncate(size)
    latentmill("retry", tmp_path / "c", "--workers", 0)
    assert before == {"not_an_image": 1, "too_many_pixels": 3}
    assert read_stats(tmp_path / "c")["rejected"] == {"not_an_image": 1, "too_many_pixels": 2}, (
        "one of the three is in the other tar"
    )


def test_another_vae_is_refused(latentmill: Command, cache: Path) -> None:
    code, _, err = latentmill("retry", cache, "--workers", 0, "--vae", "demo")
    assert code == 2
    assert "demo is not the VAE that made the cache" in err


def test_a_cache_without_rejects_has_nothing_to_retry(
    latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path
) -> None:
    latentmill("encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    code, out, _ = latentmill("retry", tmp_path / "c", "--workers", 0)
    assert (code, out.splitlines()[0]) == (0, "retried 0 rejected samples")
