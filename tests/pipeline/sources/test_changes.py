"""Sources compared with the plan: moved, renamed, overlapping, missing and changed files."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.cache import plan, plan_files
from pipeline.errors import SourceError
from pipeline.records import ListedFile, Unit
from pipeline.sources import units
from pipeline.sources.listing import list_sources
from pipeline.sources.planned_files import list_input_files
from pipeline.sources.units import make_units
from pipeline.storage.folder import Folder

Extend = Callable[..., tuple[list[str], list[str]]]


def put(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        Folder(str(folder)).replace(name, data)


def put_images(folder: Path, count: int = 3, first: int = 10) -> None:
    """Write images of different sizes."""
    for number in range(count):
        put(folder, f"{number}.png", data=bytes(first + number))


@pytest.fixture
def cache(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "cache"))


@pytest.fixture
def extend(cache: Folder) -> Extend:
    """Return a function that plans sources. It returns the paths of all planned inputs, and the notes."""

    def run(*sources: object, **options: bool) -> tuple[list[str], list[str]]:
        listing = list_sources([str(source) for source in sources], {}, cache.url)
        units, notes = plan.extend_plan(cache, listing.files, listing.sources, **options)
        assert sorted(map(repr, units)) == sorted(map(repr, plan.read_plan(cache))) or any(
            "has moved" in n for n in notes
        )
        return [file.path for unit in units for file in list_input_files(unit)], notes

    return run


def expect_refusal(extend: Extend, *sources: object, **options: bool) -> str:
    with pytest.raises(SourceError) as error:
        extend(*sources, **options)
    return str(error.value)


def find_arguments(message: str) -> list[str]:
    """Return the NAME=SOURCE arguments in a message."""
    return [word.rstrip(".;") for word in message.split() if re.match(r"[^/]+=/", word)]


def copy_without_times(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in target.rglob("*"):
        os.utime(path, (1, 1))


# -- moved ------------------------------------------------------------------------------------------------------------


def test_a_moved_source_is_read_from_its_new_place(extend: Extend, cache: Folder, tmp_path: Path) -> None:
    put_images(tmp_path / "a/photos")
    put(tmp_path / "a/photos", "0.tar")
    first, _ = extend(tmp_path / "a/photos")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/photos").rename(tmp_path / "b/photos")
    listing = list_sources([f"{tmp_path}/b/photos"], {}, cache.url)
    units, notes = plan.extend_plan(cache, listing.files, listing.sources)
    assert notes == [f"the source photos has moved from {tmp_path}/a/photos to {tmp_path}/b/photos"]
    assert {unit.url for unit in units} == {f"{tmp_path}/b/photos", f"{tmp_path}/b/photos/0.tar"}
    assert extend(tmp_path / "b/photos")[0] == first
    put(tmp_path / "b/photos", "1.tar")
    assert len(extend(tmp_path / "b/photos")[0]) == len(first) + 1
    assert {unit.root for unit in plan.read_plan(cache)} == {f"{tmp_path}/b/photos"}, "the last place is recorded"
    assert extend(tmp_path / "b/photos")[1] == []


@pytest.mark.parametrize("same_names", [True, False])
def test_another_source_of_the_same_name_is_refused_with_a_suggestion(
    extend: Extend, cache: Folder, tmp_path: Path, same_names: bool
) -> None:
    put_images(tmp_path / "cats/images")
    put_images(tmp_path / "dogs/images", first=50)
    if not same_names:
        for path in (tmp_path / "dogs/images").iterdir():
            path.rename(path.with_name(f"dog{path.name}"))
    extend(tmp_path / "cats/images")
    message = expect_refusal(extend, tmp_path / "dogs/images")
    assert "3 of 3 planned files are missing or differ" in message
    (argument,) = find_arguments(message)
    assert argument == f"images2={tmp_path}/dogs/images"
    assert cache.list_files("_plan") == ["00000.parquet"], "nothing is written"
    assert len(extend(argument)[0]) == 6
    assert len(extend(tmp_path / "cats/images", argument)[0]) == 6


def test_files_of_equal_sizes_with_other_times_are_another_source(extend: Extend, tmp_path: Path) -> None:
    """Tars are padded, so equal sizes are common."""
    for name in ("cats", "dogs"):
        put(tmp_path / name, "shards/00000.tar", data=bytes(10240))
        os.utime(tmp_path / name / "shards/00000.tar", (1, len(name) + ord(name[0])))
    extend(tmp_path / "cats/shards")
    assert "holds other files" in expect_refusal(extend, tmp_path / "dogs/shards")


def test_a_moved_source_is_not_identified_by_sizes_alone(extend: Extend, cache: Folder) -> None:
    def tar(root: str) -> ListedFile:
        return ListedFile(root=root, path="shards/0.tar", bytes=10240, etag="")

    plan.extend_plan(cache, [tar("x://cats/shards")])
    with pytest.raises(SourceError, match="no ETag or time proves that they are the planned ones"):
        plan.extend_plan(cache, [tar("x://dogs/shards")])
    assert plan.extend_plan(cache, [tar("x://cats/shards")])[1] == [], "an unknown ETag is not a change"
    plan.extend_plan(cache, [tar("x://dogs/shards")], same_source=True)


def test_a_copy_without_times_is_accepted_with_same_source(extend: Extend, cache: Folder, tmp_path: Path) -> None:
    put_images(tmp_path / "a/photos")
    put(tmp_path / "a/photos", "0.tar")
    first, _ = extend(tmp_path / "a/photos")
    copy_without_times(tmp_path / "a/photos", tmp_path / "b/photos")
    assert expect_refusal(extend, tmp_path / "b/photos").endswith("copied without its files' times, use --same-source")
    assert extend(tmp_path / "b/photos", same_source=True)[0] == first
    assert [unit.root for unit in plan.read_plan(cache)] == [f"{tmp_path}/b/photos"] * 2
    assert extend(tmp_path / "b/photos") == (first, []), "the option is needed once"


def test_another_source_is_refused_with_same_source_too(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "cats/images")
    put_images(tmp_path / "dogs/images", first=50)
    extend(tmp_path / "cats/images")
    assert not expect_refusal(extend, tmp_path / "dogs/images", same_source=True).endswith("--same-source")


def test_a_moved_source_is_identified_by_the_files_that_are_named(extend: Extend, tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, f"a/s/{number}.tar")
    first, _ = extend(tmp_path / "a/s")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/s").rename(tmp_path / "b/s")
    assert extend(tmp_path / "b/s/1.tar")[0] == first
    (tmp_path / "b/s/0.tar").unlink()
    assert "1 of 3 planned files are missing or differ (s/0.tar)" in expect_refusal(extend, tmp_path / "b/s")


def test_more_files_of_the_same_root_are_appended(extend: Extend, tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path, f"s/{number}.tar")
    steps = [extend(f"{tmp_path}/s/{glob}") for glob in ("0.tar", "{1..2}.tar", "*.tar", "")]
    assert [len(paths) for paths, _ in steps] == [1, 3, 4, 4]
    assert [notes for _, notes in steps] == [[], [], [], []]


# -- renamed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data/photos", "data/pics"),
        ("data/photos", "data"),
        ("data", "data/photos"),
        ("data/photos", "elsewhere/x"),
        ("data/photos/*.png", "data/*/*.png"),
    ],
)
def test_a_renamed_source_is_not_encoded_twice(extend: Extend, tmp_path: Path, before: str, after: str) -> None:
    put_images(tmp_path / "data/photos", 2)
    first, _ = extend(tmp_path / before)
    if "*" not in after and not (tmp_path / after).exists():
        (tmp_path / after).parent.mkdir(exist_ok=True)
        (tmp_path / "data/photos").rename(tmp_path / after)
    message = expect_refusal(extend, tmp_path / after)
    assert "2 of 2 files in " in message
    assert message.endswith("--new-source")
    (argument,) = find_arguments(message)
    assert extend(argument)[0] == first


def test_a_renamed_copy_is_found_inside_the_named_folder(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "data/photos")
    first, _ = extend(tmp_path / "data/photos")
    copy_without_times(tmp_path / "data/photos", tmp_path / "copy/deep/pics")
    shutil.rmtree(tmp_path / "data")
    put_images(tmp_path / "copy/deep/others", 30, first=100)
    message = expect_refusal(extend, tmp_path / "copy")
    assert "3 of 33 files in " in message, "few of the new files, but all of the planned files"
    (argument,) = find_arguments(message)
    assert argument == f"photos={tmp_path}/copy/deep/pics"
    assert extend(argument, same_source=True)[0] == first


def test_a_renamed_subfolder_of_a_source_is_refused_with_a_suggestion(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "data/photos")
    extend(tmp_path / "data")
    (tmp_path / "data/photos").rename(tmp_path / "pics")
    assert "put its files into FOLDER/photos/, and name it: data=FOLDER" in expect_refusal(extend, tmp_path / "pics")


def test_files_that_were_moved_inside_a_source_are_recognized(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "photos", 4)
    first, _ = extend(tmp_path / "photos")
    (tmp_path / "photos/2026").mkdir()
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/2026/0.png")
    message = expect_refusal(extend, tmp_path / "photos")
    assert find_arguments(message) == [], "no other name of the source helps"
    assert "photos/2026/0.png is photos/0.png. If they were moved inside the source, move them back. " in message
    assert message.endswith("--new-source")
    assert extend(tmp_path / "photos", new_source=True)[0] == [*first, "photos/2026/0.png"]


def test_a_suggested_argument_is_quoted_for_a_shell(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "my photos")
    extend(tmp_path / "my photos")
    (tmp_path / "my photos").rename(tmp_path / "our photos")
    assert f"name it: 'my photos={tmp_path}/our photos'. " in expect_refusal(extend, tmp_path / "our photos")


def test_a_new_source_that_looks_planned_is_accepted_with_new_source(extend: Extend, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        put(tmp_path / name, "0.bmp", "1.bmp", data=bytes(100))
    extend(tmp_path / "cats")
    assert "--new-source" in expect_refusal(extend, tmp_path / "dogs")
    assert len(extend(tmp_path / "dogs", new_source=True)[0]) == 4


def test_equal_sources_that_are_named_together_are_two_sources(extend: Extend, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        put(tmp_path / name, "0.bmp", "1.bmp", data=bytes(100))
    extend(tmp_path / "cats")
    assert len(extend(tmp_path / "cats", tmp_path / "dogs")[0]) == 4


@pytest.mark.parametrize("etag", ["", "aa", "bb", "cc-2", "m5"])
def test_a_renamed_source_is_recognized_whatever_its_etags(cache: Folder, etag: str) -> None:
    """A copy has another ETag on Azure and Google, and on S3 with customer-provided keys."""

    def tar(name: str, etag: str) -> ListedFile:
        return ListedFile(root=f"s3://b/{name}", path=f"{name}/0.tar", bytes=10240, etag=etag)

    plan.extend_plan(cache, [tar("cats", "aa")])
    with pytest.raises(SourceError, match="as files of the source cats"):
        plan.extend_plan(cache, [tar("birds", etag)])


def test_a_few_files_that_look_planned_are_noted(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "cats", 10)
    extend(tmp_path / "cats")
    put_images(tmp_path / "dogs", 2)
    put_images(tmp_path / "dogs/more", 10, first=200)
    paths, notes = extend(tmp_path / "dogs")
    assert len(paths) == 22
    assert notes == [
        "new files with the relative path and size of planned ones that are not listed now: 2 "
        "(dogs/0.png is cats/0.png, dogs/1.png is cats/1.png); they are encoded as new files"
    ]


# -- one file in two sources ------------------------------------------------------------------------------------------


def make_overlapping_folders(tmp_path: Path) -> Path:
    put(tmp_path, "photos/a.png")
    put(tmp_path, "photos/best/b.png", data=b"xx")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/b2.png").symlink_to("../photos/best/b.png")
    (tmp_path / "alias").symlink_to("photos/best")
    return tmp_path


@pytest.mark.parametrize(
    "inner", ["photos/best", "photos/best/*.png", "photos/best/b.png", "links", "alias", "x=alias"]
)
def test_a_file_in_two_sources_is_read_once(extend: Extend, tmp_path: Path, inner: str) -> None:
    folder = make_overlapping_folders(tmp_path)
    second = f"x={folder}/alias" if inner == "x=alias" else f"{folder}/{inner}"
    for given in ((folder / "photos", second), (second, folder / "photos")):
        paths, notes = extend(*given)
        assert paths == ["photos/a.png", "photos/best/b.png"]
        assert notes[0].startswith("files that are in two sources, and are read once: 1 (")


@pytest.mark.parametrize("inner", ["photos/best", "links", "alias"])
def test_a_file_that_another_source_has_planned_is_read_once(extend: Extend, tmp_path: Path, inner: str) -> None:
    folder = make_overlapping_folders(tmp_path)
    (planned,), _ = extend(folder / inner)
    paths, notes = extend(folder / "photos")
    assert paths == [planned, "photos/a.png"]
    assert notes == [f"files that are in two sources, and are read once: 1 (photos/best/b.png is {planned})"]
    assert extend(folder / "photos", folder / inner)[0] == paths


def test_metadata_beside_a_tar_in_two_sources_is_not_planned(extend: Extend, tmp_path: Path) -> None:
    """Without its tar in the list, the Parquet file of img2dataset would be planned as a shard."""
    put(tmp_path, "shards/0.tar", "shards/0.parquet")
    expected = ["shards/0.tar"]
    assert extend(tmp_path / "shards", f"x={tmp_path}/shards")[0] == expected
    assert extend(f"x={tmp_path}/shards", tmp_path / "shards")[0] == expected


def test_a_file_in_two_sources_on_a_store_is_read_once(extend: Extend) -> None:
    for name in ("a.tar", "best/b.tar"):
        Folder("memory://overlap/photos").replace(name, b"x")
    paths, notes = extend("memory://overlap/photos", "memory://overlap/photos/best", "x=memory://overlap/photos/a.tar")
    assert paths == ["photos/a.tar", "photos/best/b.tar"]
    assert "read once: 2 (best/b.tar is photos/best/b.tar, x/a.tar is photos/a.tar)" in notes[0]
    assert len(extend("memory://overlap/photos/best", new_source=True)[0]) == 2


# -- missing, changed -------------------------------------------------------------------------------------------------


def test_missing_files_are_counted_if_their_source_is_named(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "photos", 9)
    put_images(tmp_path / "others", first=100)
    extend(tmp_path / "photos", tmp_path / "others")
    for number in range(7):
        (tmp_path / f"photos/{number}.png").unlink()
    assert extend(tmp_path / "others")[1] == []
    assert extend(tmp_path / "photos/8.png")[1] == []
    missing = "photos/0.png, photos/1.png, photos/2.png, photos/3.png, photos/4.png and 2 more"
    expected = [f"planned inputs that are missing: 7 ({missing}); their encoded samples stay in the cache"]
    assert extend(tmp_path / "photos")[1] == extend(tmp_path / "photos/*")[1] == expected


def rewrite(path: Path) -> None:
    """Write other content of the same size, with another time."""
    path.write_bytes(bytes(reversed(path.read_bytes()[:-1] + b"!")))
    os.utime(path, (2, 2))


@pytest.mark.parametrize("kind", ["tar", "parquet", "png"])
@pytest.mark.parametrize("existing", ["nothing", "part", "commit", "empty"])
def test_a_changed_input_of_the_same_size_is_noted(
    extend: Extend, cache: Folder, tmp_path: Path, kind: str, existing: str
) -> None:
    put(tmp_path, f"s/0.{kind}", f"s/1.{kind}", data=bytes(100))
    extend(tmp_path / "s")
    before = plan.read_plan(cache)
    for unit in before:
        name = {
            "part": f"data/{unit.name}-00000.parquet",
            "commit": f"_commits/{unit.name}.json",
            "empty": f"_empty/{unit.name}-00000.json",
        }
        if existing != "nothing":
            cache.create(name[existing], b"")
    rewrite(tmp_path / f"s/1.{kind}")
    _, (note,) = extend(tmp_path / "s")
    assert note.startswith(f"inputs that have changed since they were planned: 1 (s/1.{kind}); ")
    if existing == "nothing":
        assert note.endswith("none of their samples are encoded yet, and they are planned again")
        assert cache.list_files("_plan") == ["00000.parquet", "00001.parquet"]
        after = plan.read_plan(cache)
        assert [unit.name for unit in after] == [unit.name for unit in before]
        assert after != before
        assert extend(tmp_path / "s")[1] == []
    else:
        assert ("run this command again" in note) is (existing != "commit")
        assert plan.read_plan(cache) == before
        assert extend(tmp_path / "s", same_source=True)[1] == [], "only the time has changed"
        assert extend(tmp_path / "s")[1] == []


def test_a_parquet_file_that_grew_is_planned_with_more_ranges(
    extend: Extend, cache: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(units.RANGE_BYTES, "parquet", 100)
    put(tmp_path, "s/0.parquet", data=bytes(150))
    extend(tmp_path / "s")
    put(tmp_path, "s/0.parquet", data=bytes(250))
    extend(tmp_path / "s")
    assert [unit.range for unit in plan.read_plan(cache)] == [(0, 3), (1, 3), (2, 3)]
    first = plan.read_plan(cache)[0]
    cache.create(f"data/{first.name}-00000.parquet", b"")
    put(tmp_path, "s/0.parquet", data=bytes(90))
    assert "run this command again" in extend(tmp_path / "s")[1][0], "one range has a part, so all ranges stay"
    assert [unit.range for unit in plan.read_plan(cache)] == [(0, 3), (1, 3), (2, 3)]


def test_an_unknown_time_is_not_a_change(cache: Folder) -> None:
    def tar(etag: str) -> ListedFile:
        return ListedFile(root="/s", path="s/0.tar", bytes=1, etag=etag)

    for planned, listed in (("", "m5"), ("m5", "")):
        folder = Folder(f"{cache.url}{planned}")
        plan.extend_plan(folder, [tar(planned)])
        assert plan.extend_plan(folder, [tar(listed)])[1] == []


def test_the_last_plan_file_sets_the_place_of_a_source(cache: Folder) -> None:
    def tar(root: str, number: int) -> ListedFile:
        return ListedFile(root=root, path=f"s/{number}.tar", bytes=1, etag="")

    plan.write_plan_file(cache, 0, make_units([tar("/a/s", 0), tar("/a/s", 1)]))
    plan.write_plan_file(cache, 1, make_units([tar("/b/s", 0)]))
    assert [unit.url for unit in plan.read_plan(cache)] == ["/b/s/0.tar", "/b/s/1.tar"]


def test_the_note_on_many_changed_files_is_one_short_line(extend: Extend, tmp_path: Path) -> None:
    put_images(tmp_path / "photos", 600)
    extend(tmp_path / "photos")
    for path in (tmp_path / "photos").iterdir():
        os.utime(path, (1, 1))
    _, (note,) = extend(tmp_path / "photos")
    assert "planned: 600 (photos/0.png, photos/1.png, " in note
    assert "and 595 more" in note
    assert len(note) < 300


def test_the_second_of_two_drivers_that_plan_again_reads_the_plan_of_the_first(
    extend: Extend, cache: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "s/0.tar", "s/1.tar", data=bytes(100))
    extend(tmp_path / "s")
    rewrite(tmp_path / "s/1.tar")
    original, first_numbers = plan_files.write_plan_file, list[int]()

    def write_second(folder: Folder, number: int, units: Sequence[Unit]) -> bool:
        if not first_numbers:
            first_numbers.append(number)
            assert original(folder, number, units), "the other driver is faster"
        return original(folder, number, units)

    monkeypatch.setattr(plan_files, "write_plan_file", write_second)
    extend(tmp_path / "s")
    assert (first_numbers, cache.list_files("_plan")) == ([1], ["00000.parquet", "00001.parquet"])


def test_the_plan_records_the_size_and_time_of_each_image(extend: Extend, cache: Folder, tmp_path: Path) -> None:
    put_images(tmp_path / "photos")
    os.utime(tmp_path / "photos/1.png", ns=(5, 1_700_000_000_000_000_001))
    extend(tmp_path / "photos")
    (unit,) = plan.read_plan(cache)
    assert json.loads(unit.files)[1] == [11, "m1700000000000000001", []]
    assert (unit.root, unit.source_name) == (f"{tmp_path}/photos", "photos")
