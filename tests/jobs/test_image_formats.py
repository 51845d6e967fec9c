"""Whole jobs on images of many formats, with the options that decide how an image file becomes RGB."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentmill.part_files import read_rows, to_tensor
from pipeline.records import extension, is_image
from tests.conftest import encoded, slow_param, smooth, write_tar
from tests.jobs.test_odd_sources import read_rejects
from tests.pipeline.images.corpus import make_corpus
from tests.pipeline.images.profiles import convert_p3_to_srgb, make_p3

Command = Callable[..., tuple[int, str, str]]


def rows_of(cache: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((cache / "data").iterdir()):
        with file.open("rb") as stream:
            rows |= {row["key"]: row for row in read_rows(stream, file.name)}
    return rows


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def test_every_image_is_a_row_or_a_reject_that_names_its_format(encode: Command, tmp_path: Path) -> None:
    images = {f"{kind}_{end}": encoded(smooth(1), kind) for kind, end in (("AVIF", "avif"), ("TIFF", "TIF"))}
    others = {"a_svg": b"<svg/>", "b_cr2": b"II*\0\x10\0\0\0CR\2\0", "c_heic": b"\0\0\0\x18ftypcrx " + bytes(9)}
    source = write(tmp_path / "photos", **images, **others, d_jfif=encoded(smooth(2)), d_nef=b"raw", d_txt=b"text")
    code, out, err = encode(source)
    assert (code, sorted(rows_of(tmp_path / "c"))) == (3, ["AVIF", "TIFF", "d"])
    assert rows_of(tmp_path / "c")["d"]["txt"] == "text"
    assert [(reject["key"], reject["reason"]) for reject in read_rejects(tmp_path / "c")] == [
        (key, "unsupported_format") for key in "abc"
    ]
    assert "another format with the same name, which is used: 1 (photos/d.nef)" in err
    assert "encoded 3 images" in out
    _, _, again = encode(source)
    assert "skipped: 1" not in again
    tar = write_tar(tmp_path / "s/0.tar", {"0.jp2": encoded(smooth(1), "JPEG2000"), "1.psd": b"8BPS", "1.txt": b""})
    encode(tar, "--to", tmp_path / "tar")
    assert list(rows_of(tmp_path / "tar")) == ["0"]
    assert [reject["reason"] for reject in read_rejects(tmp_path / "tar")] == ["unsupported_format"]


@pytest.mark.parametrize("container", [slow_param("parquet"), "webdataset"])
def test_truncated_images_are_rows_that_say_so(
    encode: Command, latentmill: Command, tmp_path: Path, container: str
) -> None:
    data, cache = encoded(smooth(1)), tmp_path / "c"
    source = write(tmp_path / "photos", whole_jpg=data, cut_jpg=data[:-200], garbage_jpg=b"x")
    assert encode(source, "--allow-truncated", "--format", container)[0] == 3
    assert {key: row["truncated"] for key, row in rows_of(cache).items()} == {"cut": True, "whole": False}
    content = json.loads((cache / "cache.json").read_text())
    assert content["identity"]["preprocessing"]["allow_truncated"] is True
    assert "truncated files accepted" in (cache / "README.md").read_text()
    assert latentmill("verify", cache, "--reencode", 9)[0] == 0
    write(source, late_jpg=data[:-300], garbage_jpg=data[:-100])
    assert encode(source)[0] == 3  # the option is taken from the cache
    assert latentmill("retry", cache, "--workers", 0)[0] == 0
    assert [row["truncated"] for row in rows_of(cache).values()].count(True) == 3


def test_the_column_exists_only_with_the_option(encode: Command, tmp_path: Path) -> None:
    data = encoded(smooth(1))
    encode(write(tmp_path / "photos", whole_jpg=data, cut_jpg=data[:-200]))
    assert [list(row).count("truncated") for row in rows_of(tmp_path / "c").values()] == [0]
    assert [reject["reason"] for reject in read_rejects(tmp_path / "c")] == ["corrupt"]


def test_the_options_of_decoding_are_in_the_identity_and_decide_the_latents(encode: Command, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = smooth(1, 64, 64)
    hidden = np.dstack([pixels, np.zeros((64, 64), np.uint8)])
    files = {
        "turned": encoded(pixels, "PNG", exif=exif),
        "hidden": encoded(hidden, "PNG"),
        "wide": encoded(pixels, "PNG", icc_profile=make_p3()),
    }
    plain = {
        "turned": encoded(pixels, "PNG"),
        "hidden": encoded(pixels, "PNG"),
        "wide": encoded(convert_p3_to_srgb(pixels), "PNG"),
    }
    options = ("--exif", "ignore", "--alpha", "drop", "--color", "srgb")
    cache, source = tmp_path / "c", write(tmp_path / "a", **{f"{name}_png": data for name, data in files.items()})
    encode(source, *options)
    encode(write(tmp_path / "b", **{f"{name}_png": data for name, data in plain.items()}), "--to", tmp_path / "d")
    for key, row in rows_of(cache).items():
        latents = to_tensor(row).float(), to_tensor(rows_of(tmp_path / "d")[key]).float()
        assert (latents[0] - latents[1]).norm() <= 0.02 * latents[0].norm(), key
    preprocessing = json.loads((cache / "cache.json").read_text())["identity"]["preprocessing"]
    assert [preprocessing[name] for name in ("exif", "alpha", "color")] == ["ignore", "drop", "srgb"]
    assert encode(source, "--exif", "auto")[0] == encode(source)[0] == 0
    code, _, err = encode(source, "--alpha", "white")
    assert (code, "made with --alpha drop, this command has --alpha white" in err) == (2, True)


@pytest.mark.slow
def test_of_hundreds_of_odd_files_none_is_passed_over(encode: Command, tmp_path: Path) -> None:
    """An image is used under the extension of its format, and files that are no images under that of an image."""
    files = list(make_corpus())[::33]
    source = tmp_path / "photos"
    source.mkdir()
    for file in files:
        end = file.extension if is_image(file.name + file.extension) else ".jpg"
        (source / f"{file.name}{end}").write_bytes(file.data)
    assert len({extension(path.name) for path in source.iterdir()}) > 15
    code, _, err = encode(source, "--max-reject-rate", 1)
    assert code == 0
    assert "passed over" not in err
    assert "skipped" not in err
    rows, rejects = rows_of(tmp_path / "c"), read_rejects(tmp_path / "c")
    keys = {file.name.replace("%", "%25").replace(".", "%2E") for file in files}
    assert len(files) == len(keys) > 200
    assert sorted([*rows, *(reject["key"] for reject in rejects)]) == sorted(keys)
    assert len(rows) > 50
    assert {reject["reason"] for reject in rejects} >= {"corrupt", "not_an_image", "unsupported_format"}


def test_images_without_the_extension_of_an_image_are_noted_and_a_manifest_can_list_them(
    encode: Command, tmp_path: Path
) -> None:
    source, data = tmp_path / "photos", encoded(smooth(1))
    source.mkdir()
    for name in ("a", "b.jpg_large", "c.jpg~", "d.jpg"):
        (source / name).write_bytes(data)
    (source / "e.fit").write_bytes(b"SIMPLE  =                    T" + bytes(3000))
    _, _, err = encode(source)
    assert list(rows_of(tmp_path / "c")) == ["d"]
    assert [(reject["key"], reject["reason"]) for reject in read_rejects(tmp_path / "c")] == [
        ("e", "unsupported_format")
    ]
    assert "passed over files that are neither shards nor images: 1 without an extension, 1 .jpg_large, 1 .jpg~" in err
    (tmp_path / "m.jsonl").write_text('{"file_name": "photos/a"}\n{"file_name": "photos/c.jpg~"}\n')
    assert encode(tmp_path / "m.jsonl", "--to", tmp_path / "listed")[0] == 0
    assert sorted(rows_of(tmp_path / "listed")) == ["photos/a", "photos/c%2Ejpg~"]
