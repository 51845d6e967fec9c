"""`latentmill export`: what all formats share, and each format read back as its trainer reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentmill import Cache
from pipeline.exports.formats import FORMATS
from tests.conftest import MICRO, encoded, smooth, write_tar
from vae import AutoencoderKL

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder `classes` with two folders of images, which have captions but for one."""
    folder = tmp_path_factory.mktemp("source") / "classes"
    for number, name in enumerate(("cat/a.1", "cat/b", "dog/a", "dog/c", "dog/d")):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(smooth(number, 96, 64 + 32 * number), "PNG"))
        if number:
            (folder / f"{name}.txt").write_text(f"caption {number}", encoding="utf-8")
    return folder


def make_vae(folder: Path, **config: object) -> Path:
    """Save a tiny AutoencoderKL of random weights with these fields of its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**MICRO | config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny VAE with the channels and constants of FLUX.1's."""
    constants = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return make_vae(tmp_path_factory.mktemp("flux") / "vae", **constants)


def read_all(cache: Path) -> list[tuple[dict[str, object], Cache]]:
    """Return the rows of a cache in order, each with the cache."""
    opened = Cache.open(str(cache))
    return [(row, opened) for file in opened.files() for row in opened.rows(file)]


def list_files(folder: Path) -> list[str]:
    """Return the files of an export without its own records."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith("_") and name != "latentmill-export.json")


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_lightningdit_reads_latents_mirrors_labels_and_statistics(
    encode: Command, latentmill: Command, classes: Path, tmp_path: Path, container: str
) -> None:
    assert encode(classes, "--label-from-folder", "--flip", "both", "--format", container)[0] == 0
    code, out, err = latentmill("export", tmp_path / "c", "--format", "lightningdit", "--to", tmp_path / "o", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["exported"] == 5
    # as its ImgLatentDataset: files sorted by name, slices by row, statistics [1, C, 1, 1]
    (file,) = sorted((tmp_path / "o").glob("*.safetensors"))
    with safe_open(file, framework="pt") as opened:
        assert opened.get_slice("labels").get_shape() == [5]
        rows = [{key: opened.get_slice(key)[i : i + 1] for key in opened.keys()} for i in range(5)]  # noqa: SIM118
    for (row, cache), found in zip(read_all(tmp_path / "c"), rows, strict=True):
        assert found["labels"].tolist() == [row["label"]]
        assert torch.equal(found["latents"][0], cache.raw_latent(row).float())
        assert torch.equal(found["latents_flip"][0], cache.raw_latent(row, flipped=True).float())
    stats = torch.load(tmp_path / "o/latents_stats.pt")
    both = torch.cat([torch.cat([row["latents"], row["latents_flip"]]) for row in rows])
    torch.testing.assert_close(stats["mean"], both.mean((0, 2, 3), keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats["std"], both.std((0, 2, 3), correction=0, keepdim=True), rtol=1e-4, atol=1e-5)
