"""Which small tars become units together, and that such a group never changes."""

import os
from pathlib import Path

import pytest

from pipeline.cache import plan
from pipeline.records import ListedFile, Unit
from pipeline.sources import units
from pipeline.sources.listing import list_sources
from pipeline.sources.sidecars import NO_METADATA, MetadataIndex
from pipeline.sources.units import GROUP_BYTES, SMALL_TAR_BYTES, TARS_PER_GROUP, group_small_tars, make_units
from pipeline.storage.folder import Folder


def tar(path: str, size: int = 1000, root: str = "/disk/s") -> ListedFile:
    return ListedFile(root=root, path=path, bytes=size, etag=f"m{size}")


def tars(count: int, size: int = 1000, first: int = 0) -> list[ListedFile]:
    return [tar(f"s/{number:05d}.tar", size) for number in range(first, first + count)]


def sizes(files: list[ListedFile], metadata: MetadataIndex = NO_METADATA) -> list[int]:
    return [len(group) for group in group_small_tars(files, metadata)]


def extend(cache: Folder, *sources: Path) -> tuple[list[Unit], list[str]]:
    listing = list_sources([str(source) for source in sources], {}, cache.url)
    return plan.extend_plan(cache, listing.files, listing.sources, group_tars=True)


def write(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:05d}.tar").write_bytes(bytes(10 + number))


def test_tars_fill_groups_by_their_number_or_their_size() -> None:
    assert sizes(tars(TARS_PER_GROUP - 1)) == [], "a few tars are left to many workers"
    assert sizes(tars(2 * TARS_PER_GROUP + 5)) == [TARS_PER_GROUP] * 2
    assert sizes(tars(9, SMALL_TAR_BYTES)) == [GROUP_BYTES // SMALL_TAR_BYTES] * 2
    assert sizes(tars(100, SMALL_TAR_BYTES + 1)) == []


def test_large_tars_and_other_files_between_small_ones_are_left_out() -> None:
    files = tars(TARS_PER_GROUP)
    files[5:5] = [tar("s/00004x.tar", 1 << 30), tar("s/00004x.tar.zip"), tar("s/00004y.parquet"), tar("s/00004z.jpg")]
    files[20] = tar("s/00016.tar.gz")
    files[21] = tar("s/00017.tgz")
    (group,) = group_small_tars(files, NO_METADATA)
    others = {"s/00004x.tar", "s/00004x.tar.zip", "s/00004y.parquet", "s/00004z.jpg"}
    assert [file.path for file in group] == [file.path for file in files if file.path not in others]
    made = make_units(files, tar_groups=[group])
    assert [(unit.kind, unit.path) for unit in made] == [
        ("tars", "s"),
        ("tar", "s/00004x.tar"),
        ("zip", "s/00004x.tar.zip"),
        ("parquet", "s/00004y.parquet"),
        ("folder", "s"),
    ]
    assert made[0].paths == tuple(file.path for file in group) and made[0].bytes == 1000 * TARS_PER_GROUP
    assert made[0].url == "/disk/s"


def test_groups_end_with_a_source_and_with_other_metadata() -> None:
    half = TARS_PER_GROUP // 2
    other_source = [tar(f"t/{number:05d}.tar", root="/disk/t") for number in range(half)]
    assert sizes([*tars(half), *other_source]) == []
    in_folders = [tar(f"s/{folder}/{number:05d}.tar") for folder in "ab" for number in range(half)]
    assert sizes(in_folders) == [TARS_PER_GROUP], "a million tars may be in many folders"
    table = tar("s/b/metadata.csv")
    assert sizes(in_folders, MetadataIndex(for_tars={table.path: table})) == []


def test_groups_stay_as_they_are_if_tars_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "TARS_PER_GROUP", 4)
    cache, source = Folder(str(tmp_path / "c")), tmp_path / "s"
    write(source, 5, first=10)
    planned, _ = extend(cache, source)
    assert [(unit.kind, len(unit.paths)) for unit in planned] == [("tars", 4), ("tar", 0)]
    assert extend(cache, source) == (planned, [])
    write(source, 6)
    added, notes = extend(cache, source)
    assert (added[:2], notes) == (planned, [])
    assert [(unit.kind, len(unit.paths)) for unit in added[2:]] == [("tars", 4), ("tar", 0), ("tar", 0)]
    paths = [path for unit in added for path in unit.paths or (unit.path,)]
    assert sorted(paths) == sorted(f"s/{path.name}" for path in source.iterdir())
    assert plan.read_plan(cache) == added


def test_changed_and_missing_tars_of_a_group_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "TARS_PER_GROUP", 4)
    cache, source = Folder(str(tmp_path / "c")), tmp_path / "s"
    write(source, 4)
    (planned,), _ = extend(cache, source)
    (source / "00001.tar").write_bytes(bytes(99))
    (source / "00002.tar").rename(tmp_path / "away.tar")
    (group,), notes = extend(cache, source)
    assert (group.name, group.paths) == (planned.name, planned.paths), "its parts keep their names"
    assert group.bytes == planned.bytes + 99 - 11
    assert [note.partition(";")[0] for note in notes] == [
        "inputs that have changed since they were planned: 1 (s/00001.tar)",
        "planned inputs that are missing: 1 (s/00002.tar)",
    ]
    assert "planned again" in notes[0]
    (tmp_path / "away.tar").rename(source / "00002.tar")
    assert extend(cache, source) == ([group], [])
    cache.create(f"data/{group.name}-00000.parquet", b"")
    os.utime(source / "00003.tar", ns=(5, 5))
    (same,), (note,) = extend(cache, source)
    assert same == group and "partly encoded" in note


def test_a_source_of_groups_can_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "TARS_PER_GROUP", 2)
    cache = Folder(str(tmp_path / "c"))
    write(tmp_path / "s", 2)
    (planned,), _ = extend(cache, tmp_path / "s")
    (tmp_path / "new").mkdir()
    (tmp_path / "s").rename(tmp_path / "new/s")
    (moved,), (note,) = extend(cache, tmp_path / "new/s")
    assert (moved.name, moved.root) == (planned.name, f"{tmp_path}/new/s") and "has moved" in note


def test_images_and_metadata_beside_groups_are_no_part_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with the name of a tar is new, and a Parquet file with it is the tar's metadata, as before."""
    monkeypatch.setattr(units, "TARS_PER_GROUP", 2)
    cache, source = Folder(str(tmp_path / "c")), tmp_path / "s"
    write(source, 2)
    extend(cache, source)
    (source / "00000.jpg").write_bytes(b"image")
    (source / "00001.parquet").write_bytes(b"table")
    added, notes = extend(cache, source)
    assert ([unit.kind for unit in added], notes) == (["tars", "folder"], [])
    sizes = plan.read_unit_sizes(cache)
    assert (sizes.images, sizes.image_bytes, sorted(sizes.bytes.to_pylist())) == (1, 5, [5, 21])
