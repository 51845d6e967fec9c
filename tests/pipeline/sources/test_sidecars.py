"""Which text belongs to which image, and how a plan records it."""

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cache import plan
from pipeline.errors import CacheError
from pipeline.readers.image_files import ImageFiles, unpack_files
from pipeline.records import TEXT_EXTENSIONS, ListedFile, PlannedFile
from pipeline.sources.sidecars import SidecarIndex, match_sidecars
from pipeline.sources.units import make_units
from pipeline.storage.folder import Folder

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def make_shards(*names: str, root: str = "/disk/p", **sizes: int) -> list[ListedFile]:
    """Return the files of a folder `p`. sizes: in bytes, by the stem of a name (default: 1)."""
    return [
        ListedFile(
            root=root,
            path=f"p/{name}",
            bytes=sizes.get(name.partition(".")[0], 1),
            etag=f"e-{name}",
        )
        for name in sorted(names)
    ]


def list_texts(sidecars: SidecarIndex) -> dict[str, list[str]]:
    return {image[2:]: sorted(text.path[2:] for text in texts) for image, texts in sidecars.texts.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.jpg a.txt a.json", {"a.jpg": ["a.json", "a.txt"]}),
        ("a.jpg a.jpg.txt b.png b.png.json", {"a.jpg": ["a.jpg.txt"], "b.png": ["b.png.json"]}),
        ("a.v2.jpg a.v2.txt", {"a.v2.jpg": ["a.v2.txt"]}),
        ("x/a.jpg x/a.txt y/a.jpg y/a.json", {"x/a.jpg": ["x/a.txt"], "y/a.jpg": ["y/a.json"]}),
        ("a.jpg a.png a.txt", {"a.jpg": ["a.txt"], "a.png": ["a.txt"]}),
        ("a.JPG a.txt", {"a.JPG": ["a.txt"]}),
        ("a.jpg a.TXT", {"a.jpg": ["a.TXT"]}),
        ("a.jpg A.txt", {"a.jpg": ["A.txt"]}),
        ("a.jpg A.JPG.Txt", {"a.jpg": ["A.JPG.Txt"]}),
        (f"{COMPOSED}.jpg {DECOMPOSED}.txt", {f"{COMPOSED}.jpg": [f"{DECOMPOSED}.txt"]}),
        (f"{DECOMPOSED}.jpg {COMPOSED}.TXT", {f"{DECOMPOSED}.jpg": [f"{COMPOSED}.TXT"]}),
        ("A.jpg a.jpg A.txt a.txt", {"A.jpg": ["A.txt"], "a.jpg": ["a.txt"]}),
    ],
)
def test_a_text_has_the_name_of_its_image(names: str, expected: dict[str, list[str]]) -> None:
    sidecars = match_sidecars(make_shards(*names.split()), TEXT_EXTENSIONS)
    assert list_texts(sidecars) == expected
    assert list(sidecars.unused) == []


@pytest.mark.parametrize(
    ("names", "expected", "unused"),
    [
        ("a.jpg a.txt a.jpg.txt", {"a.jpg": ["a.jpg.txt"]}, ["a.txt"]),
        ("a.jpg a.txt a.TXT", {"a.jpg": ["a.txt"]}, ["a.TXT"]),
        ("a.jpg a.Txt a.TXT", {}, ["a.TXT", "a.Txt"]),
        ("A.jpg a.jpg a.txt", {"a.jpg": ["a.txt"]}, []),
        ("IMG.jpg Img.jpg img.txt", {}, ["img.txt"]),
        ("a.jpg b.txt README.txt", {}, ["README.txt", "b.txt"]),
        ("images/a.jpg captions/a.txt", {}, ["captions/a.txt"]),
    ],
)
def test_an_unused_text_is_named(names: str, expected: dict[str, list[str]], unused: list[str]) -> None:
    sidecars = match_sidecars(make_shards(*names.split()), TEXT_EXTENSIONS)
    assert list_texts(sidecars) == expected
    assert [path[2:] for path in sidecars.unused] == unused


def test_the_metadata_of_shards_is_not_an_unused_text() -> None:
    shards = make_shards("tars/0.tar", "tars/0_stats.json", "photos/a.jpg", "photos/b.txt")
    assert list(match_sidecars(shards, TEXT_EXTENSIONS).unused) == ["p/photos/b.txt"]
    assert list(match_sidecars(make_shards("0.tar", "0_stats.json", "a.txt"), TEXT_EXTENSIONS).unused) == []


def test_only_requested_kinds_of_texts_are_matched() -> None:
    sidecars = match_sidecars(make_shards("a.jpg", "a.txt", "a.caption", "b.caption"), ("caption",))
    assert list_texts(sidecars) == {"a.jpg": ["a.caption"]}
    assert list(sidecars.unused) == ["p/b.caption"]


def test_a_plan_lists_each_file_of_a_folder(tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    plan.extend_plan(cache, make_shards("x/a.jpg", "x/a.txt", "x/a.jpg.json", "b.png", a=7, b=9))
    (unit,) = plan.read_plan(cache)
    assert unit.paths == ("p/b.png", "p/x/a.jpg")
    assert unpack_files(unit) == [
        ImageFiles(PlannedFile("p/b.png", 9, "e-b.png"), ()),
        ImageFiles(
            PlannedFile("p/x/a.jpg", 1, "e-x/a.jpg"),
            (PlannedFile("p/x/a.jpg.json", 1, "e-x/a.jpg.json"), PlannedFile("p/x/a.txt", 1, "e-x/a.txt")),
        ),
    ]


def test_texts_do_not_change_the_name_of_a_unit() -> None:
    with_text, without = (make_units(make_shards(*names.split())) for names in ("a.jpg a.txt", "a.jpg"))
    assert with_text[0].name == without[0].name
    assert with_text[0].etag != without[0].etag


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("a.jpg a.txt", "a.jpg", ["p/a.txt"]),
        ("a.jpg", "a.jpg a.txt", ["p/a.txt"]),
        ("a.jpg a.txt", "a.jpg a.txt a.jpg.txt", ["p/a.jpg.txt", "p/a.txt"]),
    ],
)
def test_a_text_that_is_added_or_removed_is_noted(tmp_path: Path, before: str, after: str, changed: list[str]) -> None:
    cache = Folder(str(tmp_path))
    first, notes = plan.extend_plan(cache, make_shards(*before.split(), "b.jpg", "b.txt"))
    assert notes == []
    units, notes = plan.extend_plan(cache, make_shards(*after.split(), "b.jpg", "b.txt"))
    assert [unit.name for unit in units] == [unit.name for unit in first]
    texts = {f"p/{name}" for name in after.split() if name.endswith("txt")} - {
        "p/a.txt" if "a.jpg.txt" in after else ""
    }
    assert {text.path for files in unpack_files(units[0]) for text in files.texts} == texts | {"p/b.txt"}
    message = f"inputs that have changed since they were planned: {len(changed)} ({', '.join(changed)}); "
    assert notes[0] == f"{message}none of their samples are encoded yet, and they are planned again"


def test_edited_texts_are_counted_and_a_few_are_named(tmp_path: Path) -> None:
    cache, names = Folder(str(tmp_path)), [f"{n}.{kind}" for n in range(8) for kind in ("jpg", "txt")]
    plan.extend_plan(cache, make_shards(*names))
    edited = [shard if shard.path.endswith("jpg") else edit(shard) for shard in make_shards(*names)]
    _, (line,) = plan.extend_plan(cache, edited)
    assert line.startswith("inputs that have changed since they were planned: 8 (")
    assert "p/0.txt, p/1.txt, p/2.txt, p/3.txt, p/4.txt and 3 more" in line


def edit(shard: ListedFile) -> ListedFile:
    return ListedFile(root=shard.root, path=shard.path, bytes=shard.bytes, etag="another")


def test_an_unknown_etag_is_not_a_change(tmp_path: Path) -> None:
    cache, shards = Folder(str(tmp_path)), make_shards("a.jpg", "a.txt")
    unknown = [ListedFile(root=s.root, path=s.path, bytes=s.bytes, etag="") for s in shards]
    plan.extend_plan(cache, shards)
    assert plan.extend_plan(cache, unknown)[1] == []
    plan.extend_plan(Folder(str(tmp_path / "other")), unknown)
    assert plan.extend_plan(Folder(str(tmp_path / "other")), shards)[1] == []


@pytest.mark.parametrize("files", ["", "[]", "[[1]]", "{}", '[[1,"e",[1]]]'])
def test_a_plan_without_a_valid_list_of_files_is_an_error(files: str) -> None:
    (unit,) = make_units(make_shards("a.jpg"))
    with pytest.raises(CacheError, match=r"the plan has no valid list of the files of the unit p-\w+; "):
        unpack_files(replace(unit, files=files))
