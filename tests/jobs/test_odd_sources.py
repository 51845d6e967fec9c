"""Sources with unusual files: files that are neither shards nor images are skipped and reported once."""

import bz2
import gzip
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.storage import reading
from tests.conftest import img2dataset_members, write_tar
from tests.jobs.test_sources import make_images, read_column, read_table

Command = Callable[..., tuple[int, str, str]]


def read_rejects(cache: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted((cache / "_rejects").iterdir()) for line in path.read_text().splitlines()
    ]


def test_a_tar_from_macos_keeps_its_captions(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    members = {"README": b"", "000.idx": b""}
    for name, data in img2dataset_members(0, 3).items():
        members |= {f"./._{name}": b"\x00\x05\x16\x07", f"./{name}": data}
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", members)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "rejected   0" in out) == (0, True), err
    assert list(read_column(tmp_path / "c", "txt").values()) == ["image 0", "image 1", "image 2"]
    (note,) = (line for line in err.splitlines() if "no part of a sample" in line)
    assert "18 hidden files" in note
    assert "4 documents and indexes" in note
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_texts_that_are_not_next_to_their_images_are_reported(encode: Command, tmp_path: Path) -> None:
    members = sorted(img2dataset_members(0, 3).items(), key=lambda member: member[0].rpartition(".")[2])
    write_tar(tmp_path / "s/0.tar", dict(members))
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, err.count("INFO 3 images are not next to their texts")) == (3, 1), err
    assert all("its image is elsewhere in the tar" in reject["detail"] for reject in read_rejects(tmp_path / "c")[3:])


def compress(path: Path) -> None:
    path.write_bytes(bz2.compress(path.read_bytes()))


def test_a_bzip2_file_named_tar_is_refused_before_any_write(encode: Command, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(0, 1))
    compress(tmp_path / "s/1.tar")
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, f"{tmp_path}/s/1.tar is not a tar, but a bzip2 file; compress it with gzip" in err) == (2, True), err
    assert not (tmp_path / "c").exists()


def test_a_bzip2_file_that_was_not_inspected_fails_its_unit(encode: Command, tmp_path: Path) -> None:
    """Only a few tars are inspected before the job starts."""
    for number in range(40):
        write_tar(tmp_path / f"s/{number:02}.tar", img2dataset_members(number, 1))
    compress(tmp_path / "s/01.tar")
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "failed: unit 01-" in err, "01.tar is not a tar, but a bzip2 file" in err) == (1, True, True), err
    assert "rejected   0" in out, "none of its samples counts as read"


def test_a_tar_that_cannot_be_opened_fails_only_its_unit(
    encode: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is simulated, because root may read any file."""
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(number, 1))
    open_stream = reading.open_stream

    @contextmanager
    def open_or_refuse(url: str, *args: Any, **kwargs: Any) -> Iterator[BinaryIO]:
        if url.endswith("1.tar"):
            raise StorageError(f"cannot read {url}: permission denied")
        with open_stream(url, *args, **kwargs) as stream:
            yield stream

    monkeypatch.setattr(reading, "open_stream", open_or_refuse)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "encoded 1 image in" in out, "1.tar: permission denied" in err) == (1, True, True), err


def test_a_folder_that_cannot_be_read_is_named_and_is_a_failure(
    encode: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is simulated, because root may list any folder."""
    write_photos(tmp_path / "s")
    write_photos(tmp_path / "s/closed")
    listdir = os.listdir

    def list_or_refuse(path: str) -> list[str]:
        if path.endswith("closed"):
            raise PermissionError(13, "no")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", list_or_refuse)
    code, out, err = encode(tmp_path / "s")
    assert (code, "encoded 2 images" in out) == (1, True), err
    assert f"WARNING folder not readable, its images are not encoded: {tmp_path}/s/closed\n" in err
    assert "ERROR 1 folder of the sources cannot be read: give read permission, and run the same command again" in err
    (run,) = (tmp_path / "c/_runs").glob("*.json")
    record = json.loads(run.read_text())
    assert (record["outcome"], record["exit_code"]) == ("failed", 1)
    code, out, _ = encode(tmp_path / "s", "--json")
    assert (code, json.loads(out)["unreadable"]) == (1, [f"{tmp_path}/s/closed"])
    monkeypatch.undo()
    code, out, err = encode(tmp_path / "s")
    assert (code, "encoded 2 images" in out, err) == (0, True, "")


@pytest.mark.parametrize("name", ["0.tar.zst", "0.tar.bz2", "0.7z", "0.TAR.XZ"])
def test_compressed_archives_are_named(encode: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_bytes(b"0")
    message = f"archives of this kind are not supported: {tmp_path}/s/{name}; compress it with gzip"
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, message in err) == (2, True), err
    write_tar(tmp_path / "s/1.tar", img2dataset_members(0, 1))
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, f"INFO {message}" in err) == (0, True), err


def test_a_compressed_copy_of_a_tar_is_noted(encode: Command, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 2))
    (tmp_path / "s/0.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    code, out, err = encode(tmp_path / "s")
    assert (code, "encoded 4 images" in out) == (0, True), err
    assert "INFO archives that differ only in their extension, and are all encoded: 2 (s/0.tar, s/0.tar.gz); if" in err


def test_metadata_beside_a_zip_is_joined_by_key(encode: Command, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with zipfile.ZipFile(tmp_path / "s/0.zip", "w") as archive:
        for name, image in zip("ab", make_images(0, 2), strict=True):
            archive.writestr(f"{name}.jpg", image)
    (tmp_path / "s/metadata.jsonl").write_text('{"key": "b", "score": 1.5}\n')
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert code == 0, err
    assert read_column(tmp_path / "c", "score") == {"a": None, "b": 1.5}


def test_a_zip_without_images_is_noted(encode: Command, tmp_path: Path) -> None:
    """Data sets have annotations beside their images."""
    (tmp_path / "s").mkdir()
    for name, member, data in (("images", "0.jpg", make_images(0, 1)[0]), ("annotations", "a/b.json", b"{}")):
        with zipfile.ZipFile(tmp_path / f"s/{name}.zip", "w") as archive:
            archive.writestr(member, data)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "encoded 1 image in" in out) == (0, True), err
    assert "INFO skipped 1 files without images, and their columns: s/annotations.zip" in err
    code, _, err = encode(tmp_path / "s/annotations.zip", "--to", tmp_path / "d")
    assert (code, "s/annotations.zip has no images" in err) == (2, True), err


def write_table(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


IMAGES = {"image": pa.array(make_images(0, 2)), "text": ["zero", "one"]}


@pytest.mark.parametrize(
    "first",
    [
        {"image": pa.nulls(0), "text": pa.nulls(0)},
        {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())},
        {"image": pa.nulls(0), "text": pa.array([], pa.string()).dictionary_encode()},
    ],
)
def test_an_empty_first_file_does_not_determine_the_columns(
    encode: Command, tmp_path: Path, first: dict[str, Any]
) -> None:
    write_table(tmp_path / "s/0.parquet", **first)
    write_table(tmp_path / "s/1.parquet", **IMAGES)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "rejected   0" in out) == (0, True), err
    assert read_column(tmp_path / "c", "text") == {"0": "zero", "1": "one"}
    assert "image" not in read_table(tmp_path / "c").column_names


def test_a_column_without_a_type_takes_the_type_of_other_files(encode: Command, tmp_path: Path) -> None:
    """pandas writes no type for a column of nulls. A column without a type in all inspected files is text."""
    for number in range(40):
        text = ["a text"] if number == 1 else pa.nulls(1)
        label = pa.array([1]) if number == 20 else pa.nulls(1)
        write_table(tmp_path / f"s/{number:02}.parquet", image=pa.array(make_images(number, 1)), text=text, label=label)
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert code == 0, err
    table = read_table(tmp_path / "c")
    assert (table.schema.field("text").type, table.schema.field("label").type) == (pa.string(), pa.int64())
    assert [text for text in table["text"].to_pylist() if text] == ["a text"]
    assert [label for label in table["label"].to_pylist() if label] == [1]


def write_tars(folder: Path) -> None:
    write_tar(folder / "00000.tar", img2dataset_members(0, 2))


def write_photos(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(make_images(0, 2)):
        (folder / f"{number}.jpg").write_bytes(data)


def write_parquet_file(folder: Path) -> None:
    write_table(folder / "a.parquet", **IMAGES)


@pytest.mark.parametrize("write_source", [write_tars, write_photos, write_parquet_file])
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("captions.parquet", {"file_name": ["0.jpg", "1.jpg"], "caption": ["zero", "one"]}),
        ("00001.parquet", {"key": ["2", "3"], "url": ["http://host/2", "http://host/3"], "status": ["success"] * 2}),
        ("clip.parquet", {"clip": [[1.0], [2.0]]}),
    ],
)
def test_parquet_files_without_images_are_skipped(
    encode: Command,
    latentmill: Command,
    tmp_path: Path,
    write_source: Callable[[Path], None],
    name: str,
    columns: dict[str, Any],
) -> None:
    write_source(tmp_path / "s")
    write_table(tmp_path / "s" / name, **columns)
    write_table(tmp_path / "s/deeper" / name, **columns)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "encoded 2 images" in out, "rejected   0" in out) == (0, True, True), err
    assert err.count("INFO skipped 2 files without images") == 1
    assert f"s/{name}" in err
    assert not (set(columns) - {"key"}) & set(read_table(tmp_path / "c").column_names)
    assert "encoded 0 images" in encode(tmp_path / "s", "--to", tmp_path / "c")[1]
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_internal_files_of_a_delta_table_are_not_read(encode: Command, tmp_path: Path) -> None:
    write_table(tmp_path / "s/part-0.snappy.parquet", **IMAGES)
    write_table(tmp_path / "s/_delta_log/00000000000000000010.checkpoint.parquet", protocol=[1], add=["x"])
    write_table(tmp_path / "s/_change_data/cdc-0.parquet", **IMAGES)
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "encoded 2 images" in out) == (0, True), err
    assert "INFO passed over 2 Parquet files of Delta Lake's and Spark's own, in _delta_log and the like" in err
    write_table(tmp_path / "_change_data/0.parquet", **IMAGES)
    assert encode(tmp_path / "_change_data", "--to", tmp_path / "d")[0] == 0, "a source may have this name"


def test_images_are_found_among_many_files_without_images(encode: Command, tmp_path: Path) -> None:
    """A few files are inspected, and more if none of them has images."""
    for number in range(32):
        write_table(tmp_path / f"s/{number:02}-a.parquet", key=["x"])
        write_table(
            tmp_path / f"s/{number:02}-b.parquet", image=pa.array(make_images(number, 1)), text=[f"text {number}"]
        )
    code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "encoded 32 images" in out) == (0, True), err
    assert "skipped 32 files without images" in err
    assert sorted(read_table(tmp_path / "c")["text"].to_pylist()) == sorted(f"text {number}" for number in range(32))


def test_sources_without_images_are_refused(encode: Command, tmp_path: Path) -> None:
    for number in range(40):
        write_table(tmp_path / f"s/{number:02}.parquet", key=["x"], URL=["http://host/0.jpg"])
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "has no column with the bytes of images: it has key, URL" in err) == (2, True), err
    assert "to read the images that URL names, give the file itself as the source" in err
    assert not (tmp_path / "c").exists()


def test_a_requested_image_column_must_be_in_every_file(encode: Command, tmp_path: Path) -> None:
    write_table(tmp_path / "s/0.parquet", **IMAGES)
    write_table(tmp_path / "s/1.parquet", key=["x"])
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c", "--image-column", "image")
    assert (code, "1.parquet: the column image does not exist; columns: key" in err) == (2, True), err


def test_a_key_column_that_does_not_exist_is_refused_before_any_write(encode: Command, tmp_path: Path) -> None:
    write_table(tmp_path / "p/pq.parquet", id=["a", "b"], **IMAGES)
    code, _, err = encode(tmp_path / "p", "--key-column", "nope")
    assert (code, f"--key-column: {tmp_path}/p/pq.parquet has no column nope; it has id, text" in err) == (2, True), err
    assert not (tmp_path / "c").exists()
    assert encode(tmp_path / "p", "--key-column", "id")[0] == 0
    assert read_column(tmp_path / "c", "text") == {"a": "zero", "b": "one"}


@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        ("--key-column", "Parquet files, Arrow files and manifests"),
        ("--image-column", "tars, zips, Parquet and Arrow files"),
    ],
)
def test_options_of_other_kinds_of_files_are_refused_for_a_folder(
    encode: Command, photos: Path, tmp_path: Path, option: str, kinds: str
) -> None:
    code, _, err = encode(photos, option, "id")
    assert (code, f"{option} is for {kinds}" in err) == (2, True), err
    assert not (tmp_path / "c").exists()


def test_images_of_an_unsupported_type_fail_their_unit(encode: Command, tmp_path: Path) -> None:
    """The file is not inspected before the job starts."""
    for number in range(40):
        write_table(tmp_path / f"s/{number:02}.parquet", **IMAGES)
    write_table(tmp_path / "s/01.parquet", image=["aGVsbG8="])
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert (code, "failed: unit 01-" in err, "image is string, not binary" in err) == (1, True, True), err


def test_tars_whose_parquet_file_was_removed_are_counted(encode: Command, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(2 * number, 2))
        write_table(tmp_path / f"s/{number}.parquet", key=[f"{2 * number + n:09d}" for n in range(2)], score=[0.5, 1.5])
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c", "--max-shards", 1)
    assert (code, "metadata" in err) == (0, False)
    (tmp_path / "s/1.parquet").unlink()
    code, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert code == 0
    message = "tars without a metadata file (.parquet) beside them, although columns of the cache come from there: 1;"
    assert f"INFO {message}" in err
