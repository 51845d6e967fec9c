"""Files that are read from storage: missing, unreadable, and changed files."""

import os
from pathlib import Path

import pytest

from pipeline.errors import Rejected, SourceError, StorageError
from pipeline.records import Unit
from pipeline.storage.folder import Folder
from pipeline.storage.reading import check_has_files, open_stream, read_file_if_exists


def put(root: str, *names: str) -> None:
    for name in names:
        Folder(root).replace(name, name.encode())


def test_a_path_on_disk_that_cannot_be_a_text_is_a_missing_file(tmp_path: Path) -> None:
    put(str(tmp_path), "file")
    (tmp_path / "dir.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for name in ("dir.txt", "loop.txt", "file/x.txt", "x" * 300):
        assert read_file_if_exists(f"{tmp_path}/{name}", {}, 10) is None


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_without_permission_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_folder: bool
) -> None:
    def refuse(self: object, path: str, mode: str, **options: object) -> None:
        raise PermissionError(13, "no")

    for kind in ("local.LocalFileSystem", "memory.MemoryFileSystem"):
        monkeypatch.setattr(f"fsspec.implementations.{kind}.open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: not whole_folder)
    with pytest.raises(
        StorageError if whole_folder else Rejected, match="permission denied" if whole_folder else "unreadable"
    ):
        read_file_if_exists(f"{tmp_path}/x.jpg", {}, 10)
    with pytest.raises(StorageError, match="permission denied"):
        read_file_if_exists("memory://x/x.jpg", {}, 10)


def test_a_directory_without_files_is_missing(root: str) -> None:
    put(root, "data/a.jpg")
    check_has_files(f"{root}/data", {})
    for name in ("none", "data/a.jpg/b"):
        with pytest.raises(SourceError, match=f"{name} is missing or empty"):
            check_has_files(f"{root}/{name}", {})
    if not root.startswith("memory"):
        Path(root, "empty").mkdir()
        with pytest.raises(SourceError, match="empty is missing or empty"):
            check_has_files(f"{root}/empty", {})


def make_unit(size: int) -> Unit:
    return Unit(name="u", kind="tar", path="", bytes=size)


def test_a_stream_with_another_size_is_an_error(root: str) -> None:
    put(root, "abc")
    with open_stream(f"{root}/abc", {}, make_unit(3)) as stream:
        assert stream.read() == b"abc"
    with (
        pytest.raises(SourceError, match="has changed since it was planned"),
        open_stream(f"{root}/abc", {}, make_unit(4)),
    ):
        pass


@pytest.mark.parametrize("seeking", [False, True])
def test_a_file_that_is_rewritten_while_it_is_read_is_reported(tmp_path: Path, seeking: bool) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b"before")
    unit = Unit(name="u", kind="tar", path="s.tar", bytes=6)
    with open_stream(str(path), {}, unit, seeking) as stream:
        assert stream.read(6) == b"before"
    with (
        pytest.raises(SourceError, match=r"s\.tar changed while it was being read"),
        open_stream(str(path), {}, unit, seeking) as stream,
    ):
        stream.read(3)
        path.write_bytes(b"after!")
        os.utime(path, (1, 1))
