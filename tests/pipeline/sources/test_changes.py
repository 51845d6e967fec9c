"""Sources against the plan: moved, renamed, overlapping, gone, changed."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.cache import plan
from pipeline.errors import SourceError
from pipeline.records import Shard, Unit
from pipeline.sources import units
from pipeline.sources.listing import list_sources
from pipeline.sources.planned_files import list_input_files
from pipeline.sources.units import make_units
from pipeline.storage.folder import Folder

Extend = Callable[..., tuple[list[str], list[str]]]


def put(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        Folder(str(folder)).replace(name, data)


def images(folder: Path, count: int = 3, first: int = 10) -> None:
    """Files of unlike sizes."""
    for number in range(count):
        put(folder, f"{number}.png", data=bytes(first + number))


@pytest.fixture
def cache(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "cache"))


@pytest.fixture
def extend(cache: Folder) -> Extend:
    """Plans some sources; returns the paths of all planned inputs, and the notes."""

    def run(*given: object, **told: bool) -> tuple[list[str], list[str]]:
        listing = list_sources([str(source) for source in given], {}, cache.url)
        units, notes = plan.extend_plan(cache, listing.shards, listing.sources, **told)
        assert sorted(map(repr, units)) == sorted(map(repr, plan.read_plan(cache))) or any(
            "has moved" in n for n in notes
        )
        return [file.path for unit in units for file in list_input_files(unit)], notes

    return run


def refusal(extend: Extend, *given: object, **told: bool) -> str:
    with pytest.raises(SourceError) as error:
        extend(*given, **told)
    return str(error.value)


def arguments(refusal: str) -> list[str]:
    """The NAME=SOURCE arguments in a message."""
    return [word.rstrip(".;") for word in refusal.split() if re.match(r"[^/]+=/", word)]


def copy_without_times(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in target.rglob("*"):
        os.utime(path, (1, 1))


# -- moved ------------------------------------------------------------------------------------------------------------


def test_a_source_that_moved_whole_goes_on_where_it_is_now(extend: Extend, cache: Folder, tmp_path: Path) -> None:
    images(tmp_path / "a/photos")
    put(tmp_path / "a/photos", "0.tar")
    first, _ = extend(tmp_path / "a/photos")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/photos").rename(tmp_path / "b/photos")
    listing = list_sources([f"{tmp_path}/b/photos"], {}, cache.url)
    units, notes = plan.extend_plan(cache, listing.shards, listing.sources)
    assert notes == [f"the source photos has moved from {tmp_path}/a/photos to {tmp_path}/b/photos"]
    assert {unit.url for unit in units} == {f"{tmp_path}/b/photos", f"{tmp_path}/b/photos/0.tar"}
    assert extend(tmp_path / "b/photos")[0] == first
    put(tmp_path / "b/photos", "1.tar")
    assert len(extend(tmp_path / "b/photos")[0]) == len(first) + 1
    assert {unit.root for unit in plan.read_plan(cache)} == {f"{tmp_path}/b/photos"}, "where it was last"
    assert extend(tmp_path / "b/photos")[1] == []


@pytest.mark.parametrize("same_names", [True, False])
def test_another_source_of_a_name_is_refused_and_told_how_to_name_it(
    extend: Extend, cache: Folder, tmp_path: Path, same_names: bool
) -> None:
    images(tmp_path / "cats/images")
    images(tmp_path / "dogs/images", first=50)
    if not same_names:
        for path in (tmp_path / "dogs/images").iterdir():
            path.rename(path.with_name(f"dog{path.name}"))
    extend(tmp_path / "cats/images")
    said = refusal(extend, tmp_path / "dogs/images")
    assert "3 of 3 planned files are missing or differ" in said
    (argument,) = arguments(said)
    assert argument == f"images2={tmp_path}/dogs/images"
    assert cache.list_files("_plan") == ["00000.parquet"], "nothing is written"
    assert len(extend(argument)[0]) == 6
    assert len(extend(tmp_path / "cats/images", argument)[0]) == 6


def test_equal_sizes_are_not_enough_if_times_differ(extend: Extend, tmp_path: Path) -> None:
    """Tars are padded, and equal sizes are common."""
    for name in ("cats", "dogs"):
        put(tmp_path / name, "shards/00000.tar", data=bytes(10240))
        os.utime(tmp_path / name / "shards/00000.tar", (1, len(name) + ord(name[0])))
    extend(tmp_path / "cats/shards")
    assert "holds other files" in refusal(extend, tmp_path / "dogs/shards")


def test_sizes_alone_prove_nothing_of_a_source_that_moved(extend: Extend, cache: Folder) -> None:
    def tar(root: str) -> Shard:
        return Shard(url=f"{root}/0.tar", root=root, path="shards/0.tar", bytes=10240, etag="")

    plan.extend_plan(cache, [tar("x://cats/shards")])
    with pytest.raises(SourceError, match="no ETag or time proves that they are the planned ones"):
        plan.extend_plan(cache, [tar("x://dogs/shards")])
    assert plan.extend_plan(cache, [tar("x://cats/shards")])[1] == [], "unknown is not changed"
    plan.extend_plan(cache, [tar("x://dogs/shards")], same_source=True)


def test_a_copy_without_times_goes_on_if_the_user_says_so(extend: Extend, cache: Folder, tmp_path: Path) -> None:
    images(tmp_path / "a/photos")
    put(tmp_path / "a/photos", "0.tar")
    first, _ = extend(tmp_path / "a/photos")
    copy_without_times(tmp_path / "a/photos", tmp_path / "b/photos")
    assert refusal(extend, tmp_path / "b/photos").endswith("copied without its files' times, use --same-source")
    assert extend(tmp_path / "b/photos", same_source=True)[0] == first
    assert [unit.root for unit in plan.read_plan(cache)] == [f"{tmp_path}/b/photos"] * 2
    assert extend(tmp_path / "b/photos") == (first, []), "once is enough"


def test_another_source_is_refused_whatever_the_user_says(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "cats/images")
    images(tmp_path / "dogs/images", first=50)
    extend(tmp_path / "cats/images")
    assert not refusal(extend, tmp_path / "dogs/images", same_source=True).endswith("--same-source")


def test_a_part_of_a_source_that_moved_is_enough(extend: Extend, tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, f"a/s/{number}.tar")
    first, _ = extend(tmp_path / "a/s")
    (tmp_path / "b").mkdir()
    (tmp_path / "a/s").rename(tmp_path / "b/s")
    assert extend(tmp_path / "b/s/1.tar")[0] == first
    (tmp_path / "b/s/0.tar").unlink()
    assert "1 of 3 planned files are missing or differ (s/0.tar)" in refusal(extend, tmp_path / "b/s")


def test_more_files_of_the_same_root_are_an_append(extend: Extend, tmp_path: Path) -> None:
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
def test_a_source_that_was_renamed_is_not_encoded_twice(
    extend: Extend, tmp_path: Path, before: str, after: str
) -> None:
    images(tmp_path / "data/photos", 2)
    first, _ = extend(tmp_path / before)
    if "*" not in after and not (tmp_path / after).exists():
        (tmp_path / after).parent.mkdir(exist_ok=True)
        (tmp_path / "data/photos").rename(tmp_path / after)
    said = refusal(extend, tmp_path / after)
    assert "2 of 2 files in " in said
    assert said.endswith("--new-source")
    (argument,) = arguments(said)
    assert extend(argument)[0] == first


def test_a_renamed_source_may_be_copied_and_named_higher_up(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "data/photos")
    first, _ = extend(tmp_path / "data/photos")
    copy_without_times(tmp_path / "data/photos", tmp_path / "copy/deep/pics")
    shutil.rmtree(tmp_path / "data")
    images(tmp_path / "copy/deep/others", 30, first=100)
    said = refusal(extend, tmp_path / "copy")
    assert "3 of 33 files in " in said, "few of the new ones, but all of the planned"
    (argument,) = arguments(said)
    assert argument == f"photos={tmp_path}/copy/deep/pics"
    assert extend(argument, same_source=True)[0] == first


def test_a_source_that_was_renamed_and_is_named_lower_down(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "data/photos")
    extend(tmp_path / "data")
    (tmp_path / "data/photos").rename(tmp_path / "pics")
    assert "put its files into FOLDER/photos/, and name it: data=FOLDER" in refusal(extend, tmp_path / "pics")


def test_files_that_were_moved_inside_a_source_do_not_make_it_another_one(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "photos", 4)
    first, _ = extend(tmp_path / "photos")
    (tmp_path / "photos/2026").mkdir()
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/2026/0.png")
    said = refusal(extend, tmp_path / "photos")
    assert arguments(said) == [], "no other name of the source would help"
    assert "photos/2026/0.png is photos/0.png. If they were moved inside the source, move them back. " in said
    assert said.endswith("--new-source")
    assert extend(tmp_path / "photos", new_source=True)[0] == [*first, "photos/2026/0.png"]


def test_an_argument_can_be_pasted_into_a_shell(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "my photos")
    extend(tmp_path / "my photos")
    (tmp_path / "my photos").rename(tmp_path / "our photos")
    assert f"name it: 'my photos={tmp_path}/our photos'. " in refusal(extend, tmp_path / "our photos")


def test_a_source_that_is_really_new_is_encoded(extend: Extend, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        put(tmp_path / name, "0.bmp", "1.bmp", data=bytes(100))
    extend(tmp_path / "cats")
    assert "--new-source" in refusal(extend, tmp_path / "dogs")
    assert len(extend(tmp_path / "dogs", new_source=True)[0]) == 4


def test_both_sources_named_at_once_are_two(extend: Extend, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        put(tmp_path / name, "0.bmp", "1.bmp", data=bytes(100))
    extend(tmp_path / "cats")
    assert len(extend(tmp_path / "cats", tmp_path / "dogs")[0]) == 4


@pytest.mark.parametrize("etag", ["", "aa", "bb", "cc-2", "m5"])
def test_etags_do_not_tell_that_a_source_was_not_renamed(cache: Folder, etag: str) -> None:
    """On Azure and Google, and on S3 with keys of its own, the ETag of a copy is another one."""

    def tar(name: str, etag: str) -> Shard:
        return Shard(url=f"s3://b/{name}/0.tar", root=f"s3://b/{name}", path=f"{name}/0.tar", bytes=10240, etag=etag)

    plan.extend_plan(cache, [tar("cats", "aa")])
    with pytest.raises(SourceError, match="as files of the source cats"):
        plan.extend_plan(cache, [tar("birds", etag)])


def test_a_few_files_that_look_planned_are_noted(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "cats", 10)
    extend(tmp_path / "cats")
    images(tmp_path / "dogs", 2)
    images(tmp_path / "dogs/more", 10, first=200)
    paths, notes = extend(tmp_path / "dogs")
    assert len(paths) == 22
    assert notes == [
        "new files with the relative path and size of planned ones that are not listed now: 2 "
        "(dogs/0.png is cats/0.png, dogs/1.png is cats/1.png); they are encoded as new files"
    ]


# -- one file, two ways -----------------------------------------------------------------------------------------------


def overlapping(tmp_path: Path) -> Path:
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
    folder = overlapping(tmp_path)
    second = f"x={folder}/alias" if inner == "x=alias" else f"{folder}/{inner}"
    for given in ((folder / "photos", second), (second, folder / "photos")):
        paths, notes = extend(*given)
        assert paths == ["photos/a.png", "photos/best/b.png"]
        assert notes[0].startswith("files that are in two sources, and are read once: 1 (")


@pytest.mark.parametrize("inner", ["photos/best", "links", "alias"])
def test_a_file_that_another_source_has_in_the_plan_is_read_once(extend: Extend, tmp_path: Path, inner: str) -> None:
    folder = overlapping(tmp_path)
    (planned,), _ = extend(folder / inner)
    paths, notes = extend(folder / "photos")
    assert paths == [planned, "photos/a.png"]
    assert notes == [f"files that are in two sources, and are read once: 1 (photos/best/b.png is {planned})"]
    assert extend(folder / "photos", folder / inner)[0] == paths


def test_metadata_beside_tars_that_are_read_once_are_no_files_of_images(extend: Extend, tmp_path: Path) -> None:
    """Without its tar in the list, img2dataset's Parquet file would be planned by itself."""
    put(tmp_path, "shards/0.tar", "shards/0.parquet")
    expected = ["shards/0.tar"]
    assert extend(tmp_path / "shards", f"x={tmp_path}/shards")[0] == expected
    assert extend(f"x={tmp_path}/shards", tmp_path / "shards")[0] == expected


def test_a_file_on_a_store_is_read_once(extend: Extend) -> None:
    for name in ("a.tar", "best/b.tar"):
        Folder("memory://overlap/photos").replace(name, b"x")
    paths, notes = extend("memory://overlap/photos", "memory://overlap/photos/best", "x=memory://overlap/photos/a.tar")
    assert paths == ["photos/a.tar", "photos/best/b.tar"]
    assert "read once: 2 (best/b.tar is photos/best/b.tar, x/a.tar is photos/a.tar)" in notes[0]
    assert len(extend("memory://overlap/photos/best", new_source=True)[0]) == 2


# -- gone, changed ----------------------------------------------------------------------------------------------------


def test_what_is_gone_is_counted_if_its_source_is_named(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "photos", 9)
    images(tmp_path / "others", first=100)
    extend(tmp_path / "photos", tmp_path / "others")
    for number in range(7):
        (tmp_path / f"photos/{number}.png").unlink()
    assert extend(tmp_path / "others")[1] == []
    assert extend(tmp_path / "photos/8.png")[1] == []
    gone = "photos/0.png, photos/1.png, photos/2.png, photos/3.png, photos/4.png and 2 more"
    expected = [f"planned inputs that are missing: 7 ({gone}); their encoded samples stay in the cache"]
    assert extend(tmp_path / "photos")[1] == extend(tmp_path / "photos/*")[1] == expected


def rewrite(path: Path) -> None:
    """Other content of the same size, at another time."""
    path.write_bytes(bytes(reversed(path.read_bytes()[:-1] + b"!")))
    os.utime(path, (2, 2))


@pytest.mark.parametrize("kind", ["tar", "parquet", "png"])
@pytest.mark.parametrize("standing", ["nothing", "part", "commit", "empty"])
def test_an_input_of_the_same_size_that_changed_is_noticed(
    extend: Extend, cache: Folder, tmp_path: Path, kind: str, standing: str
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
        if standing != "nothing":
            cache.create(name[standing], b"")
    rewrite(tmp_path / f"s/1.{kind}")
    _, (note,) = extend(tmp_path / "s")
    assert note.startswith(f"inputs that have changed since they were planned: 1 (s/1.{kind}); ")
    if standing == "nothing":
        assert note.endswith("none of their samples are encoded yet, and they are planned again")
        assert cache.list_files("_plan") == ["00000.parquet", "00001.parquet"]
        after = plan.read_plan(cache)
        assert [unit.name for unit in after] == [unit.name for unit in before]
        assert after != before
        assert extend(tmp_path / "s")[1] == []
    else:
        assert ("run this command again" in note) is (standing != "commit")
        assert plan.read_plan(cache) == before
        assert extend(tmp_path / "s", same_source=True)[1] == [], "the user says that nothing but the time changed"
        assert extend(tmp_path / "s")[1] == []


def test_a_parquet_file_that_grew_is_planned_in_other_ranges(
    extend: Extend, cache: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "RANGE_BYTES", 100)
    put(tmp_path, "s/0.parquet", data=bytes(150))
    extend(tmp_path / "s")
    put(tmp_path, "s/0.parquet", data=bytes(250))
    extend(tmp_path / "s")
    assert [unit.range for unit in plan.read_plan(cache)] == [(0, 3), (1, 3), (2, 3)]
    first = plan.read_plan(cache)[0]
    cache.create(f"data/{first.name}-00000.parquet", b"")
    put(tmp_path, "s/0.parquet", data=bytes(90))
    assert "run this command again" in extend(tmp_path / "s")[1][0], "one range stands, so that all of them stay"
    assert [unit.range for unit in plan.read_plan(cache)] == [(0, 3), (1, 3), (2, 3)]


def test_a_time_that_is_unknown_is_not_changed(cache: Folder) -> None:
    def tar(etag: str) -> Shard:
        return Shard(url="/s/0.tar", root="/s", path="s/0.tar", bytes=1, etag=etag)

    for planned, now in (("", "m5"), ("m5", "")):
        folder = Folder(f"{cache.url}{planned}")
        plan.extend_plan(folder, [tar(planned)])
        assert plan.extend_plan(folder, [tar(now)])[1] == []


def test_a_source_lies_where_the_last_file_of_the_plan_says(cache: Folder) -> None:
    def tar(root: str, number: int) -> Shard:
        return Shard(url=f"{root}/{number}.tar", root=root, path=f"s/{number}.tar", bytes=1, etag="")

    plan.write_plan_file(cache, 0, make_units([tar("/a/s", 0), tar("/a/s", 1)]))
    plan.write_plan_file(cache, 1, make_units([tar("/b/s", 0)]))
    assert [unit.url for unit in plan.read_plan(cache)] == ["/b/s/0.tar", "/b/s/1.tar"]


def test_however_many_changed_the_note_is_one_line(extend: Extend, tmp_path: Path) -> None:
    images(tmp_path / "photos", 600)
    extend(tmp_path / "photos")
    for path in (tmp_path / "photos").iterdir():
        os.utime(path, (1, 1))
    _, (note,) = extend(tmp_path / "photos")
    assert "planned: 600 (photos/0.png, photos/1.png, " in note
    assert "and 595 more" in note
    assert len(note) < 300


def test_of_two_drivers_that_plan_anew_the_second_reads_what_the_first_planned(
    extend: Extend, cache: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "s/0.tar", "s/1.tar", data=bytes(100))
    extend(tmp_path / "s")
    rewrite(tmp_path / "s/1.tar")
    original, raced = plan.write_plan_file, list[int]()

    def lose(folder: Folder, number: int, units: Sequence[Unit]) -> bool:
        if not raced:
            raced.append(number)
            assert original(folder, number, units), "the other driver is quicker"
        return original(folder, number, units)

    monkeypatch.setattr(plan, "write_plan_file", lose)
    extend(tmp_path / "s")
    assert (raced, cache.list_files("_plan")) == ([1], ["00000.parquet", "00001.parquet"])


def test_the_plan_says_what_each_image_was(extend: Extend, cache: Folder, tmp_path: Path) -> None:
    images(tmp_path / "photos")
    os.utime(tmp_path / "photos/1.png", ns=(5, 1_700_000_000_000_000_001))
    extend(tmp_path / "photos")
    (unit,) = plan.read_plan(cache)
    assert json.loads(unit.files)[1] == [11, "m1700000000000000001", []]
    assert (unit.root, unit.source) == (f"{tmp_path}/photos", "photos")
