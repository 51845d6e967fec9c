"""The forms of `--vae`. Each of them gives the same model and the same cache."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import ldm
from tests.conftest import MICRO
from vae import AutoencoderKL
from vae.load import STEM, WEIGHTS

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(latentmill: Command, photos: Path, tmp_path: Path) -> Command:
    def run(vae: object, *more: object) -> tuple[int, str, str]:
        return latentmill(
            "encode", photos, "--to", tmp_path / "c", "--vae", vae, "--resolution", 64, "--workers", 0, *more
        )

    return run


@pytest.fixture
def original(micro_vae: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(micro_vae)


def read_digest_and_scaling(folder: Path) -> tuple[str, float]:
    """Return the digest and the scaling factor of a cache."""
    content = json.loads((folder / "cache.json").read_text())
    return json.loads((folder / "stats.json").read_text())["digest"], content["vae"]["scaling_factor"]


def test_a_single_file_gives_the_same_cache_as_its_directory(
    latentmill: Command, encode: Command, original: AutoencoderKL, micro_vae: Path, tmp_path: Path
) -> None:
    assert encode(micro_vae)[0] == 0
    (tmp_path / "c").rename(tmp_path / "reference")
    save_file(ldm(original.state_dict()), tmp_path / "micro.safetensors")
    code, _, err = encode(tmp_path / "micro.safetensors", "--vae-config", micro_vae)
    assert (code, read_digest_and_scaling(tmp_path / "c")) == (0, read_digest_and_scaling(tmp_path / "reference")), err
    second_code, out, err = encode(tmp_path / "micro.safetensors")
    assert (second_code, out.startswith("encoded 0 images")) == (0, True), err
    assert latentmill("decode", tmp_path / "c", "--to", tmp_path / "previews", "--workers", 0)[0] == 0


def test_a_checkpoint_in_storage_is_fetched(
    encode: Command, original: AutoencoderKL, micro_vae: Path, tmp_path: Path, memory: str
) -> None:
    save_file(ldm(original.state_dict(), "vae."), tmp_path / "full.safetensors")
    fsspec.filesystem("memory").put(str(tmp_path / "full.safetensors"), f"{memory}/full.safetensors")
    assert encode(f"{memory}/full.safetensors", "--vae-config", micro_vae)[0] == 0
    assert json.loads((tmp_path / "c/cache.json").read_text())["vae"]["reference"] == f"{memory}/full.safetensors"


@pytest.mark.slow
def test_a_directory_in_storage_may_have_an_old_pickle(
    encode: Command, original: AutoencoderKL, micro_vae: Path, tmp_path: Path, memory: str
) -> None:
    store = fsspec.filesystem("memory")
    torch.save(original.state_dict(), tmp_path / "weights.bin")
    store.put(str(tmp_path / "weights.bin"), f"{memory}/vae/{STEM}.bin")
    store.put(str(micro_vae / "config.json"), f"{memory}/vae/config.json")
    store.pipe(f"{memory}/unet/{WEIGHTS}", b"weights of another model")
    assert encode(memory)[0] == 0


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the URL of an empty folder in memory."""
    url = f"memory://{request.node.name}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_scaling_is_never_assumed(encode: Command, tmp_path: Path) -> None:
    wide = AutoencoderKL(**{**MICRO, "block_out_channels": (32,) * 4, "norm_num_groups": 32})
    save_file(ldm(wide.state_dict()), tmp_path / "wide.safetensors")
    code, _, err = encode(tmp_path / "wide.safetensors")
    assert code == 2
    assert f"{tmp_path}/wide.safetensors has no scaling constants for its latents" in err
    assert "(scaling_factor 0.18215). Choose the configuration with --vae-config NAME" in err
    assert not (tmp_path / "c").exists()


def test_a_configuration_is_refused_for_a_directory_with_its_own(encode: Command, micro_vae: Path) -> None:
    code, _, err = encode(micro_vae, "--vae-config", "sdxl")
    assert code == 2
    assert f"--vae-config is for single files, but {micro_vae} has its own config.json" in err


def test_a_scaling_that_differs_from_the_caches_is_reported(
    encode: Command, original: AutoencoderKL, micro_vae: Path, tmp_path: Path
) -> None:
    encode(micro_vae)
    other = json.loads((micro_vae / "config.json").read_text()) | {"scaling_factor": 0.5}
    save_file(original.state_dict(), tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(other))
    code, _, err = encode(tmp_path)
    assert code == 0
    assert "the cache has scaling_factor 0.18215, the VAE 0.5; the value of the cache is kept" in err
    assert read_digest_and_scaling(tmp_path / "c")[1] == 0.18215


def test_a_mistyped_directory_may_be_a_hub_id(encode: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = encode("models/sdxl")
    assert code == 2
    assert "models/sdxl: vae/config.json is not in the hub's local cache, and the hub cannot be reached" in err
