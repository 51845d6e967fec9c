"""Large tars, which are divided into ranges when they are planned."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import plan
from pipeline.errors import JobError
from pipeline.readers import blocks, tar_boundaries
from pipeline.sources import large_tars
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]

COUNT = 40  # samples of the tar


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tar of some hundred kB be a large one."""
    monkeypatch.setattr(large_tars, "LARGE_TAR_BYTES", 64 << 10)
    monkeypatch.setattr(large_tars, "TAR_RANGE_BYTES", 32 << 10)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 << 10)
    monkeypatch.setattr(tar_boundaries, "SEARCHED", (4 << 10, 16 << 10))


@pytest.fixture
def encode(encode: Command) -> Command:
    """Return the encode command, for which rejects are no reason to fail."""

    def run(*argv: object) -> tuple[int, str, str]:
        return encode(*argv, "--max-reject-rate", 1)

    return run


def leave_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_tars, "LARGE_TAR_BYTES", 1 << 40)


def make_members() -> dict[str, bytes]:
    """Return samples with long names; the fourth is not an image, and the sixth has no image."""
    members = {f"{'folder/' * 20}{name}": data for name, data in img2dataset_members(0, COUNT).items()}
    members[f"{'folder/' * 20}000000003.jpg"] = b"no image"
    del members[f"{'folder/' * 20}000000005.jpg"]
    return members


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with a large tar, and a small one with the same keys."""
    write_tar(tmp_path / "s/large.tar", make_members())
    write_tar(tmp_path / "s/small.tar", img2dataset_members(0, 3))
    return tmp_path / "s"


def read_rows(cache: Path) -> list[dict[str, Any]]:
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((cache / "data").iterdir())]).to_pylist()
    return sorted(rows, key=lambda row: (row["shard"], row["key"]))


def read_rejects(cache: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for path in cache.glob("_rejects/*") for line in path.read_text().splitlines()]
    return sorted((line["shard"], line["key"], line["reason"]) for line in lines)


@pytest.mark.slow
def test_a_divided_tar_gives_the_rows_of_a_whole_one(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encode(source, "--rows-per-part", 7)[0] == 0
    units = plan.read_plan(Folder(str(tmp_path / "c")))
    (small,) = [unit for unit in units if unit.path == "s/small.tar"]
    ranges = [unit for unit in units if unit.path == "s/large.tar"]
    size = (source / "large.tar").stat().st_size
    assert (small.range, small.files) == (None, "")
    assert len(ranges) == -(-size // (32 << 10)) > 3
    assert [unit.range for unit in ranges] == [(k, len(ranges)) for k in range(len(ranges))]
    assert {(unit.kind, unit.bytes) for unit in ranges} == {("tar", size)}
    code, out, err = latentmill("verify", tmp_path / "c", "--recount", "--reencode", 6)
    assert (code, err) == (0, ""), out

    def refuse(*_: object) -> None:
        raise AssertionError("the boundaries are in the plan")

    monkeypatch.setattr(tar_boundaries.TarHeaders, "search", refuse)
    assert encode(source, "--rows-per-part", 7)[1].startswith("encoded 0 images")
    leave_whole(monkeypatch)
    assert encode(source, "--to", tmp_path / "whole")[0] == 0
    assert read_rows(tmp_path / "c") == read_rows(tmp_path / "whole")
    assert read_rejects(tmp_path / "c") == read_rejects(tmp_path / "whole") != []
    source.rename(tmp_path / "moved")
    code, out, err = latentmill("decode", tmp_path / "c", "--to", tmp_path / "d", "--source", f"s={tmp_path / 'moved'}")
    assert code == 0, err
    assert "originals not shown" not in err
    assert len(list((tmp_path / "d/images").rglob("*.png"))) > 0


def test_the_boundaries_do_not_depend_on_the_place_of_the_tar(encode: Command, source: Path, tmp_path: Path) -> None:
    assert encode(source, "--max-shards", 1)[0] == 0
    (tmp_path / "other").mkdir()
    moved = source.rename(tmp_path / "other/s")
    assert encode(moved, "--to", tmp_path / "c2", "--max-shards", 1)[0] == 0
    first, second = (plan.read_plan(Folder(str(tmp_path / name))) for name in ("c", "c2"))
    assert [(unit.name, unit.files) for unit in first] == [(unit.name, unit.files) for unit in second]


@pytest.mark.slow
def test_a_changed_tar_is_divided_again_until_its_first_range_is_encoded(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Folder(str(tmp_path / "c"))

    def stop(*_: object) -> None:
        raise JobError("stopped after the plan was written")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.encode.encode_pending", stop)
        assert encode(source)[0] == 1
    before = [unit for unit in plan.read_plan(cache) if unit.path == "s/large.tar"]
    write_tar(source / "large.tar", {"first.jpg": b"x" * 9000, **make_members()})
    _, _, err = encode(source, "--max-shards", 2)
    assert "inputs that have changed since they were planned: 1 (s/large.tar); none of their samples are encoded" in err
    after = [unit for unit in plan.read_plan(cache) if unit.path == "s/large.tar"]
    assert [unit.files for unit in after] != [unit.files for unit in before]
    write_tar(source / "large.tar", make_members())
    code, _, err = encode(source)
    assert code == 1
    assert "they are partly encoded" in err
    assert re.search(r"large\.tar has changed since it was planned \(\d+ bytes then, \d+ now\)", err)
    write_tar(source / "large.tar", {"first.jpg": b"x" * 9000, **make_members()})
    assert encode(source, "--same-source")[0] == 0
    code, out, err = latentmill("verify", tmp_path / "c", "--recount")
    assert (code, err) == (0, ""), out


@pytest.mark.slow
def test_a_damaged_range_loses_only_its_own_rest_and_is_retried(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path, micro_vae: Path
) -> None:
    intact = (source / "large.tar").read_bytes()
    at = intact.index(b"folder/" * 5, len(intact) // 2) // 512 * 512
    damaged = bytearray(intact)
    damaged[at : at + 1024] = b"x" * 1024
    (source / "large.tar").write_bytes(damaged)
    assert encode(source)[0] == 3
    rest = [key for _, key, reason in read_rejects(tmp_path / "c") if reason == "rest_of_shard"]
    assert len(rest) == 1
    assert len(read_rows(tmp_path / "c")) > COUNT - 8
    code, out, _ = latentmill("verify", tmp_path / "c", "--recount")
    assert (code, "except after the damage of 1 input" in out) == (0, True)
    (source / "large.tar").write_bytes(intact)
    assert latentmill("retry", tmp_path / "c", "--vae", micro_vae, "--workers", 0)[0] == 0
    assert {row["key"] for row in read_rows(tmp_path / "c") if row["shard"] == "s/large.tar"} == {
        name.removesuffix(".jpg") for name in make_members() if name.endswith(".jpg") and "000000003" not in name
    }
    code, out, err = latentmill("verify", tmp_path / "c", "--recount")
    assert (code, err) == (0, ""), out


@pytest.mark.slow
def test_the_rest_of_a_truncated_tar_is_in_its_last_range(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path, micro_vae: Path
) -> None:
    intact = (source / "large.tar").read_bytes()
    (source / "large.tar").write_bytes(intact[: len(intact) * 2 // 3])
    assert encode(source)[0] == 3
    (source / "large.tar").write_bytes(intact)
    assert latentmill("retry", tmp_path / "c", "--vae", micro_vae, "--workers", 0)[0] == 0
    assert len(read_rows(tmp_path / "c")) == COUNT - 2 + 3
    code, out, err = latentmill("verify", tmp_path / "c", "--recount")
    assert (code, err) == (0, ""), out


def test_a_key_in_two_ranges_is_found_by_verify(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    """Each range knows only its own keys."""
    members = img2dataset_members(0, COUNT)
    members["000000000.jpeg"] = members["000000001.jpg"]  # at the end of the tar
    write_tar(tmp_path / "s/0.tar", members)
    assert encode(tmp_path / "s")[0] == 0
    assert read_rejects(tmp_path / "c") == []
    code, out, _ = latentmill("verify", tmp_path / "c")
    assert code == 1
    assert "repeats rows of s/0.tar" in out
    assert "if the tar has a key twice" in out


def test_a_tar_that_was_divided_inside_another_tar_is_named(
    encode: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (source / "large.tar").read_bytes()
    members = {f"{n:03}.jpg": b"no image" for n in range(40)}
    write_tar(source / "large.tar", {**members, "x.bin": data, **{f"z{n}.jpg": b"no image" for n in range(40)}})
    code, _, err = encode(source)
    assert code == 1
    assert re.search(r"large\.tar was divided at byte \d+, but no member begins there: it may contain another tar", err)
    leave_whole(monkeypatch)
    assert encode(source, "--to", source.with_name("c2"))[0] == 0


def test_compressed_tars_stay_whole(encode: Command, source: Path, tmp_path: Path) -> None:
    (source / "large.tar").write_bytes(gzip.compress((source / "large.tar").read_bytes()))
    assert (source / "large.tar").stat().st_size > large_tars.LARGE_TAR_BYTES
    assert encode(source)[0] == 0
    assert [unit.range for unit in plan.read_plan(Folder(str(tmp_path / "c")))] == [None, None]
