"""Folders on disk and in memory: create, replace, list and read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.folder import Folder
from pipeline.storage.reading import read_file_if_exists
from tests.pipeline.storage.concurrent_writers import winners


def test_one_of_many_creators_wins_with_its_whole_content(root: str) -> None:
    folder = Folder(root)
    won = winners(folder)
    assert len(won) == 1
    assert folder.read("data/x") == bytes(won) * 100_000
    assert folder.list_files("data") == ["x"]
    assert folder.list_files("_tmp") == []


def test_replace_overwrites_and_leaves_no_other_file(root: str) -> None:
    folder = Folder(root)
    folder.replace("a/b", b"1")
    folder.replace("a/b", b"2")
    assert folder.read("a/b") == b"2"
    assert folder.list_files("a") == ["b"]
    if not root.startswith("memory"):
        assert [path.name for path in Path(root, "a").iterdir()] == ["b"]


def test_missing_files_and_folders(root: str) -> None:
    folder = Folder(f"{root}/none")
    assert (folder.list_files("x"), folder.is_empty(), folder.read_if_exists("x")) == ([], True, None)
    with pytest.raises(StorageError, match=r"cannot read .*/none/x: no such file or directory"):
        folder.read("x")
    assert read_file_if_exists(f"{root}/none/x", {}, 10) is None


def test_names_are_iterated_without_hidden_files_folders_and_broken_links(root: str) -> None:
    folder = Folder(root)
    for name in ("data/b", "data/a", "data/.hidden", "data/below/c"):
        folder.replace(name, b"1")
    if not root.startswith("memory"):
        for name, target in (("link", "a"), ("broken", "none"), ("loop", "loop"), ("folder", "below")):
            Path(root, "data", name).symlink_to(target)
    links = [] if root.startswith("memory") else ["link"]
    assert sorted(folder.iterate_names("data")) == ["a", "b", *links] == folder.list_files("data")
    assert list(folder.iterate_names("none")) == []


@pytest.mark.parametrize("write", [Folder.create, Folder.replace], ids=["create", "replace"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, write: Callable[..., object]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*/file/c/x: not a directory"):
        write(Folder(str(tmp_path / "file/c")), "x", b"")


def test_slices_and_prefixes_of_a_folder(root: str) -> None:
    folder, content = Folder(root), bytes(range(256))
    folder.replace("data/a-1", content)
    folder.replace("data/ab-1", b"")
    slices = [(0, None), (0, 10), (250, 300), (-10, None), (-300, None), (256, 300)]
    read = [folder.read_slice("data/a-1", start, end) for start, end in slices]
    assert read == [content[slice(*each)] for each in slices]
    assert (folder.read_slice("data/ab-1", -9), folder.read_slice("data/none", 0, 9)) == (b"", None)
    assert folder.list_files_of("data", "a-") == ["a-1"]
    assert folder.list_files_of("none", "a-") == []
