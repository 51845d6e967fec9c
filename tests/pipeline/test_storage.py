import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import SourceError, StorageError
from pipeline.listing import list_shards
from pipeline.records import Unit
from pipeline.storage import Folder, absolute, connect, open_stream, read_file_if_there


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty place, on disk and in memory."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def put(root: str, *names: str) -> None:
    for name in names:
        Folder(root).replace(name, name.encode())


def paths(*sources: str, but: str = "nowhere/at/all") -> list[str]:
    return [shard.path for shard in list_shards(sources, {}, but)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data", ["data/0.tar", "data/1.tar", "data/sub/2.tar"]),
        ("data/", ["data/0.tar", "data/1.tar", "data/sub/2.tar"]),
        ("data/*.tar", ["data/0.tar", "data/1.tar"]),
        ("data/{0..1}.tar", ["data/0.tar", "data/1.tar"]),
        ("data/{1,0}.tar", ["data/0.tar", "data/1.tar"]),
        ("data/sub/2.tar", ["sub/2.tar"]),
        ("data/s*/2.tar", ["data/sub/2.tar"]),
        ("data/s*", ["data/sub/2.tar"]),
    ],
)
def test_a_source_is_a_file_a_directory_a_glob_or_a_range(root: str, source: str, expected: list[str]) -> None:
    put(root, "data/0.tar", "data/1.tar", "data/sub/2.tar", "data/.hidden/3.tar", "data/.4.tar")
    assert paths(f"{root}/{source}") == expected


def test_a_name_with_wildcards_in_it_is_itself(root: str) -> None:
    put(root, "a[1]{2/x.jpg")
    assert paths(f"{root}/a[1]{{2") == ["a[1]{2/x.jpg"]


def test_a_cache_inside_its_source_is_left_out(root: str) -> None:
    put(root, "data/0.tar", "data/cache/data/part.parquet")
    assert paths(f"{root}/data", but=f"{root}/data/cache") == ["data/0.tar"]


def test_two_inputs_of_one_path_are_an_error(root: str) -> None:
    put(root, "a/data/0.tar", "b/data/0.tar")
    with pytest.raises(SourceError, match=r"two inputs have the path data/0.tar"):
        paths(f"{root}/a/data", f"{root}/b/data")
    assert paths(f"{root}/a/data", f"{root}/a/data/0.tar") == ["data/0.tar"]


@pytest.mark.parametrize("source", ["no", "no/*.tar", "data/{0..2}.tar"])
def test_a_source_that_is_not_there_is_named(root: str, source: str) -> None:
    put(root, "data/0.tar", "data/1.tar")
    with pytest.raises(SourceError, match="there is no source at .*/" + source.split("/")[0]):
        paths(f"{root}/{source}")


def test_of_many_creators_one_wins_and_the_content_is_whole(root: str) -> None:
    folder, won = Folder(root), []
    barrier = threading.Barrier(16)

    def create(number: int) -> None:
        barrier.wait()
        if folder.create("data/x", bytes([number]) * 100_000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert folder.read("data/x") == bytes(won) * 100_000
    assert folder.names("data") == ["x"]
    assert folder.names("_tmp") == []


def test_replace_writes_over_and_leaves_nothing_else(root: str) -> None:
    folder = Folder(root)
    folder.replace("a/b", b"1")
    folder.replace("a/b", b"2")
    assert folder.read("a/b") == b"2"
    assert folder.names("a") == ["b"]
    if not root.startswith("memory"):
        assert [path.name for path in Path(root, "a").iterdir()] == ["b"]


def test_what_is_not_there(root: str) -> None:
    folder = Folder(f"{root}/none")
    assert (folder.names("x"), folder.is_empty(), folder.read_if_there("x")) == ([], True, None)
    with pytest.raises(StorageError, match=r"cannot read .*/none/x: no such file or directory"):
        folder.read("x")
    assert read_file_if_there(f"{root}/none/x", {}, 10) is None


def planned(size: int) -> Unit:
    return Unit(name="u", kind="tar", url="", path="", bytes=size)


def test_a_stream_of_another_size_is_an_error(root: str) -> None:
    put(root, "abc")
    with open_stream(f"{root}/abc", {}, planned(3)) as stream:
        assert stream.read() == b"abc"
    with (
        pytest.raises(SourceError, match="has changed since it was planned"),
        open_stream(f"{root}/abc", {}, planned(4)),
    ):
        pass


@pytest.mark.parametrize("write", [Folder.create, Folder.replace], ids=["create", "replace"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, write: Callable[..., object]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*/file/c/x: not a directory"):
        write(Folder(str(tmp_path / "file/c")), "x", b"")


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b") == str(tmp_path / "b")
    assert absolute("s3://bucket/x") == "s3://bucket/x"


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match="cannot reach nonsense://x"):
        connect("nonsense://x", {})


@pytest.mark.parametrize("seeking", [False, True])
def test_a_file_that_is_rewritten_while_it_is_read_is_reported(tmp_path: Path, seeking: bool) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b"before")
    unit = Unit(name="u", kind="tar", url=str(path), path="s.tar", bytes=6)
    with open_stream(str(path), {}, unit, seeking) as stream:
        assert stream.read(6) == b"before"
    with (
        pytest.raises(SourceError, match=r"s\.tar has changed while it was read"),
        open_stream(str(path), {}, unit, seeking) as stream,
    ):
        stream.read(3)
        path.write_bytes(b"after!")
        os.utime(path, (1, 1))
