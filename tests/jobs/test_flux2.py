"""Jobs with FLUX.2's VAE: raw latents are stored, and cache.json has the rule of the model latents."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.stats import pool_patches
from latentmill import Cache
from latentmill.cache_info import VaeInfo
from tests.conftest import MICRO
from vae import AutoencoderKLFlux2
from vae.load import STEM, WEIGHTS
from vae.scaling import scaling_of

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def flux2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(**{**MICRO, "latent_channels": 2})
    model.bn.running_mean = torch.randn(8)
    model.bn.running_var = torch.rand(8) + 0.1
    model.save_pretrained(tmp_path / "pipeline/vae")
    return tmp_path / "pipeline"


def test_every_job_runs_with_flux2(latentmill: Command, photos: Path, flux2: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    (flux2 / "vae" / WEIGHTS).rename(flux2 / "vae" / f"{STEM}.bf16.safetensors")
    arguments = ("encode", photos, "--to", cache, "--vae", flux2, "--workers", 0)
    code, _, err = latentmill(*arguments, "--resolution", 72)
    assert (code, "--resolution 72 is not a multiple of the VAE's factor 16" in err) == (2, True)
    code, _, err = latentmill(*arguments, "--resolution", 64, "--dtype", "float32")
    assert code == 0, err
    assert f"the weights are those of the variant bf16 ({STEM}.bf16.safetensors)" in err
    assert latentmill("verify", cache, "--reencode", 2)[0] == 0
    assert latentmill("decode", cache, "--to", tmp_path / "previews", "--workers", 0)[0] == 0
    check_decoded_images(cache, flux2, tmp_path / "previews")
    code, out, _ = latentmill("stats", cache)
    assert (code, "model mean" in out) == (0, True)
    assert "makes each patch of 2 x 2 positions one position" in (cache / "README.md").read_text()
    check_model_latents(cache, flux2)


def check_decoded_images(cache: Path, flux2: Path, previews: Path) -> None:
    """Check that `decode` gives the model its raw latents, which are not packed."""
    model = AutoencoderKLFlux2.from_pretrained(flux2, variant="bf16")
    table = pq.read_table(previews / "fidelity.parquet").to_pylist()
    files = {row["key"]: previews / row["file"] for row in table}
    assert len(files) == 5
    for row in pq.read_table(next((cache / "data").glob("*.parquet"))).to_pylist():
        raw = torch.tensor(np.frombuffer(row["latent"], np.float32).reshape(1, *row["shape"]))
        with torch.inference_mode():
            pixels = model.decode(raw).sample[0].clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(pixels - np.asarray(Image.open(files[row["key"]]))).max() <= 1


def check_model_latents(cache: Path, flux2: Path) -> None:
    """Check that cache.json is enough, with numpy alone, to make the model latents of the VAE's own rule."""
    vae = json.loads((cache / "cache.json").read_text())["vae"]
    height, width = vae["patch_size"]
    mean, std = (np.array(vae[name]).reshape(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    model = AutoencoderKLFlux2.from_pretrained(flux2, variant="bf16")
    rule = scaling_of(model.config, model.state_dict())
    opened = Cache.open(str(cache))
    for row in pq.read_table(next((cache / "data").glob("*.parquet"))).to_pylist():
        raw = np.frombuffer(row["latent"], np.float32).reshape(row["shape"])
        assert raw.shape == (2, 8, 8)
        channels, rows, columns = raw.shape
        patches = raw.reshape(channels, rows // height, height, columns // width, width)
        packed = patches.transpose(0, 2, 4, 1, 3).reshape(-1, rows // height, columns // width)
        latent = opened.model_latent(row)
        np.testing.assert_allclose((packed - mean) * vae["scaling_factor"] / std, latent.numpy(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latent, rule.to_model(torch.tensor(raw)))


def test_the_constants_of_a_raw_channel_are_pooled_over_its_positions() -> None:
    values = np.random.default_rng(0).normal(size=(2, 4, 1000)) * 3 + np.arange(8).reshape(2, 4, 1)
    vae = VaeInfo(
        reference="",
        config={},
        scaling_factor=1.0,
        shift_factor=None,
        latents_mean=tuple(values.mean(axis=2).flatten()),
        latents_std=tuple(values.std(axis=2).flatten()),
        patch_size=(2, 2),
    )
    means, stds = pool_patches(vae)
    np.testing.assert_allclose(means, values.reshape(2, -1).mean(axis=1))
    np.testing.assert_allclose(stds, values.reshape(2, -1).std(axis=1))
