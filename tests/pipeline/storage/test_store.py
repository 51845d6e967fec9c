import os
import shlex
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from latentmill.stream import name_url_in_errors
from pipeline.errors import Rejected, SourceError, StorageError
from pipeline.records import Unit
from pipeline.sources.listing import list_shards, list_sources
from pipeline.storage.connection import connect, make_absolute
from pipeline.storage.folder import Folder
from pipeline.storage.reading import check_has_files, open_stream, read_file_if_exists
from tests.pipeline.storage.concurrent_writers import winners


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty folder, on disk and in memory."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}"


def put(root: str, *names: str) -> None:
    for name in names:
        Folder(root).replace(name, name.encode())


def list_paths(*sources: str, exclude: str = "nowhere/at/all", notes: list[str] | None = None) -> list[str]:
    return [shard.path for shard in list_shards(sources, {}, exclude, notes)]


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
    assert list_paths(f"{root}/{source}") == expected


def test_an_existing_name_with_wildcards_is_not_a_glob(root: str) -> None:
    put(root, "a[1]{2/x.jpg")
    assert list_paths(f"{root}/a[1]{{2") == ["a[1]{2/x.jpg"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/*.jpg", ["a.JPG.Txt", "a.jpg", "a.txt", "b.jpg", "b.jpg.json"]),
        ("data/a.jpg", ["a.JPG.Txt", "a.jpg", "a.txt"]),
        ("data/{b,a}.jpg", ["a.JPG.Txt", "a.jpg", "a.txt", "b.jpg", "b.jpg.json"]),
        ("data/**/*.jpg", ["a.JPG.Txt", "a.jpg", "a.txt", "b.jpg", "b.jpg.json", "sub/c.jpg", "sub/c.txt"]),
        ("data/?.tar", ["0.tar"]),
    ],
)
def test_texts_beside_the_named_images_are_listed(root: str, source: str, expected: list[str]) -> None:
    put(root, "data/a.jpg", "data/a.txt", "data/b.jpg", "data/b.jpg.json", "data/a.png", "data/c.txt", "data/a.JPG.Txt")
    put(root, "data/sub/c.jpg", "data/sub/c.txt", "data/0.tar", "data/0.txt", "data/b.txt/d.txt")
    assert list_paths(f"{root}/{source}") == [f"data/{name}" for name in expected]


def test_texts_are_listed_in_a_folder_with_wildcards_in_its_name(root: str) -> None:
    put(root, "a[1]/x.jpg", "a[1]/x.txt")
    assert list_paths(f"{root}/a[1]/x.jpg") == ["a[1]/x.jpg", "a[1]/x.txt"]


def test_two_colons_are_part_of_a_name(root: str) -> None:
    """fsspec would interpret them as a chain of filesystems, and read another file."""
    put(root, "data/a.jpg", "data/a.jpg::x.jpg", "data/b::c.tar")
    shards = list_shards((f"{root}/data",), {}, "nowhere")
    assert [shard.path for shard in shards] == ["data/a.jpg", "data/a.jpg::x.jpg", "data/b::c.tar"]
    for shard in shards:
        assert read_file_if_exists(f"{shard.root}/{shard.path.split('/', 1)[1]}", {}, 99) == shard.path.encode()
        assert read_file_if_exists(shard.url, {}, 99) == shard.path.encode()
    assert connect("s3://bucket/a::b.jpg", {})[1] == "bucket/a::b.jpg"
    with pytest.raises(StorageError, match="cannot reach simplecache::s3://b/x"):
        connect("simplecache::s3://b/x", {})


def test_entries_that_are_not_files_are_noted_and_skipped(tmp_path: Path) -> None:
    put(str(tmp_path), "data/a.jpg", "data/dir.jpg/b.jpg")
    os.mkfifo(tmp_path / "data/pipe\n.jpg")
    notes: list[str] = []
    assert list_paths(f"{tmp_path}/data", notes=notes) == ["data/a.jpg", "data/dir.jpg/b.jpg"]
    kinds = "special files (pipes and the like) and links to folders that contain the source"
    assert notes == [f"skipped {kinds}: {tmp_path}/data/pipe\\n.jpg"]
    assert list_paths(f"{tmp_path}/data/*.jpg") == ["data/a.jpg", "data/dir.jpg/b.jpg"]


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(str(tmp_path), "data/a.jpg", "data/closed/b.jpg", "data/lost+found/c.jpg")
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if path.endswith(("closed", "lost+found")):
            raise PermissionError(13, "no")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    notes: list[str] = []
    assert list_paths(f"{tmp_path}/data", notes=notes) == ["data/a.jpg"]
    assert notes == [f"skipped files of the operating system: 1 ({tmp_path}/data/lost+found)"]
    assert list_sources((f"{tmp_path}/data",), {}, "nowhere").unreadable == [str(tmp_path / "data/closed")]
    with pytest.raises(StorageError, match=r"cannot list .*closed: permission denied"):
        list_paths(f"{tmp_path}/data/closed")


def test_links_are_followed_and_no_directory_is_entered_twice(tmp_path: Path) -> None:
    put(str(tmp_path), "data/a/1.jpg", "other/2.jpg", "3.jpg")
    for link, target in {
        "0": "a",
        "b": "../other",
        "c": "../other",
        "a/loop": "../../data",
        "l.jpg": "../3.jpg",
    }.items():
        (tmp_path / "data" / link).symlink_to(target)
    (tmp_path / "data/broken.jpg").symlink_to("nowhere")
    expected = ["data/a/1.jpg", "data/b/2.jpg", "data/broken.jpg", "data/l.jpg"]
    assert list_paths(f"{tmp_path}/data") == expected
    assert list_paths(f"{tmp_path}/data/*") == expected
    assert list_paths(f"{tmp_path}/data/b/*.jpg") == ["b/2.jpg"]
    assert list_paths(f"{tmp_path}/data/*/2.jpg") == ["data/b/2.jpg"]
    (tmp_path / "data/up").symlink_to(tmp_path)
    notes: list[str] = []
    assert list_paths(f"{tmp_path}/data", notes=notes) == expected
    assert notes[0].endswith(": " + str(tmp_path / "data/up"))


def test_a_cache_in_a_source_that_is_a_link_is_skipped(tmp_path: Path) -> None:
    put(str(tmp_path), "photos/a.jpg", "photos/cache/data/part.parquet")
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "photos/b").symlink_to("cache/data")
    for source in ("link", "link/*", "link/cache/data/*.parquet", "link/cache"):
        if "cache" in source:
            with pytest.raises(SourceError, match="there are no files in"):
                list_paths(f"{tmp_path}/{source}", exclude=f"{tmp_path}/photos/cache")
        else:
            assert list_paths(f"{tmp_path}/{source}", exclude=f"{tmp_path}/photos/cache") == ["link/a.jpg"]


def test_a_shard_whose_name_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"d\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"d\xe9") / "0.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=r"the name of .*/d\\xe9/0.tar is not UTF-8; rename the file"):
        list_paths(str(tmp_path))
    with pytest.raises(SourceError, match=r"the name of .*/d\\xe9/0.tar is not UTF-8; rename the file"):
        list_paths(str(tmp_path / os.fsdecode(b"d\xe9")))


def test_a_cache_inside_its_source_is_skipped(root: str) -> None:
    put(root, "data/0.tar", "data/cache/data/part.parquet")
    assert list_paths(f"{root}/data", exclude=f"{root}/data/cache") == ["data/0.tar"]


def test_two_sources_with_one_name_are_an_error_with_a_suggestion(root: str) -> None:
    put(root, "a/data/0.tar", "b/data/0.tar", "b/data/1.tar")
    for second in ("b/data", "b/data/1.tar", "b/data/*.tar"):
        with pytest.raises(SourceError, match="two sources have the name data: ") as error:
            list_paths(f"{root}/a/data", f"{root}/{second}")
        argument = shlex.split(str(error.value).rpartition("give one of them another: ")[2])[0]
        assert "data2/1.tar" in list_paths(f"{root}/a/data", argument)
    assert list_paths(f"{root}/a/data", f"{root}/a/data/0.tar") == ["data/0.tar"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [("no", "/no does not exist"), ("no/*.tar", "no file matches "), ("{no,data}", "does not exist")],
)
def test_the_reason_for_a_missing_source_is_named(root: str, source: str, reason: str) -> None:
    put(root, "data/0.tar")
    with pytest.raises(SourceError, match=reason):
        list_paths(f"{root}/{source}")


def test_missing_credentials_are_named() -> None:
    with pytest.raises(StorageError) as raised, name_url_in_errors("s3://bucket/x", "list"):
        raise NoCredentialsError
    assert str(raised.value) == (
        "cannot list s3://bucket/x: no credentials (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use storage "
        "options: --storage-option key=env:NAME and secret=env:NAME, or anon=true for a public bucket)"
    )


@pytest.mark.parametrize("source", ["no", "no/*.tar", "data/{0..2}.tar"])
def test_a_missing_source_is_named(root: str, source: str) -> None:
    put(root, "data/0.tar", "data/1.tar")
    with pytest.raises(SourceError, match="there is no source at .*/" + source.split("/")[0]):
        list_paths(f"{root}/{source}")


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
    return Unit(name="u", kind="tar", url="", path="", bytes=size)


def test_a_stream_with_another_size_is_an_error(root: str) -> None:
    put(root, "abc")
    with open_stream(f"{root}/abc", {}, make_unit(3)) as stream:
        assert stream.read() == b"abc"
    with (
        pytest.raises(SourceError, match="has changed since it was planned"),
        open_stream(f"{root}/abc", {}, make_unit(4)),
    ):
        pass


@pytest.mark.parametrize("write", [Folder.create, Folder.replace], ids=["create", "replace"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, write: Callable[..., object]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*/file/c/x: not a directory"):
        write(Folder(str(tmp_path / "file/c")), "x", b"")


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_absolute("a/../b") == str(tmp_path / "b")
    assert make_absolute("s3://bucket/x") == "s3://bucket/x"


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
        pytest.raises(SourceError, match=r"s\.tar changed while it was being read"),
        open_stream(str(path), {}, unit, seeking) as stream,
    ):
        stream.read(3)
        path.write_bytes(b"after!")
        os.utime(path, (1, 1))
