"""Small tars that are units together: the rows are those of single tars, whatever happens to one of them."""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from jobs.entry import run_guarded
from pipeline.cache import parts, plan
from pipeline.cache.left_out import plan_left_out
from pipeline.cache.part_info import PartInfo
from pipeline.cache.reader import read_rows
from pipeline.formats.part_record import PartRecord
from pipeline.records import Unit
from pipeline.sources import units
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, slow_param, write_tar

Command = Callable[..., tuple[int, str, str]]
TARS, SAMPLES = 30, 3  # of the source; each tar has the same keys
SETTINGS = ("--resolution", "32", "--workers", "0", "--max-reject-rate", "0.3", "--rows-per-part", "5")
BAD = 7  # the tar with an image that is none


def write_source(folder: Path, tars: int = TARS) -> Path:
    """Write tars with equal keys and different images. Two are compressed, one has a broken image, one has none."""
    for number in range(tars):
        members = {
            f"{int(name[:9]) - SAMPLES * number:09d}{name[9:]}": data
            for name, data in img2dataset_members(SAMPLES * number, SAMPLES, height=32, width=32).items()
        }
        if number == BAD:
            members["000000001.jpg"] = b"no image"
        tar = write_tar(folder / f"{number:05d}.tar", {} if number == 11 else members)
        if number in (4, 19):
            (folder / f"{number:05d}.tar.gz").write_bytes(gzip.compress(tar.read_bytes(), mtime=0))
            tar.unlink()
    return folder


@pytest.fixture(scope="module")
def intact_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("intact") / "shards")


@pytest.fixture
def source(intact_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact_source, tmp_path / "shards"))


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let eight tars fill a group: there are three groups, and six tars are left over."""
    monkeypatch.setattr(units, "TARS_PER_GROUP", 8)


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path, tmp_path: Path, small_groups: None) -> Command:
    """Return the encode command for the cache `c`, in this process."""

    def run(source: Path, *argv: object) -> tuple[int, str, str]:
        return latentmill("encode", source, "--to", tmp_path / "c", "--vae", micro_vae, *SETTINGS, *argv)

    return run


@pytest.fixture(scope="module")
def reference(intact_source: Path, micro_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of the intact source, in which each tar is a unit."""
    cache = tmp_path_factory.mktemp("reference") / "c"
    argv = ["encode", str(intact_source), "--to", str(cache), "--vae", str(micro_vae), *SETTINGS]
    assert run_guarded(cli.main, argv) == 0
    assert {unit.kind for unit in read_plan(cache)} == {"tar"}
    return cache


def read_plan(cache: Path) -> list[Unit]:
    return plan.read_plan(Folder(str(cache)))


def iterate_rows(cache: Path) -> Iterator[dict[str, Any]]:
    for path in (cache / "data").iterdir():
        yield from read_rows(Folder(str(cache)), f"data/{path.name}")


def read_sorted_rows(cache: Path) -> list[dict[str, Any]]:
    rows = sorted(iterate_rows(cache), key=lambda row: (row["shard"], row["key"]))
    assert len({(row["shard"], row["key"]) for row in rows}) == len(rows)
    return rows


def read_rejects(cache: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for path in cache.glob("_rejects/*") for line in path.read_text().splitlines()]
    return sorted((line["shard"], line["key"], line["reason"]) for line in lines)


def read_stats(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "stats.json").read_text()))


def check_complete(latentmill: Command, cache: Path, reference: Path) -> None:
    """Check that a cache has the rows, rejects and statistics of the reference, and that its inputs agree."""
    code, out, err = latentmill("verify", cache, "--recount", "--reencode", 9)
    assert (code, err) == (0, ""), out
    assert read_sorted_rows(cache) == read_sorted_rows(reference)
    actual, expected = read_stats(cache), read_stats(reference)
    assert (actual["count"], actual["rejected"]) == (expected["count"], expected["rejected"])
    assert actual["mean"] == pytest.approx(expected["mean"], rel=1e-12)


def test_groups_have_the_rows_of_single_tars(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path
) -> None:
    """Equal keys in several tars, compressed tars, and parts that end within a tar."""
    cache = tmp_path / "c"
    assert encode(source)[0] == 0
    assert [(unit.kind, len(unit.paths)) for unit in read_plan(cache)] == [("tars", 8)] * 3 + [("tar", 0)] * 6
    assert len(list((cache / "data").iterdir())) < len(list((reference / "data").iterdir()))
    assert read_rejects(cache) == read_rejects(reference) == [(f"shards/{BAD:05d}.tar", "000000001", "not_an_image")]
    check_complete(latentmill, cache, reference)


def find_group(cache: Path, tar: int) -> Unit:
    """Return the group that has a tar."""
    return next(unit for unit in read_plan(cache) if any(f"{tar:05d}.tar" in path for path in unit.paths))


def remove_parts(cache: Path, unit: Unit, first: int) -> None:
    """Leave a cache as a run does that is killed before it publishes this part of a unit."""
    for path in [*(cache / "data").glob(f"{unit.name}-*"), *(cache / "_empty").glob(f"{unit.name}-*")]:
        if int(path.stem.rpartition("-")[2]) >= first:
            path.unlink()
    for path in cache.glob(f"_[cr]*/{unit.name}.json*"):
        path.unlink()


def truncate(tar: Path) -> bytes:
    """Cut a tar inside its third image, so that its first sample is readable. Returns its content before."""
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"000000002.jpg") + 700])
    return data


@pytest.mark.slow
@pytest.mark.parametrize("tars", [(0,), (7, 8), (15,), tuple(range(8, 16)), (29,)], ids=str)
def test_a_damaged_tar_is_a_unit_of_its_own_until_it_is_restored(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path, tars: tuple[int, ...]
) -> None:
    """The first, the last, neighbors, a whole group, and a tar that is in no group."""
    cache, intact = tmp_path / "c", {}
    paths = [source / f"{tar:05d}.tar" for tar in tars if tar != 11]
    for path in paths:
        intact[path] = truncate(path)
    code, _, err = encode(source)
    left_out = [f"shards/{path.name}" for path in paths if path.name != "00029.tar"]
    assert code == 3 and ("are read again one by one" in err) == bool(left_out)
    assert sorted(path for unit in read_plan(cache) for path in unit.left_out) == left_out
    assert {reject[0] for reject in read_rejects(cache) if reject[2] == "rest_of_shard"} == {
        f"shards/{path.name}" for path in paths
    }
    missing = {(f"shards/{path.name}", f"{key:09d}") for path in paths for key in (1, 2)}
    rows = {(row["shard"], row["key"]): row for row in read_sorted_rows(reference)}
    assert {(row["shard"], row["key"]) for row in read_sorted_rows(cache)} == rows.keys() - missing
    assert latentmill("verify", cache, "--recount", "--reencode", 9)[0] == 0
    digest = read_stats(cache)["digest"]
    assert encode(source)[0] == 3
    assert read_stats(cache)["digest"] == digest

    for path, data in intact.items():
        path.write_bytes(data)
    code, _, err = latentmill("retry", cache, "--workers", 0)
    assert code == 0, err
    check_complete(latentmill, cache, reference)
    code, _, err = encode(source)
    assert (code, f"planned: {len(paths)} (" in err) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "tar"), [(1, 8), (1, 9), (2, 9), (2, 14), (4, 15)])
def test_a_group_is_resumed_although_a_tar_that_was_not_read_is_damaged_now(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path, first: int, tar: int
) -> None:
    """The tars of existing parts must be readable: their samples have positions. Others are left out.

    Part p has the samples from 5 * p on, and tar t of a group those from 3 * t on; tar 11 has none.
    """
    cache, path = tmp_path / "c", source / f"{tar:05d}.tar"
    assert encode(source)[0] == 0
    group = find_group(cache, tar)
    remove_parts(cache, group, first)
    intact = truncate(path)
    code, _, err = encode(source)
    begin = 3 * (tar - 8 - (tar > 11))
    if begin < 5 * first:
        assert (code, "has changed since it was planned" in err) == (1, True)
        path.write_bytes(intact)
        assert encode(source)[0] == 0
    else:
        assert (code, find_group(cache, tar).left_out) == (1, {f"shards/{path.name}"})
        assert encode(source)[0] == 3, "it is planned again, as it is now"
        path.write_bytes(intact)
        assert latentmill("retry", cache, "--workers", 0)[0] == 0
    check_complete(latentmill, cache, reference)


@pytest.mark.slow
def test_a_lost_part_is_written_again_without_the_tars_that_were_left_out(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path
) -> None:
    """The tar is readable again, but it is a unit of its own now."""
    cache, path = tmp_path / "c", source / "00001.tar"
    intact = truncate(path)
    assert encode(source)[0] == 3
    path.write_bytes(intact)
    assert latentmill("retry", cache, "--workers", 0)[0] == 0
    group, before = find_group(cache, 1), read_stats(cache)["digest"]
    (cache / f"data/{group.name}-00000.parquet").unlink()
    (cache / f"_commits/{group.name}.json").unlink()
    assert encode(source)[0] == 0
    assert read_stats(cache)["digest"] == before
    remove_parts(cache, group, 0)
    assert encode(source)[0] == 0
    assert read_stats(cache)["digest"] == before
    check_complete(latentmill, cache, reference)


@pytest.mark.slow
def test_a_run_that_ended_before_it_planned_a_left_out_tar_is_noticed(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path
) -> None:
    cache, path = tmp_path / "c", source / "00009.tar"
    intact = truncate(path)
    assert encode(source)[0] == 3
    (own,) = [unit for unit in read_plan(cache) if unit.path == "shards/00009.tar"]
    remove_parts(cache, own, 0)
    (cache / "_plan/00001.parquet").unlink()
    for run in cache.glob("_runs/*"):
        run.unlink()
    path.write_bytes(intact)
    code, out, _ = latentmill("verify", cache)
    assert code == 1 and "are not planned as units of their own: 1 (shards/00009.tar)" in out
    assert latentmill("retry", cache, "--workers", 0)[0] == 0, "it reads the group without the tar"
    code, _, err = encode(source)
    assert code == 1 and "has changed since it was planned" in err, "it is planned as it was in the group"
    assert encode(source)[0] == 0
    check_complete(latentmill, cache, reference)


@pytest.mark.parametrize("change", ["touched", slow_param("deleted"), slow_param("another"), slow_param("not a tar")])
def test_a_tar_that_changed_after_it_was_planned_does_not_concern_the_others(
    encode: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cache, path = tmp_path / "c", source / "00009.tar"

    def extend_and_change(*args: Any, **kwargs: Any) -> Any:
        planned = extend(*args, **kwargs)
        if change == "touched":
            os.utime(path, ns=(0, 0))
        elif change == "deleted":
            path.unlink()
        else:
            path.write_bytes((source / "00010.tar").read_bytes() if change == "another" else b"x" * path.stat().st_size)
        return planned

    extend = plan.extend_plan
    with monkeypatch.context() as patch:
        patch.setattr(plan, "extend_plan", extend_and_change)
        code, _, err = encode(source)
    assert (code, "read again one by one: 1 (shards/00009.tar)" in err) == (1, True)
    assert "shards/00009.tar" in err
    others = {f"shards/{file.name}" for file in source.iterdir()} - {"shards/00009.tar", "shards/00011.tar"}
    assert {row["shard"] for row in read_sorted_rows(cache)} == others
    code = {"touched": 0, "another": 0, "deleted": 1, "not a tar": 3}[change]
    assert encode(source)[0] == code
    assert {row["shard"] for row in read_sorted_rows(cache)} == others | (set() if code else {"shards/00009.tar"})


@pytest.mark.slow
def test_a_writer_that_left_out_another_tar_is_noticed(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs encode one group, and only one of them can read a tar. The part that is created first counts."""
    cache, path = tmp_path / "c", source / "00009.tar"
    intact, time = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(intact.replace(b"000000002.jpg", b"x" * 13))  # the checksum of its header does not match
    assert encode(source)[0] == 3
    group = find_group(cache, 9)
    (tmp_path / "c").rename(tmp_path / "other")
    path.write_bytes(intact)
    os.utime(path, ns=(time, time))
    name, publish, published = f"data/{group.name}-00000.parquet", parts.UnitParts.publish, list[str]()

    def publish_second(self: parts.UnitParts, record: PartRecord, rows: Any) -> PartInfo:
        if record.unit == group.name and not published:
            (cache / "data").mkdir(exist_ok=True)  # this may be the first part of all
            shutil.copy(tmp_path / "other" / name, cache / name)
            published.append(name)
        return publish(self, record, rows)

    monkeypatch.setattr(parts.UnitParts, "publish", publish_second)
    code, _, err = encode(source)
    assert (code, published, find_group(cache, 9).left_out) == (0, [name], {"shards/00009.tar"})
    assert "without some tars that this one reads" in err
    check_complete(latentmill, cache, reference)


def test_rows_of_a_tar_that_is_a_unit_of_its_own_are_not_accepted_in_a_group(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    assert encode(source)[0] == 0
    group, folder = find_group(cache, 9), Folder(str(cache))
    plan_left_out(folder, [group], {group.name: {"shards/00009.tar"}})
    code, out, _ = latentmill("verify", cache)
    assert (code, "is from shards/00009.tar, but the part is from shards" in out) == (1, True)


@pytest.mark.slow
def test_originals_of_groups_are_found(encode: Command, latentmill: Command, source: Path, tmp_path: Path) -> None:
    """The same key is in each tar, but each image is drawn beside its own original."""
    assert encode(source)[0] == 0
    code, out, err = latentmill("decode", tmp_path / "c", "--to", tmp_path / "p", "--workers", 0, "--limit", 20)
    assert (code, err) == (0, ""), out
    images = json.loads((tmp_path / "p/report.json").read_text())["images"]
    assert len({image["file"] for image in images}) == 20 < len({(i["shard"], i["key"]) for i in images}) + 1
    assert all(image["psnr"] is not None and (tmp_path / "p" / image["file"]).is_file() for image in images)


@pytest.mark.slow
def test_commits_of_groups_are_rebuilt_and_status_counts_them(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    truncate(source / "00009.tar")
    assert encode(source)[0] == 3
    for folder in ("_commits", "_rejects"):
        for path in (cache / folder).iterdir():
            path.write_bytes(b"{}")
    assert latentmill("verify", cache)[0] == 1
    assert latentmill("verify", cache, "--rebuild")[0] == 0
    assert latentmill("verify", cache, "--recount")[0] == 0
    _, out, _ = latentmill("status", cache, "--json")
    assert json.loads(out)["units"] == {"planned": 10, "done": 10}


@pytest.mark.slow
def test_tars_of_a_webdataset_cache_and_those_with_metadata_are_not_grouped(
    encode: Command, source: Path, tmp_path: Path
) -> None:
    """A part of WebDataset cannot have a key twice, and columns of img2dataset's table are read by tar."""
    assert encode(source, "--format", "webdataset")[0] == 0
    assert {unit.kind for unit in read_plan(tmp_path / "c")} == {"tar"}
    shutil.rmtree(tmp_path / "c")
    pq.write_table(pa.table({"key": ["000000000"], "caption": ["one"]}), source / "00000.parquet")
    assert encode(source)[0] == 0
    assert {unit.kind for unit in read_plan(tmp_path / "c")} == {"tar"}
    shutil.rmtree(tmp_path / "c")
    assert encode(source, "--columns", "txt")[0] == 0, "no column is read from the table"
    assert {unit.kind for unit in read_plan(tmp_path / "c")} == {"tar", "tars"}
