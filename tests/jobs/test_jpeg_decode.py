"""`--jpeg-decode scaled`: large JPEGs are decoded at a reduced size, by every command that reads the images again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill.part_files import to_tensor
from pipeline.images import prepare
from pipeline.images.transform import Transform
from pipeline.limits import DEFAULT_LIMITS
from tests.conftest import encoded, smooth

Command = Callable[..., tuple[int, str, str]]
GEOMETRY = ("original_height", "original_width", "crop_top", "crop_left", "height", "width", "flipped")
LARGE, ODD, SMALL = (300, 420), (301, 421), (120, 160)  # height and width; half of LARGE is at least twice 64 px


def textured(seed: int, height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-60, 61, (height, width, 3))
    return (smooth(seed, height, width) + noise).clip(0, 255).astype(np.uint8)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with three JPEGs that are reduced at 64 px, four images that are not, and a truncated JPEG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(textured(4, *LARGE)).convert("CMYK").save(folder / "cmyk.jpg")
    for name, data in {
        "large.jpg": encoded(textured(1, *LARGE)),
        "turned.jpg": encoded(textured(2, *LARGE), exif=turned()),
        "small.jpg": encoded(textured(3, *SMALL)),
        "odd.jpg": encoded(textured(6, *ODD)),
        "odd_turned.jpg": encoded(textured(7, *ODD), exif=turned()),
        "png.png": encoded(textured(1, *LARGE), "PNG"),
        "truncated.jpg": encoded(textured(5, *LARGE))[:9000],
    }.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def encode(latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path) -> Command:
    def run(cache: str, *options: object) -> tuple[int, str, str]:
        argv = ("encode", source, "--to", tmp_path / cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
        return latentmill(*argv, "--dtype", "float32", *options)

    return run


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the reductions that are chosen, one per JPEG."""
    chosen: list[int] = []
    choose = Transform.choose_reduction

    def choose_and_record(transform: Transform, height: int, width: int, is_turned: bool) -> int:
        chosen.append(choose(transform, height, width, is_turned))
        return chosen[-1]

    monkeypatch.setattr(Transform, "choose_reduction", choose_and_record)
    return chosen


def read_rows(cache: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for path in sorted((cache / "data").iterdir()) for row in pq.read_table(path).to_pylist()}


def read_preprocessing(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "cache.json").read_text())["identity"]["preprocessing"])


def test_only_large_jpegs_are_reduced_and_sizes_are_those_of_the_files(encode: Command, tmp_path: Path) -> None:
    assert encode("full")[0] == encode("scaled", "--jpeg-decode", "scaled")[0] == 3
    full, scaled = read_rows(tmp_path / "full"), read_rows(tmp_path / "scaled")
    assert list(full) == list(scaled) == ["cmyk", "large", "odd", "odd_turned", "png", "small", "turned"]
    for key, row in scaled.items():
        assert [row[name] for name in GEOMETRY] == [full[key][name] for name in GEOMETRY], key
        latents = to_tensor(full[key]), to_tensor(row)
        assert torch.equal(*latents) == (key not in ("large", "odd", "turned")), key
        assert (latents[0] - latents[1]).norm() < 0.1 * latents[0].norm(), key
    assert (scaled["large"]["original_height"], scaled["large"]["original_width"]) == LARGE
    assert (scaled["turned"]["original_height"], scaled["turned"]["original_width"]) == LARGE[::-1]
    stats = [json.loads((tmp_path / cache / "stats.json").read_text()) for cache in ("full", "scaled")]
    assert stats[0]["rejected"] == stats[1]["rejected"] == {"corrupt": 1}
    assert stats[0]["enlarged"] == stats[1]["enlarged"] == 0


def test_the_option_is_part_of_the_identity_and_taken_from_the_cache(encode: Command, tmp_path: Path) -> None:
    encode("scaled", "--jpeg-decode", "scaled")
    assert read_preprocessing(tmp_path / "scaled")["jpeg_decode"] == "scaled"
    assert "large JPEGs decoded at a reduced size" in (tmp_path / "scaled/README.md").read_text()
    code, _, err = encode("scaled")
    assert code == 3, err
    code, _, err = encode("scaled", "--jpeg-decode", "full")
    assert (code, "made with --jpeg-decode scaled, this command has --jpeg-decode full; use" in err) == (2, True), err
    encode("full")
    assert "jpeg_decode" not in read_preprocessing(tmp_path / "full")
    assert "reduced" not in (tmp_path / "full/README.md").read_text()


@pytest.mark.slow
def test_verify_decode_and_retry_reduce_as_the_cache_says(
    encode: Command, latentmill: Command, source: Path, tmp_path: Path, reductions: list[int]
) -> None:
    cache = tmp_path / "scaled"
    encode("scaled", "--jpeg-decode", "scaled")
    assert sorted(reductions) == [1, 1, 2, 2, 2, 2]
    reductions.clear()
    assert latentmill("verify", cache, "--reencode", 9)[0] == 0
    assert sorted(reductions) == [1, 1, 2, 2, 2]
    reductions.clear()
    assert latentmill("decode", cache, "--to", tmp_path / "previews", "--workers", 0)[0] == 0
    assert sorted(reductions) == [1, 1, 2, 2, 2]
    reductions.clear()
    (source / "truncated.jpg").write_bytes((source / "large.jpg").read_bytes())
    assert latentmill("retry", cache, "--workers", 0, "--source", source)[0] == 0
    assert reductions == [2]
    rows = read_rows(cache)
    assert torch.equal(to_tensor(rows["truncated"]), to_tensor(rows["large"]))


def test_the_sandbox_reduces_as_well() -> None:
    scaled, full = Transform(resolution=64, jpeg_decode="scaled"), Transform(resolution=64)
    data = encoded(textured(1, *LARGE))
    direct = prepare.make_opener(scaled, DEFAULT_LIMITS)(data, "s", "k")
    isolated = prepare.open_in_sandbox(scaled, DEFAULT_LIMITS, data, "s", "k")
    whole = prepare.make_opener(full, DEFAULT_LIMITS)(data, "s", "k")
    assert direct is not None and isolated is not None and whole is not None
    assert torch.equal(direct.pixels, isolated.pixels)
    assert not torch.equal(direct.pixels, whole.pixels)
    assert direct.fit == isolated.fit == whole.fit
    assert (direct.original_height, direct.original_width) == (whole.original_height, whole.original_width)
