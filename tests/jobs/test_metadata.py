"""Metadata beside images and tars: their columns are those of the rows."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.conftest import encoded, img2dataset_members, smooth, write_tar

Command = Callable[..., tuple[int, str, str]]


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(smooth(number)))
    return folder


def read_columns(cache: Path, *names: str) -> dict[str, Any]:
    table = ds.dataset(cache / "data").to_table(columns=["key", *names])
    return {row.pop("key"): tuple(row.values()) for row in table.to_pylist()}


def write_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_nearest_metadata_give_the_columns_of_an_image(encode: Command, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", "a.jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg", "other/e.jpg")
    (photos / "a.txt").write_text("a text beside it")
    rows: list[dict[str, Any]] = [
        {"file_name": "a.jpg", "caption": "A", "score": 1, "txt": "not this one"},
        {"file_name": "./other/e.jpg", "caption": "E", "score": 0.5, "txt": "of the table"},
        {"file_name": "../outside.jpg", "caption": "X", "score": 0.5},
        {"file_name": "gone.jpg", "caption": "X", "score": 0.5},
    ]
    write_jsonl(photos / "metadata.jsonl", *rows)
    (photos / "sub/metadata.csv").write_text("file_name,caption,score\nc.jpg,C,3\ndeep/d.jpg,D,4\n")
    code, _, err = encode(photos)
    assert code == 0, err
    assert read_columns(tmp_path / "c", "caption", "score", "txt") == {
        "a": ("A", 1.0, "a text beside it"),
        "b": (None, None, None),
        "other/e": ("E", 0.5, "of the table"),
        "sub/c": ("C", 3.0, None),
        "sub/deep/d": ("D", 4.0, None),
    }
    assert "INFO images without a row in their metadata, whose columns are null: 1 of 5 (photos/b.jpg)\n" in err
    assert "INFO rows of metadata without an image: 2 of 6 (../outside.jpg, gone.jpg)\n" in err


def test_edited_metadata_are_reported_and_found_by_verify(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", "a.jpg", "b.jpg")
    write_jsonl(photos / "metadata.jsonl", {"file_name": "a.jpg", "caption": "A"}, {"file_name": "b.jpg"})
    assert encode(photos)[0] == 0
    assert "changed" not in encode(photos)[2]
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0
    os.rename(tmp_path / "photos", tmp_path / "moved")
    assert latentmill("verify", tmp_path / "c", "--recount", "--source", f"photos={tmp_path / 'moved'}")[0] == 0
    os.rename(tmp_path / "moved", tmp_path / "photos")
    write_jsonl(photos / "metadata.jsonl", {"file_name": "a.jpg", "caption": "edited"}, {"file_name": "b.jpg"})
    code, out, err = encode(photos)
    assert (code, "encoded 0 images" in out) == (0, True)
    assert "inputs that have changed since they were planned: 1 (photos/metadata.jsonl); the cache still holds" in err
    code, out, _ = latentmill("verify", tmp_path / "c", "--recount")
    assert (code, "its images or their columns differ from those in data/" in out) == (1, True)


def test_metadata_of_tars_are_joined_by_key(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"tars/{number}.tar", img2dataset_members(2 * number, 2))
    keys = [f"{number:09d}" for number in range(3)]
    pq.write_table(pa.table({"key": keys, "label": [7, 8, 9]}), tmp_path / "tars/metadata.parquet")
    code, _, err = encode(tmp_path / "tars")
    assert code == 0, err
    assert read_columns(tmp_path / "c", "label") == {
        **{key: (label,) for key, label in zip(keys, (7, 8, 9), strict=True)},
        "000000003": (None,),
    }
    assert "samples of tars without a row in their metadata, whose columns are null: 1\n" in err
    os.utime(tmp_path / "tars/metadata.parquet", (0, 0))  # as of a copy on another disk
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0
    pq.write_table(pa.table({"key": keys, "label": [7, 8, 5]}), tmp_path / "tars/metadata.parquet")
    code, out, _ = latentmill("verify", tmp_path / "c", "--recount")
    assert (code, "its images or their columns differ from those in data/" in out) == (1, True)
    pq.write_table(pa.table({"key": [*keys, keys[0]], "label": [7, 8, 9, 1]}), tmp_path / "tars/metadata.parquet")
    code, _, err = encode(tmp_path / "tars", "--to", tmp_path / "d")
    assert (code, "several rows of one sample: 000000000; keep one of them" in err) == (2, True), err


def test_tables_inside_archives_are_reported(encode: Command, tmp_path: Path) -> None:
    labels = json.dumps({"labels": [["00000/img00000000.png", 6]]})
    with zipfile.ZipFile(tmp_path / "edm2.zip", "w") as archive:
        archive.writestr("00000/img00000000.png", encoded(smooth(0), "PNG"))
        archive.writestr("dataset.json", labels)
    code, out, err = encode(tmp_path / "edm2.zip")
    assert (code, "rejected   0" in out) == (0, True), err
    assert "WARNING tables of metadata inside tars or zips, whose columns and labels are not used: 1 (" in err
    assert "edm2.zip): unpack" in err


def test_the_files_that_img2dataset_writes(encode: Command, tmp_path: Path) -> None:
    write_images(tmp_path / "set/00000", "000000000.jpg", "000000001.jpg")
    table = pa.table({"key": ["000000000", "000000001", "000000002"], "status": ["success", "success", "failed"]})
    pq.write_table(table, tmp_path / "set/00000.parquet")
    code, _, err = encode(tmp_path / "set")
    assert code == 0, err
    assert set(read_columns(tmp_path / "c", "status").values()) == {("success",)}
    assert "rows of metadata without an image: 1 of 3 (000000002)" in err


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"metadata.csv": "file_name,n\na.jpg,1\na.jpg,2\n"}, "several rows of one image: a.jpg; keep one of them"),
        ({"metadata.csv": "file_name\n", "metadata.jsonl": "{}\n"}, "are both metadata of one folder"),
        ({"metadata.jsonl": "nonsense\n"}, "metadata.jsonl cannot be read as JSONL"),
        ({"metadata.jsonl": '{"file_name": "a.jpg", "more": [{}]}\n'}, "more has objects without fields only"),
        ({"dataset.json": '{"labels": [1]}'}, "its `labels` are not pairs of a path and a label"),
    ],
)
def test_ambiguous_metadata_are_refused(encode: Command, tmp_path: Path, files: dict[str, str], problem: str) -> None:
    photos = write_images(tmp_path / "photos", "a.jpg")
    for name, text in files.items():
        (photos / name).write_text(text)
    code, _, err = encode(photos)
    assert (code, problem in err) == (2, True), err


def test_files_with_the_names_of_metadata_may_be_something_else(encode: Command, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", "a.jpg", "b.jpg", "sub/dataset.jpg")
    (photos / "dataset.json").write_text('{"name": "not of EDM2"}')
    (photos / "sub/dataset.json").write_text('{"labels": [["of the image of this name", 1]]}')
    table = pa.table({"jpg": pa.array([encoded(smooth(5))])})
    pq.write_table(table, photos / "metadata.parquet")
    code, out, err = encode(photos)
    assert (code, "encoded 4 images" in out) == (0, True), err
    assert read_columns(tmp_path / "c", "json")["sub/dataset"] == ('{"labels": [["of the image of this name", 1]]}',)


def test_globs_choose_files_and_are_kept_by_the_cache(encode: Command, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", "a.jpg", "a_mask.jpg", "rejected/b.jpg")
    code, out, err = encode(photos, "--exclude", "*_mask.*", "--exclude", "rejected/")
    assert (code, "encoded 1 image" in out) == (0, True), err
    note = "left out by --include or --exclude: 2 (photos/a_mask.jpg, photos/rejected/b.jpg)"
    assert note in err
    code, out, err = encode(photos)
    assert (code, "encoded 0 images" in out, note in err) == (0, True, True)
    code, _, err = encode(photos, "--exclude", "*_mask.*")
    assert (code, "--exclude '*_mask.*' --exclude 'rejected/'" in err) == (2, True)
    assert encode(photos, "--exclude", "/", "--to", tmp_path / "d")[0] == 2


def test_options_without_effect_are_refused(encode: Command, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", "a.jpg")
    assert "--image-column is for" in encode(photos, "--image-column", "where")[2]
    write_jsonl(photos / "metadata.jsonl", {"where": "a.jpg", "caption": "A"})
    assert "--key-column is for" in encode(photos, "--key-column", "caption")[2]
    assert "--image-root is for" in encode(photos, "--image-root", photos)[2]
    assert encode(photos, "--image-column", "where")[0] == 0
    assert read_columns(tmp_path / "c", "caption") == {"a": ("A",)}
    assert encode(photos, "--image-root", photos)[0] == 2
