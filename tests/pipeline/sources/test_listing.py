"""The files of sources; names of sources; and files that are no inputs: second paths to one file, own outputs."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import SourceError, StorageError
from pipeline.sources import own_outputs
from pipeline.sources.listing import Listing, list_sources
from pipeline.storage.connection import get_filesystem
from pipeline.storage.folder import Folder
from pipeline.storage.reading import read_file_if_exists
from tests.listed_files import list_source_files

IMAGE = b"x"
UNIT = "photos-0123456789abcdef"
CACHE_JSON = json.dumps({"format": 1, "identity": {}, "identity_sha256": "", "vae": {}}).encode()
REPORT = json.dumps({"made_by": own_outputs.MADE_BY}).encode()


def put(folder: Path | str, *names: str, data: bytes = IMAGE) -> None:
    for name in names:
        Folder(str(folder)).replace(name, data)


def list_inputs(*sources: object) -> Listing:
    return list_sources([str(source) for source in sources], {}, "nowhere/at/all")


def list_paths(*sources: object, exclude: str = "nowhere/at/all", notes: list[str] | None = None) -> list[str]:
    return [file.path for file in list_source_files(tuple(map(str, sources)), {}, exclude, notes)]


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
    for name in ("data/a.jpg", "data/a.jpg::x.jpg", "data/b::c.tar"):
        put(root, name, data=name.encode())
    shards = list_source_files((f"{root}/data",), {}, "nowhere")
    assert [shard.path for shard in shards] == ["data/a.jpg", "data/a.jpg::x.jpg", "data/b::c.tar"]
    for shard in shards:
        assert read_file_if_exists(f"{shard.root}/{shard.path.split('/', 1)[1]}", {}, 99) == shard.path.encode()
        assert read_file_if_exists(shard.url, {}, 99) == shard.path.encode()
    assert get_filesystem("s3://bucket/a::b.jpg", {})[1] == "bucket/a::b.jpg"
    with pytest.raises(StorageError, match="cannot reach simplecache::s3://b/x"):
        get_filesystem("simplecache::s3://b/x", {})


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


@pytest.mark.parametrize("source", ["no", "no/*.tar", "data/{0..2}.tar"])
def test_a_missing_source_is_named(root: str, source: str) -> None:
    put(root, "data/0.tar", "data/1.tar")
    with pytest.raises(SourceError, match="there is no source at .*/" + source.split("/")[0]):
        list_paths(f"{root}/{source}")


def test_a_source_has_its_given_name(tmp_path: Path) -> None:
    put(tmp_path, "dogs/images/a/1.jpg", "dogs/images/2.jpg")
    for source in ("dogs/images", "dogs/images/", "dogs/images/*", "dogs/images/{2.jpg,a}"):
        assert list_paths(f"images2={tmp_path}/{source}") == ["images2/2.jpg", "images2/a/1.jpg"]
    assert list_paths(f"the set={tmp_path}/dogs/images/2.jpg") == ["the set/2.jpg"]
    (source,) = list_inputs(f"images2={tmp_path}/dogs/images/*").sources
    assert (source.name, source.root) == ("images2", f"{tmp_path}/dogs/images")


def test_a_source_on_a_store_can_be_named() -> None:
    put("memory://named", "data/0.tar")
    assert list_paths("b=memory://named/data") == ["b/0.tar"]


def test_an_existing_path_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "year=2024/0.tar", "year=2025/0.tar")
    monkeypatch.chdir(tmp_path)
    assert list_paths("year=2024") == ["year=2024/0.tar"]
    assert list_paths(f"{tmp_path}/year=2024/*.tar") == ["year=2024/0.tar"]
    assert len(list_paths("year={2024,2025}/*.tar")) == len(list_paths("year=*/*.tar")) == 2
    assert list_paths("new=year=2024") == ["new/0.tar"]


@pytest.mark.parametrize("name", ["", ".", "..", "a%b", "a\nb", "a\x1bb"])
def test_a_source_name_must_be_plain(name: str) -> None:
    with pytest.raises(SourceError, match="the name before `=` must not contain"):
        list_inputs(f"{name}=photos")


def test_a_source_without_a_name_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="names no source"):
        list_inputs("a=")
    put("memory://", "zero.tar")
    for source in ("memory://zero.tar", "/"):
        with pytest.raises(SourceError, match="has no name: give it a name, as in NAME="):
            list_inputs(source)
    assert list_paths("m=memory://zero.tar") == ["m/zero.tar"]


@pytest.mark.parametrize(
    ("source", "name"), [("data/./photos", "photos"), ("data//photos/", "photos"), ("data/x/../photos", "photos")]
)
def test_every_spelling_of_a_directory_has_the_same_name(tmp_path: Path, source: str, name: str) -> None:
    put(tmp_path, "data/photos/1.jpg", "data/x/2.jpg")
    (shard,) = list_inputs(
        f"{tmp_path}/{source}", f"file://{tmp_path}/data/photos", tmp_path / "data/photos/1.jpg"
    ).files
    assert (shard.path, shard.url) == (f"{name}/1.jpg", f"{tmp_path}/data/photos/1.jpg")


def test_the_parent_of_a_link_is_the_parent_of_its_target(tmp_path: Path) -> None:
    put(tmp_path, "real/photos/1.jpg", "real/sub/2.jpg", "photos/3.jpg")
    (tmp_path / "link").symlink_to("real/sub")
    assert list_paths(f"{tmp_path}/link/../photos") == ["photos/1.jpg"]


def test_links_to_one_root_are_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "real/photos/1.jpg")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert list_paths(tmp_path / "real/photos", tmp_path / "link/photos", "link/photos/*") == ["photos/1.jpg"]


def test_links_to_files_of_the_same_source_are_skipped_and_counted(tmp_path: Path) -> None:
    put(tmp_path, "data/a.jpg", "data/a.txt", "pool/x.jpg")
    for link, target in {
        "b.jpg": "a.jpg",
        "b.txt": "a.txt",
        "c.jpg": "../pool/x.jpg",
        "d.jpg": "../pool/x.jpg",
    }.items():
        (tmp_path / "data" / link).symlink_to(target)
    os.link(tmp_path / "data/a.jpg", tmp_path / "data/hard.jpg")
    listing = list_inputs(tmp_path / "data")
    assert [shard.path for shard in listing.files] == [
        *("data/a.jpg", "data/a.txt", "data/b.txt", "data/c.jpg", "data/d.jpg", "data/hard.jpg")
    ], "texts stay; several links to one file outside the source are separate files, and so are hard links"
    assert listing.notes == [f"skipped links to files of the same source: 1 ({tmp_path}/data/b.jpg)"]


@pytest.mark.parametrize("root", ["disk", "memory"])
def test_caches_and_previews_in_a_source_are_skipped(root: str, tmp_path: Path) -> None:
    base = str(tmp_path) if root == "disk" else "memory://outputs"
    put(base, "photos/a.jpg", "photos/data/b.jpg", "photos/sheets/c.png", "photos/images/d.png")
    put(base, "photos/latents/cache.json", data=CACHE_JSON)
    put(base, f"photos/latents/data/{UNIT}-00000.parquet", f"photos/latents/data/{UNIT}-00001r1.parquet")
    put(base, "photos/latents/_plan/00000.parquet", "photos/latents/stats.json")
    put(base, "photos/previews/report.json", data=REPORT)
    put(base, f"photos/previews/images/{UNIT}/1.png", "photos/previews/sheets/00000.png", "photos/previews/mine.png")
    put(base, "photos/previews/sheets/64x96-00000.png", f"photos/previews/images/{UNIT}/s%2F1.tar/1.png")
    put(base, "photos/previews/decoded/00000-000.tar", "photos/previews/decoded/00001-002.parquet")
    put(base, "photos/previews/fidelity.parquet/00000.parquet", "photos/previews/_cells/64x96-00000.png")
    listing = list_inputs(f"{base}/photos")
    assert [shard.path.removeprefix("photos/") for shard in listing.files] == [
        *("a.jpg", "data/b.jpg", "images/d.png", "previews/mine.png", "sheets/c.png")
    ]
    cache, previews = listing.notes
    assert cache.endswith("photos/latents: 5")
    assert previews.endswith("photos/previews: 9")
    assert list_paths(f"{base}/photos/*/*.png") == [
        "photos/images/d.png",
        "photos/previews/mine.png",
        "photos/sheets/c.png",
    ]


@pytest.mark.parametrize(
    "source",
    [
        *("latents", "latents/data", "latents/data/*.parquet"),
        *("previews", "previews/images", "previews/decoded", "previews/fidelity.parquet"),
    ],
)
def test_outputs_of_latentmill_are_refused_as_a_source(tmp_path: Path, source: str) -> None:
    put(tmp_path, "latents/cache.json", data=CACHE_JSON)
    put(tmp_path, "previews/report.json", data=REPORT)
    put(tmp_path, f"latents/data/{UNIT}-00000.parquet", f"previews/images/{UNIT}/1.png")
    put(tmp_path, "previews/decoded/00000-000.tar", "previews/fidelity.parquet/00000.parquet")
    with pytest.raises(SourceError, match=r"latentmill wrote all files there, the (cache|previews) "):
        list_inputs(tmp_path / source)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": 1}', b"\xff", b'{"made_by": "someone"}'])
def test_foreign_files_with_names_of_outputs_are_inputs(tmp_path: Path, content: bytes) -> None:
    names = (f"data/{UNIT}-00000.parquet", f"images/{UNIT}/1.png", "sheets/00000.png")
    put(tmp_path / "x", "cache.json", "report.json", data=content)
    put(tmp_path / "x", *names)
    assert set(list_paths(tmp_path / "x")) >= {f"x/{name}" for name in names}


def test_only_files_that_may_mark_outputs_are_read(tmp_path: Path) -> None:
    read_paths: list[str] = []

    def read(path: str) -> bytes | None:
        read_paths.append(path)
        return None

    files = [f"/s/{n}/{name}" for n in range(100) for name in ("cache.json", "report.json", "data/0-00001.parquet")]
    files += [f"/s/data/{UNIT}-{n:05d}.parquet" for n in range(100)]
    assert own_outputs.find_own_outputs(files, read) == {}
    assert read_paths == ["/s/cache.json"]


@pytest.mark.parametrize("root", ["memory://shell", ""])
def test_a_folder_whose_images_are_named_individually_is_listed_once(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell passes such names for `photos/*.jpg`. One listing per image would take minutes."""
    folder = f"{root or tmp_path}/photos"
    names = [f"{number}.{end}" for number in range(9) for end in ("jpg", "txt")]
    put(folder, *names)
    listed_folders: list[str] = []
    for kind in (MemoryFileSystem, LocalFileSystem):

        def ls(self: Any, path: str, *args: Any, ls: Any = kind.ls, **options: Any) -> Any:
            listed_folders.append(path)
            return ls(self, path, *args, **options)

        monkeypatch.setattr(kind, "ls", ls)
    found = list_paths(*(f"{folder}/{number}.jpg" for number in range(9)))
    assert found == [f"photos/{name}" for name in names]
    assert len(listed_folders) == 1


def test_of_one_image_in_several_formats_the_one_that_is_read_without_a_plugin_is_used(tmp_path: Path) -> None:
    put(tmp_path / "s", "a.CR2", "a.jpg", "b.heic", "b.JPG", "c.nef", "c.heic", "d.psd", "d.svg", "e.jpg", "e.png")
    put(tmp_path / "s", "x/a.cr2", "a.txt")
    notes: list[str] = []
    expected = ["a.jpg", "a.txt", "b.JPG", "c.heic", "d.psd", "d.svg", "e.jpg", "e.png", "x/a.cr2"]
    assert list_paths(tmp_path / "s", notes=notes) == [f"s/{name}" for name in expected]
    (note,) = notes
    assert note.endswith("with the same name, which is used: 3 (s/a.CR2, s/b.heic, s/c.nef)")


def test_thumbnails_of_operating_systems_are_skipped(tmp_path: Path) -> None:
    put(tmp_path, "photos/0.png", "photos/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "photos/__MACOSX/0.png")
    listing = list_inputs(tmp_path / "photos")
    assert [shard.path for shard in listing.files] == ["photos/0.png"]
    assert listing.notes[0].startswith("skipped files of the operating system: 2 (")


@pytest.mark.parametrize(
    ("source", "covered", "others"),
    [
        ("s", ["s/0.tar", "s/a/b/0.tar"], ["t/0.tar"]),
        ("s/*.tar", ["s/9.tar"], ["s/a/9.tar", "s/9.jpg"]),
        ("s/{0..3}.tar", ["s/2.tar"], ["s/9.tar"]),
        ("s/0.tar", ["s/0.tar"], ["s/1.tar"]),
        ("s/**/*.tar", ["s/a/b/9.tar"], ["s/a/9.jpg"]),
        ("s/*", ["s/a/9.jpg"], []),
    ],
)
def test_a_source_covers_the_paths_that_it_would_list(
    tmp_path: Path, source: str, covered: list[str], others: list[str]
) -> None:
    put(tmp_path, *(f"s/{n}.tar" for n in range(4)), "s/a/5.tar")
    (listed_source,) = list_inputs(f"{tmp_path}/{source}").sources
    assert [path for path in [*covered, *others] if listed_source.covers(path)] == covered


def test_a_missing_path_below_the_root_is_called_missing() -> None:
    with pytest.raises(SourceError, match="/no-such-folder does not exist"):
        list_inputs("/no-such-folder")
