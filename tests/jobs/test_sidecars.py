"""Texts beside images: those without an image are named, and images without a text are counted."""

import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from pipeline.cache import plan
from tests.conftest import STAMP, encoded, img2dataset_members, smooth, write_tar

Command = Callable[..., tuple[int, str, str]]


def info_messages(err: str) -> list[str]:
    """Return the messages at level INFO, without the progress lines."""
    found = re.findall(rf"^{STAMP} INFO (.*)$", err, re.MULTILINE)
    return [text for text in found if not re.match(r" *\d+%", text)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", "a.jpg", "b.jpg", "c.jpg")


def write_images(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (path / name).write_bytes(encoded(smooth(number)))
    return path


def read_column(cache: Path, name: str) -> dict[str, Any]:
    table = ds.dataset(cache / "data").to_table(columns=["key", name])
    return dict(zip(table["key"].to_pylist(), table[name].to_pylist(), strict=True))


def test_texts_are_found_under_the_names_that_tools_use(encode: Command, source: Path, tmp_path: Path) -> None:
    write_images(source, "d.jpg", unicodedata.normalize("NFC", "caf\u00e9") + ".jpg", "f.png")
    (source / "a.jpg.txt").write_text("gallery-dl")
    (source / "a.jpg.json").write_text("{}")
    (source / "b.TXT").write_text("DOS")
    (source / "C.txt").write_text("another case")
    (source / "d.txt").write_bytes(b"\xef\xbb\xbfNotepad")
    (source / (unicodedata.normalize("NFD", "caf\u00e9") + ".txt")).write_text("macOS")
    code, out, err = encode(source)
    assert code == 0, err
    assert read_column(tmp_path / "c", "txt") == {
        "a": "gallery-dl",
        "b": "DOS",
        "c": "another case",
        "d": "Notepad",
        unicodedata.normalize("NFC", "caf\u00e9"): "macOS",
        "f": None,
    }
    assert read_column(tmp_path / "c", "json")["a"] == "{}"
    assert "  texts      1 of 6 images have no txt, 5 of 6 images have no json" in out
    assert info_messages(err) == []


def test_texts_without_an_image_are_named(encode: Command, source: Path) -> None:
    for name in ("a.txt", "a.jpg.txt", "x.txt", "y.txt"):
        (source / name).write_text("t")
    _, _, err = encode(source)
    assert (
        "INFO texts that belong to no image or to several images, or that another text replaces: 3 "
        "(photos/a.txt, photos/x.txt, photos/y.txt)\n" in err
    )


def test_images_without_a_text_are_counted_if_others_have_one(encode: Command, source: Path) -> None:
    (source / "a.txt").write_text("one")
    _, out, _ = encode(source, "--json")
    run = json.loads(out)["run"]
    assert (run["counts"]["encoded"], run["texts"]) == (3, {"txt": 1, "json": 0})


def test_the_summary_reports_that_no_image_has_a_caption(encode: Command, source: Path) -> None:
    _, out, _ = encode(source)
    assert "\n  texts      none of 3 images has a text (txt, json)\n" in out


def test_the_summary_reports_no_missing_texts_if_captions_are_in_metadata(
    encode: Command, source: Path, tmp_path: Path
) -> None:
    (source / "metadata.csv").write_text("file_name,score\na.jpg,1\n")
    assert "\n  texts      none of 3 images" in encode(source)[1]
    (source / "metadata.csv").write_text("file_name,caption\na.jpg,A\n")
    code, out, _ = encode(source, "--to", tmp_path / "d")
    assert (code, "  texts " in out) == (0, False)
    (source / "a.txt").write_text("a text of one image")
    assert "\n  texts      2 of 3 images have no txt" in encode(source, "--to", tmp_path / "e")[1]


def test_captions_have_the_extensions_and_the_encoding_that_are_given(
    encode: Command, source: Path, tmp_path: Path
) -> None:
    (source / "a.caption").write_bytes("caf\xe9".encode("cp1252"))
    (source / "b.jpg.caption").write_bytes("PowerShell's \xe9".encode("utf-16"))
    (source / "c.caption").write_bytes(b"\x81 is not in cp1252")
    (source / "a.tags").write_text("\n red hair \n\nblue eyes\n")
    (source / "b.tags").write_text("one, two\n")
    (source / "a.txt").write_bytes(b"not a column: \xff")
    options = ("--caption-extensions", ".caption,tags", "--max-reject-rate", 1)
    code, out, err = encode(source, *options, "--text-encoding", "cp1252")
    assert code == 0, err
    assert read_column(tmp_path / "c", "caption") == {"a": "caf\xe9", "b": "PowerShell's \xe9"}
    assert read_column(tmp_path / "c", "tags") == {"a": "red hair, blue eyes", "b": "one, two"}
    assert "c in photos (bad_text)" in out
    assert encode(source)[0] == 3, "options that are left out have the cache's values"
    code, _, err = encode(source, *options, "--text-encoding", "latin-1")
    assert (code, "--text-encoding cp1252, this command has --text-encoding iso8859-1" in err) == (2, True)
    assert encode(source, "--text-encoding", "hex", "--to", tmp_path / "d")[0] == 2
    assert encode(source, "--caption-extensions", "txt,jpg", "--to", tmp_path / "d")[0] == 2


def test_samples_of_tars_without_a_text_are_counted(encode: Command, tmp_path: Path) -> None:
    members = img2dataset_members(0, 4)
    del members["000000002.txt"]
    write_tar(tmp_path / "tars/0.tar", members)
    _, out, _ = encode(tmp_path / "tars")
    assert "  texts      1 of 4 images have no txt\n" in out


def test_edited_texts_are_reported_by_the_next_run(encode: Command, source: Path) -> None:
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("two")
    assert encode(source)[0] == 0
    assert "changed" not in encode(source)[2]
    (source / "a.txt").write_text("another caption")
    (source / "b.txt").unlink()
    (source / "c.txt").write_text("new")
    code, out, err = encode(source)
    assert (code, "encoded 0 images" in out) == (0, True)
    assert (
        "INFO inputs that have changed since they were planned: 3 (photos/a.txt, photos/b.txt, photos/c.txt); the "
        "cache still holds the old version" in err
    )


def test_with_same_source_the_times_of_files_may_differ(
    encode: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "a.txt").write_text("one")
    extend = plan.extend_plan

    def extend_and_touch(*args: Any, **kwargs: Any) -> Any:
        planned = extend(*args, **kwargs)
        for path in source.iterdir():
            os.utime(path, (1, 1))
        return planned

    monkeypatch.setattr(plan, "extend_plan", extend_and_touch)
    code, out, err = encode(source, "--same-source")
    assert (code, err, "encoded 3 images" in out) == (0, "", True)


def test_a_caption_that_changes_after_planning_fails_its_unit(
    encode: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "a.txt").write_text("one")
    extend = plan.extend_plan

    def extend_and_edit(*args: Any, **kwargs: Any) -> Any:
        planned = extend(*args, **kwargs)
        (source / "a.txt").write_text("edited")
        return planned

    monkeypatch.setattr(plan, "extend_plan", extend_and_edit)
    code, _, err = encode(source)
    assert code == 1
    assert f"{source}/a.txt has changed since it was planned (then 3 bytes)" in err


def test_other_texts_are_planned_on_request(encode: Command, source: Path, tmp_path: Path) -> None:
    (source / "a.caption").write_text("kohya")
    (source / "b.jpg.caption").write_text("of the whole name")
    (source / "c.txt").write_text("not wanted")
    (source / "x.caption").write_text("of none")
    code, out, err = encode(source, "--columns", "caption")
    assert code == 0, err
    assert read_column(tmp_path / "c", "caption") == {"a": "kohya", "b": "of the whole name", "c": None}
    assert "1 of 3 images have no caption" in out
    assert "INFO texts that belong to no image or to several images, or that another text replaces: 1 (" in err
    assert ".caption" not in err.replace("x.caption", "")
    (source / "c.txt").write_text("edited, but the cache has no such column")
    (source / "a.caption").write_text("edited")
    _, _, err = encode(source, "--columns", "caption")
    assert "since they were planned: 1 (photos/a.caption);" in err


@pytest.mark.parametrize("pattern", ["*.jpg", "{a,b,c}.jpg"])
def test_captions_are_found_for_images_given_by_a_pattern(
    encode: Command, source: Path, tmp_path: Path, pattern: str
) -> None:
    (source / "a.txt").write_text("one")
    assert encode(f"{source}/{pattern}")[0] == 0
    assert read_column(tmp_path / "c", "txt") == {"a": "one", "b": None, "c": None}
    _, out, err = encode(source)
    assert "encoded 0 images" in out
    assert info_messages(err) == []


def test_a_caption_that_is_a_broken_link_rejects_its_image(encode: Command, source: Path, tmp_path: Path) -> None:
    os.symlink("nowhere", source / "a.txt")
    code, out, _ = encode(source, "--max-reject-rate", 0.5)
    assert (code, "1 image_not_embedded" in out) == (0, True)


@pytest.mark.slow
def test_a_repaired_and_retried_image_is_the_original_of_its_row(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path
) -> None:
    """The same holds for its caption, although the plan has the old files. Other files must still match the plan."""
    (source / "b.txt").write_bytes(b"caf\xe9")
    (source / "c.txt").write_text("c")
    intact = (source / "a.jpg").read_bytes()
    (source / "a.jpg").write_bytes(intact[:-100])
    assert encode(source, "--max-reject-rate", 1)[0] == 0
    (source / "a.jpg").write_bytes(intact)
    (source / "b.txt").write_text("caf\u00e9", encoding="utf-8")
    cache = tmp_path / "c"
    assert latentmill("retry", cache, "--workers", 0)[0] == 0
    assert read_column(cache, "txt") == {"a": None, "b": "caf\u00e9", "c": "c"}
    code, out, _ = latentmill("verify", cache, "--recount", "--reencode", 3)
    assert code == 0, out
    code, out, _ = latentmill("decode", cache, "--to", tmp_path / "out", "--workers", 0, "--json")
    assert (code, all(image["psnr"] for image in json.loads(out)["images"])) == (0, True)
    (source / "c.txt").write_text("edited")
    code, out, _ = latentmill("verify", cache, "--recount")
    assert (code, "its images or their columns differ from those in data/" in out) == (1, True)
