from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.cache import plan
from pipeline.errors import CacheError, SourceError
from pipeline.records import ListedFile, Unit
from pipeline.sources.units import RANGE_BYTES, UNIT_BYTES, count_other_files, make_units
from pipeline.storage.folder import Folder
from tests.listed_files import list_source_files


def shard(path: str, root: str = "/disk/data", size: int = 1) -> ListedFile:
    return ListedFile(root=root, path=path, bytes=size, etag="")


def test_the_name_of_a_tar_unit_does_not_depend_on_its_location() -> None:
    local, remote = (make_units([shard("data/00 0?.tar", root)])[0] for root in ("/disk/data", "s3://bucket/data"))
    assert local.name == remote.name
    assert local.name.startswith("00_0-")
    assert len(local.name) == len("00_0-") + 16
    assert local.name != make_units([shard("other/00 0?.tar")])[0].name


def test_folder_units_have_up_to_256_images() -> None:
    units = make_units([shard(f"data/{n:04}.jpg") for n in range(600)])
    assert [len(unit.paths) for unit in units] == [256, 256, 88]
    assert {unit.kind for unit in units} == {"folder"}
    assert len({unit.name for unit in units}) == 3


def test_folder_units_have_up_to_1_gib() -> None:
    sizes = [UNIT_BYTES // 2, UNIT_BYTES // 2, 1, 2 * UNIT_BYTES, 1, UNIT_BYTES - 1]
    units = make_units([shard(f"data/{n}.jpg", size=size) for n, size in enumerate(sizes)])
    assert [len(unit.paths) for unit in units] == [2, 1, 1, 2]
    assert [unit.bytes for unit in units] == [UNIT_BYTES, 1, 2 * UNIT_BYTES, UNIT_BYTES]


def test_images_with_the_same_stem_stay_in_one_unit() -> None:
    names = [f"data/{n:04}.jpg" for n in range(255)] + ["data/0255.jpg", "data/0255.png"]
    units = make_units([shard(name) for name in names])
    assert [len(unit.paths) for unit in units] == [255, 2]
    large = make_units([shard(f"data/{name}", size=UNIT_BYTES // 2) for name in ("a.jpg", "b.jpg", "b.png")])
    assert [len(unit.paths) for unit in large] == [1, 2]


def test_other_files_are_skipped() -> None:
    assert make_units([shard("data/a.txt"), shard("data/a_stats.json")]) == []


def test_other_files_and_unused_texts_are_counted(tmp_path: Path) -> None:
    shards = [
        shard(f"data/{name}") for name in ("a.jpg", "a.txt", "b.TXT", "c.Json", "d.npy", "e.NPY", "f.JPG", "g.\x1b")
    ]
    assert count_other_files(shards) == {"npy": 2, "\\x1b": 1}
    assert count_other_files(shards, ("npy",)) == {"\\x1b": 1}
    _, (line,) = plan.extend_plan(Folder(str(tmp_path)), shards)
    assert line.startswith("texts that belong to no image")
    assert line.endswith(": 2 (data/b.TXT, data/c.Json)")


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    units = make_units([shard("data/0.tar", size=7), shard("data/1.jpg", size=3)])
    assert plan.write_plan_file(cache, 0, units)
    assert plan.read_plan(cache) == units
    assert not plan.write_plan_file(cache, 0, [])


def test_a_plan_is_append_only(tmp_path: Path) -> None:
    cache, source = Folder(str(tmp_path / "c")), tmp_path / "data"
    source.mkdir()
    (source / "0.tar").write_bytes(b"x")

    def extend() -> tuple[list[Unit], list[str]]:
        return plan.extend_plan(cache, list_source_files((str(source),), {}, cache.url))

    first, _ = extend()
    assert extend() == (first, [])
    (source / "1.tar").write_bytes(b"y")
    (source / "0.tar").write_bytes(b"changed")
    units, notes = extend()
    assert [unit.path for unit in units] == ["data/0.tar", "data/1.tar"]
    assert (units[0].name, units[0].bytes) == (first[0].name, 7)
    assert cache.list_files("_plan") == ["00000.parquet", "00001.parquet"]
    assert plan.read_plan(cache) == units
    assert notes == [
        "inputs that have changed since they were planned: 1 (data/0.tar); none of their samples are encoded yet, and "
        "they are planned again"
    ]


def test_the_second_of_two_planners_reads_the_plan_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, shards = Folder(str(tmp_path)), [shard("data/0.tar")]
    original = plan.read_plan_files
    calls = []

    def read_then_lose(folder: Folder, names: Sequence[str]) -> list[Unit]:
        units = original(folder, names)
        if not calls:
            plan.write_plan_file(cache, 0, make_units(shards))  # another run is faster
        calls.append(units)
        return units

    monkeypatch.setattr(plan, "read_plan_files", read_then_lose)
    units, _ = plan.extend_plan(cache, shards)
    assert [unit.path for unit in units] == ["data/0.tar"]
    assert cache.list_files("_plan") == ["00000.parquet"]


def test_a_new_image_with_a_planned_stem_is_noted_and_skipped(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    plan.extend_plan(cache, [shard("data/a.jpg")])
    units, notes = plan.extend_plan(cache, [shard("data/a.jpg"), shard("data/a.png")])
    assert len(units) == 1
    assert "skipped: 1 (data/a.png); the cache has another image with the same name" in notes[0]


def test_a_changed_image_is_noted(tmp_path: Path) -> None:
    cache, images = Folder(str(tmp_path)), [shard(f"data/{n}.jpg") for n in range(3)]
    first, _ = plan.extend_plan(cache, images)
    cache.create(f"_commits/{first[0].name}.json", b"{}")
    assert plan.extend_plan(cache, images) == (first, [])
    assert plan.extend_plan(cache, images[:2]) == (first, []), "only a part of the source is listed"
    images[1] = shard("data/1.jpg", size=2)
    units, (line,) = plan.extend_plan(cache, images)
    assert units == first
    assert line == (
        "inputs that have changed since they were planned: 1 (data/1.jpg); the cache still holds the old version; to "
        "encode the new version, use another --to"
    )


def test_a_plan_with_a_missing_file_is_extended_at_its_end(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    for number in range(3):
        plan.extend_plan(cache, [shard(f"data/{n}.tar") for n in range(number + 1)])
    (tmp_path / "_plan/00000.parquet").unlink()
    units, _ = plan.extend_plan(cache, [shard(f"data/{n}.tar") for n in range(4)])
    assert cache.list_files("_plan") == ["00001.parquet", "00002.parquet", "00003.parquet"]
    assert sorted(unit.path for unit in units) == [f"data/{n}.tar" for n in range(4)]


def test_a_directory_with_the_name_of_a_plan_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "_plan/00000.parquet").mkdir(parents=True)
    with pytest.raises(CacheError, match=r"00000.parquet exists but is not a regular file; move it away"):
        plan.extend_plan(Folder(str(tmp_path)), [shard("data/0.tar")])


def test_a_damaged_plan_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "_plan").mkdir()
    (tmp_path / "_plan/00000.parquet").write_bytes(b"no plan")
    with pytest.raises(CacheError, match=r"00000.parquet cannot be read as a plan"):
        plan.read_plan(Folder(str(tmp_path)))


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the source is empty"):
        plan.extend_plan(Folder(str(tmp_path)), [])


def test_the_size_of_a_parquet_file_decides_its_ranges() -> None:
    units = make_units([shard("data/a.parquet", size=3 * RANGE_BYTES["parquet"] - 1), shard("data/b.parquet", size=10)])
    assert [(unit.path, unit.range) for unit in units] == [
        *(("data/a.parquet", (k, 3)) for k in range(3)),
        ("data/b.parquet", (0, 1)),
    ]
    assert len({unit.name for unit in units}) == 4
    assert sum(unit.input_bytes for unit in units) == pytest.approx(3 * RANGE_BYTES["parquet"] + 10, abs=4)


def test_a_parquet_file_beside_a_tar_of_the_same_name_is_metadata(tmp_path: Path) -> None:
    shards = [shard(f"data/0.{kind}") for kind in ("tar", "parquet")] + [shard("data/0_stats.json")]
    assert [unit.kind for unit in make_units(shards)] == ["tar"]
    plan.extend_plan(Folder(str(tmp_path)), shards[:1])
    units, notes = plan.extend_plan(Folder(str(tmp_path)), [*shards, shard("data/1.parquet")])
    assert [unit.path for unit in units] == ["data/0.tar", "data/1.parquet"]
    assert notes == []


def test_a_changed_parquet_file_is_noted(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    first, _ = plan.extend_plan(cache, [shard("data/a.parquet")])
    cache.create(f"_commits/{first[0].name}.json", b"{}")
    units, (line,) = plan.extend_plan(cache, [shard("data/a.parquet", size=2)])
    assert units == first
    assert "planned: 1 (data/a.parquet); the cache still holds the old version" in line
