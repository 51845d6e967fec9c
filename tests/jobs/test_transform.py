"""`--transform`: a cache has the latents of images that the recipe's own code prepared."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill import Cache, time_ids
from latentmill.part_files import to_tensor
from tests.conftest import smooth
from tests.trainers import crop_like_adm

Command = Callable[..., tuple[int, str, str]]
SIDE = 32
SIZES = ((40, 100), (99, 70), (64, 64), (20, 30), (150, 131), (33, 35))  # height and width


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of JPEGs and PNGs: one is turned, one has hidden colors."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        Image.fromarray(smooth(number, *size)).save(folder / f"{number}.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(10, 60, 90)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([smooth(11, 90, 60), smooth(12, 90, 60)[..., :1]])).save(folder / "hidden.png")
    return folder


def find_buckets(side: int, shortest: int, longest: int, steps: int) -> list[tuple[int, int]]:
    """Return the buckets of sd-scripts, (width, height) each, in its order."""
    found = {(side // steps * steps, side // steps * steps)}
    for width in range(shortest, longest + 1, steps):
        height = min(longest, side * side // width // steps * steps)
        if height >= shortest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def shrink_by_area(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return what INTER_AREA gives: the mean of the area that a pixel covers, added up in float32 in OpenCV's order."""
    if pixels.shape[:2] == (2 * height, 2 * width):
        return (pixels.reshape(height, 2, width, 2, 3).sum(axis=(1, 3), dtype=int) + 2 >> 2).astype(np.uint8)
    for target in (width, height):
        pixels = pixels.swapaxes(0, 1)
        scale, means = pixels.shape[0] / target, np.zeros((target, *pixels.shape[1:]), np.float32)
        for index in range(target):
            for place in range(int(index * scale), min(int((index + 1) * scale) + 1, len(pixels))):
                part = min((index + 1) * scale, place + 1) - max(index * scale, place)
                means[index] += pixels[place] * np.float32(max(part, 0) / scale)
        pixels = means
    return np.rint(pixels).astype(np.uint8)


def crop_like_sd_scripts(image: Image.Image) -> Image.Image:
    buckets, (width, height) = find_buckets(SIDE, 16, 64, 8), image.size
    ratios = np.array([wide / tall for wide, tall in buckets])
    bucket = buckets[int(np.abs(ratios - width / height).argmin())]
    bucket = image.size if image.size in buckets else bucket
    scale = bucket[1] / height if width / height > bucket[0] / bucket[1] else bucket[0] / width
    resized = int(width * scale + 0.5), int(height * scale + 0.5)
    if width >= resized[0] and height >= resized[1] and image.size != resized:
        image = Image.fromarray(shrink_by_area(np.asarray(image), *resized))
    elif image.size != resized:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    return image.crop((left, top, left + bucket[0], top + bucket[1]))


def read_rows(cache: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for path in sorted((cache / "data").iterdir()) for row in pq.read_table(path).to_pylist()}


SD_SCRIPTS = ("--min-bucket-reso", 16, "--max-bucket-reso", 64, "--bucket-reso-steps", 8)


@pytest.mark.parametrize(
    ("recipe", "options", "prepare"),
    [("center-crop-dhariwal", (), partial(crop_like_adm, side=SIDE)), ("sd-scripts", SD_SCRIPTS, crop_like_sd_scripts)],
)
def test_the_latents_are_those_of_images_that_were_prepared_beforehand(
    latentmill: Command,
    photos: Path,
    tmp_path: Path,
    micro_vae: Path,
    recipe: str,
    options: tuple[object, ...],
    prepare: Callable[[Image.Image], Image.Image],
) -> None:
    (tmp_path / "prepared").mkdir()
    for path in photos.iterdir():
        prepare(Image.open(path).convert("RGB")).save(tmp_path / "prepared" / f"{path.stem}.png")
    common = ("--vae", micro_vae, "--dtype", "float32", "--workers", 0)
    code, _, err = latentmill(
        "encode", photos, "--to", tmp_path / "c", *common, "--transform", recipe, "--resolution", SIDE, *options
    )
    assert code == 0, err
    code, _, err = latentmill("encode", tmp_path / "prepared", "--to", tmp_path / "p", *common, "--transform", "none")
    assert code == 0, err
    rows, prepared = read_rows(tmp_path / "c"), read_rows(tmp_path / "p")
    assert set(rows) == set(prepared) == {path.stem for path in photos.iterdir()}
    for key, row in rows.items():
        assert torch.equal(to_tensor(row), to_tensor(prepared[key])), key
    assert (rows["turned"]["original_height"], rows["turned"]["original_width"]) == (60, 90), "EXIF is ignored"
    assert code == latentmill("verify", tmp_path / "c", "--reencode", 9)[0] == 0


def test_rows_have_the_resized_size_and_both_containers_the_same(encode: Command, photos: Path, tmp_path: Path) -> None:
    for kind in ("parquet", "webdataset"):
        assert encode(photos, "--to", tmp_path / kind, "--transform", "diffusers", "--format", kind)[0] == 0
    found = {}
    for kind in ("parquet", "webdataset"):
        cache = Cache.open(str(tmp_path / kind))
        rows = {row["key"]: row for file in cache.files() for row in cache.rows(file)}
        found[kind] = {key: (row["resized_height"], row["resized_width"], time_ids(row)) for key, row in rows.items()}
    assert found["parquet"] == found["webdataset"]
    assert found["parquet"]["0"] == (64, 160, (40, 100, 0, 48, 64, 64))
    assert found["parquet"]["turned"] == (96, 64, (90, 60, 16, 0, 64, 64)), "EXIF is applied"


def test_images_of_a_wrong_size_are_rejected_by_name(encode: Command, photos: Path, tmp_path: Path) -> None:
    code, out, _ = encode(photos, "--transform", "none", "--max-reject-rate", 1)
    assert code == 0
    assert "7 wrong_size" in out
    assert set(read_rows(tmp_path / "c")) == {"2"}
    rejects = [
        json.loads(line) for path in (tmp_path / "c/_rejects").iterdir() for line in path.read_text().splitlines()
    ]
    (long,) = [reject for reject in rejects if reject["key"] == "0"]
    assert long["stage"] == "transform"
    assert "100 x 40 pixels" in long["detail"]


def test_long_and_small_images_are_filtered_and_counted(encode: Command, photos: Path, tmp_path: Path) -> None:
    code, out, _ = encode(photos, "--max-aspect", 2, "--no-upscale")
    assert code == 0
    assert "filtered   5: 1 max_aspect, 4 no_upscale" in out
    assert set(read_rows(tmp_path / "c")) == {"1", "2", "4"}
    code, out, _ = encode(photos)
    assert (code, "filtered   5: 1 max_aspect, 4 no_upscale" in out) == (0, True), "the settings are those of the cache"
    code, _, err = encode(photos, "--transform", "diffusers")
    assert (code, "made with --transform center-crop, this command has --transform diffusers" in err) == (2, True)
