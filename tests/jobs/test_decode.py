"""Previews and statistics, through the command line, without Ray."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(latentmill: Command, photos: Path, micro_vae: Path, tmp_path: Path) -> Path:
    """Return a cache of the photos at 64 px, made with the micro model."""
    folder = tmp_path / "c"
    latentmill("encode", photos, "--to", folder, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    return folder


def read_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_every_image_is_drawn_beside_its_original(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    code, out, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0)
    report = json.loads((tmp_path / "p/report.json").read_text())
    assert (code, err) == (0, "")
    assert "decoded 5 images" in out
    assert [image["key"] for image in report["images"]] == ["a/1", "a/2", "b/1", "b/2", "b/3"]
    assert all(0 < image["psnr"] < 30 for image in report["images"])
    assert report["psnr"]["min"] <= report["psnr"]["mean"] <= report["psnr"]["max"]
    for image in report["images"]:
        assert read_size(tmp_path / "p" / image["file"]) == (64, 64)
    assert report["sheets"] == ["sheets/00000.png"]
    assert read_size(tmp_path / "p/sheets/00000.png")[0] > 3 * 2 * 256


def test_the_limit_is_spread_over_the_cache(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0, "--limit", 2)
    report = json.loads((tmp_path / "p/report.json").read_text())
    assert [image["key"] for image in report["images"]] == ["a/1", "b/1"]


def test_without_the_source_only_decoded_images_are_drawn(
    latentmill: Command, micro_vae: Path, tmp_path: Path, photos: Path
) -> None:
    source, cache = tmp_path / "photos", tmp_path / "c"
    source.mkdir()
    (source / "x.jpg").write_bytes((photos / "a/1.jpg").read_bytes())
    latentmill("encode", source, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    (tmp_path / "elsewhere").mkdir()
    source.rename(tmp_path / "elsewhere/photos")

    code, out, _ = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0, "--json")
    assert code == 0
    assert json.loads(out)["psnr"] is None
    _, _, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0)
    (line,) = err.splitlines()
    assert f" INFO originals not shown: {source} is missing or empty, " in line
    assert line.endswith("; give their location with --source photos=PATH"), line

    moved = ("--source", tmp_path / "elsewhere/photos")
    _, out, _ = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0, "--json", *moved)
    assert json.loads(out)["psnr"] is not None


def test_missing_originals_of_many_shards_give_one_line(
    latentmill: Command, micro_vae: Path, tmp_path: Path, shards: Path
) -> None:
    source, cache = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "c"
    latentmill("encode", source, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    source.rename(tmp_path / "elsewhere")
    _, _, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0)
    (line,) = err.splitlines()
    assert f" INFO originals not shown: cannot read {source}/00000.tar: no such file" in line
    assert line.endswith("; give their location with --source shards=PATH (2 more such lines in report.json)"), line


def test_originals_are_found_in_a_copy_without_times(
    latentmill: Command, cache: Path, photos: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy" / photos.name
    shutil.copytree(photos, copy)
    for image in copy.rglob("*.*"):
        os.utime(image, (1, 1))
    moved = ("--source", copy)
    _, out, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0, "--json", *moved)
    assert (err, json.loads(out)["psnr"] is None) == ("", False)


def test_an_original_is_drawn_if_only_its_caption_was_edited(
    latentmill: Command, photos: Path, micro_vae: Path, tmp_path: Path
) -> None:
    source, cache = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "cache"
    (source / "a/1.txt").write_text("one")
    latentmill("encode", source, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    (source / "a/1.txt").write_text("another caption")
    _, out, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0, "--json")
    assert (err, json.loads(out)["psnr"] is None) == ("", False)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_damaged_file_of_the_cache_is_named_and_not_read_again(
    latentmill: Command, photos: Path, micro_vae: Path, tmp_path: Path, form: str
) -> None:
    cache = tmp_path / "c"
    options = ("--vae", micro_vae, "--resolution", 64, "--workers", 0, "--format", form)
    assert latentmill("encode", photos, "--to", cache, *options)[0] == 0
    (file,) = (cache / "data").iterdir()
    data = bytearray(file.read_bytes())
    if form == "parquet":
        data[1000] ^= 255
    else:
        del data[5000:]
    file.write_bytes(data)
    code, _, err = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0)
    assert code == 1
    (line,) = err.splitlines()
    assert line.endswith(f" ERROR failed: part 0: {file} is damaged; run `latentmill verify {cache}`")


def test_previews_can_be_written_into_the_cache(latentmill: Command, cache: Path) -> None:
    assert latentmill("decode", cache, "--to", cache / "previews", "--workers", 0)[0] == 0
    assert read_size(cache / "previews/sheets/00000.png")[0] > 3 * 2 * 256


def test_another_model_is_refused(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    code, _, err = latentmill("decode", cache, "--to", tmp_path / "p", "--vae", "demo", "--workers", 0)
    assert code == 2
    assert "demo is not the VAE that made the cache" in err


@pytest.mark.parametrize("verb", ["decode", "retry", "stats", "status", "verify"])
def test_a_folder_without_a_cache_is_refused(latentmill: Command, photos: Path, tmp_path: Path, verb: str) -> None:
    to = ("--to", tmp_path / "p") if verb == "decode" else ()
    for folder in (photos, tmp_path / "nothing"):
        code, out, err = latentmill(verb, folder, *to)
        message = f"latentmill: there is no latentmill cache at {folder}: it has no cache.json\n"
        assert (code, out, err) == (2, "", message)


def test_statistics_as_a_table_and_as_json(latentmill: Command, cache: Path) -> None:
    content = json.loads((cache / "stats.json").read_text())
    code, out, _ = latentmill("stats", cache)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("5 latents, raw, made by ")
    assert lines[2].split() == ["channel", "mean", "std", "min", "max"]
    assert [float(value) for value in lines[3].split()[1:]] == pytest.approx(
        [content[name][0] for name in ("mean", "std", "min", "max")], abs=1e-4
    )
    assert "0.18215" in out
    assert content["digest"] in out
    assert json.loads(latentmill("stats", cache, "--json")[1])["mean"] == content["mean"]
