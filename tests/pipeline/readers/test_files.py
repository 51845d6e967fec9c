"""Files of a folder, read as they were planned."""

import os
import shutil
import uuid
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import SourceError, StorageError
from pipeline.limits import Limits
from pipeline.readers.files import read_planned_file
from pipeline.readers.folder import read_folder_unit
from pipeline.readers.image_files import unpack_files
from pipeline.records import PlannedFile, Reject, Sample, Unit
from pipeline.sources import units
from pipeline.storage.folder import Folder
from tests.listed_files import list_source_files


def plan_files(root: str, **files: bytes) -> Unit:
    """Write files to a folder `data`, and return its unit. In the names, `_` stands for the dot."""
    for name, data in files.items():
        Folder(f"{root}/data").replace(name.replace("_", "."), data)
    (unit,) = units.make_units(list_source_files((f"{root}/data",), {}, "nowhere"))
    return unit


def read(unit: Unit, may_differ: Container[int] = ()) -> list[Sample | Reject]:
    return list(read_folder_unit(unit, {}, may_differ=may_differ))


def change(root: str, name: str, data: bytes) -> None:
    Folder(f"{root}/data").replace(name, data)


def copy(root: str, name: str, data: bytes) -> None:
    """Write a file to the folder `other`. On disk, it has the time of the file in `data`."""
    Folder(f"{root}/other").replace(name, data)
    if "://" not in root:
        shutil.copystat(f"{root}/data/{name}", f"{root}/other/{name}")


def test_a_folder_is_read_as_it_was_planned(root: str) -> None:
    assert read(plan_files(root, a_jpg=b"1", a_txt=b"one", b_jpg=b"", b_json=b"")) == [
        Sample(0, "a", b"1", {"txt": "one", "json": None}),
        Sample(1, "b", b"", {"txt": None, "json": ""}),
    ]


@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
@pytest.mark.parametrize("data", [b"larger than before", b"?", b""])
def test_a_file_with_another_size_fails_its_unit(root: str, name: str, data: bytes) -> None:
    unit = plan_files(root, a_jpg=b"11", a_txt=b"one")
    change(root, name, data)
    with pytest.raises(SourceError, match=rf"data/{name} has changed since it was planned"):
        read(unit)


@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_a_file_on_a_store_that_is_no_longer_empty_fails_its_unit(name: str) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    unit = plan_files(root, a_jpg=b"", a_txt=b"")
    change(root, name, b"?")
    with pytest.raises(SourceError, match=rf"data/{name} has changed since it was planned"):
        read(unit)


def test_a_deleted_text_fails_its_unit(root: str) -> None:
    unit = plan_files(root, a_jpg=b"1", a_txt=b"one", b_jpg=b"2")
    (shorter,) = units.make_units(
        [s for s in list_source_files((f"{root}/data",), {}, "nowhere") if s.path != "data/a.txt"]
    )
    whole = replace(unit, root=f"{root}/other")
    for name, data in (("a.jpg", b"1"), ("b.jpg", b"2")):
        copy(root, name, data)
    with pytest.raises(SourceError, match=r"other/a\.txt was deleted since it was planned, but its image was not"):
        read(whole)
    assert len(read(replace(shorter, root=f"{root}/other"))) == 2


def test_an_image_deleted_with_its_text_is_one_reject(root: str) -> None:
    unit = replace(plan_files(root, a_jpg=b"1", a_txt=b"one", b_jpg=b"2"), root=f"{root}/other")
    copy(root, "b.jpg", b"2")
    missing, present = read(unit)
    assert isinstance(missing, Reject)
    assert (missing.key, missing.reason) == ("a", "no_image")
    assert isinstance(present, Sample)


def test_repaired_files_are_read_as_they_are_now(root: str) -> None:
    unit = plan_files(root, a_jpg=b"1", a_txt=b"\xff", b_jpg=b"2")
    change(root, "a.txt", b"repaired")
    change(root, "b.jpg", b"another")
    samples = read(unit, may_differ=range(2))
    assert [(s.image, s.columns["txt"]) for s in samples if isinstance(s, Sample)] == [
        (b"1", "repaired"),
        (b"another", None),
    ]
    with pytest.raises(SourceError, match=r"b\.jpg has changed since it was planned"):
        read(unit, may_differ={0})


def test_a_text_that_was_deleted_to_repair_its_sample_is_null(tmp_path: Path) -> None:
    unit = plan_files(str(tmp_path), a_jpg=b"1", a_txt=b"\xff")
    (tmp_path / "data/a.txt").unlink()
    (sample,) = read(unit, may_differ=range(2))
    assert isinstance(sample, Sample)
    assert sample.columns == {"txt": None, "json": None}


def test_a_text_that_is_a_broken_link_is_a_reject_until_it_is_repaired(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").symlink_to(tmp_path / "captions")
    unit = plan_files(str(tmp_path), a_jpg=b"1")
    (reject,) = read(unit)
    assert isinstance(reject, Reject)
    assert (reject.key, reject.reason) == ("a", "image_not_embedded")
    (tmp_path / "captions").write_text("here")
    (sample,) = read(unit)
    assert isinstance(sample, Sample)
    assert sample.columns["txt"] == "here"


def test_no_more_than_the_limit_is_read(root: str) -> None:
    unit = plan_files(root, a_jpg=b"x" * 1000, a_txt=b"t" * 100)
    ((files),) = unpack_files(unit)
    assert len(read_planned_file(f"{root}/data/a.jpg", {}, 10, files.image)) == 11
    (reject,) = read_folder_unit(unit, {}, limits=Limits(text_bytes=99))
    assert isinstance(reject, Reject)
    assert reject.reason == "text_too_long"


def test_other_content_of_the_same_size_is_detected_by_its_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    before = PlannedFile("data/a.jpg", 3, f"m{path.stat().st_mtime_ns}")
    assert read_planned_file(str(path), {}, 9, before) == b"old"
    path.write_bytes(b"new")
    os.utime(path, (1, 1))
    with pytest.raises(SourceError, match=r"a\.jpg has changed since it was planned"):
        read_planned_file(str(path), {}, 9, before)


def test_an_incomplete_read_is_a_storage_error(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has its planned size, but the read stops early. The image is neither corrupt nor changed."""
    unit = plan_files(root, a_jpg=b"12345")

    class Short:
        def __enter__(self) -> "Short":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            return b"123"

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", lambda *args, **options: Short())
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", lambda *args, **options: b"123")
    with pytest.raises(StorageError, match=r"cannot read .*data/a\.jpg: only 3 of 5 bytes were delivered"):
        read(unit)
