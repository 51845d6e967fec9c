"""Load and save FlaxAutoencoderKL: all that the PyTorch class reads, and Flax's own files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import ldm
from tests.conftest import MICRO
from vae import AutoencoderKL, LoadError, flax_weights
from vae.load import WEIGHTS, weights_sha256

pytest.importorskip("flax")
jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402

from vae.flax import FlaxAutoencoderKL  # noqa: E402


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(5)
    return AutoencoderKL(**MICRO)


def assert_is(loaded: tuple[FlaxAutoencoderKL, Any], model: AutoencoderKL) -> None:
    flax_model, params = loaded
    assert flax_model.config == model.config
    assert weights_sha256(flax_model.convert_params(params)) == weights_sha256(model.state_dict())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_every_form_of_pytorch_weights_is_read(model: AutoencoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "safetensors")
    assert_is(FlaxAutoencoderKL.from_pretrained(tmp_path / "safetensors"), model)
    assert_is(FlaxAutoencoderKL.from_pretrained(tmp_path / "safetensors", from_pt=True), model)

    model.save_pretrained(tmp_path / "pipeline/vae")
    assert_is(FlaxAutoencoderKL.from_pretrained(tmp_path / "pipeline"), model)
    assert_is(FlaxAutoencoderKL.from_pretrained(tmp_path / "pipeline", subfolder="vae"), model)

    save_file(ldm(model.state_dict(), "first_stage_model."), tmp_path / "full.safetensors")
    assert_is(FlaxAutoencoderKL.from_single_file(tmp_path / "full.safetensors", config=model.config), model)


@pytest.mark.slow  # a pickle is read in a process of its own
def test_pickles_are_read(model: AutoencoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "bin/diffusion_pytorch_model.bin")
    assert_is(FlaxAutoencoderKL.from_pretrained(tmp_path / "bin", from_pt=True), model)


def test_the_demo_model_and_presets_are_read(model: AutoencoderKL, tmp_path: Path) -> None:
    demo = AutoencoderKL.from_pretrained("demo")
    assert_is(FlaxAutoencoderKL.from_pretrained("demo"), demo)
    save_file(demo.state_dict(), tmp_path / "demo.safetensors")
    with pytest.raises(LoadError, match="do not match the configuration"):
        FlaxAutoencoderKL.from_single_file(tmp_path / "demo.safetensors", config="sd3")
    save_file(model.state_dict(), tmp_path / "micro.safetensors")
    with pytest.raises(LoadError, match="give its configuration"):
        FlaxAutoencoderKL.from_single_file(tmp_path / "micro.safetensors")


def test_a_saved_model_is_read_by_both_classes(model: AutoencoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "torch")
    flax_model, params = FlaxAutoencoderKL.from_pretrained(tmp_path / "torch")
    flax_model.save_pretrained(tmp_path / "flax", params)
    assert_is(FlaxAutoencoderKL.from_pretrained(tmp_path / "flax"), model)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "flax")
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict())
    with pytest.raises(LoadError, match=r"there are no weights at .*flax: no diffusion_pytorch_model.safetensors"):
        FlaxAutoencoderKL.from_pretrained(tmp_path / "flax", from_pt=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_keep_the_dtype_of_the_file(model: AutoencoderKL, dtype: torch.dtype, tmp_path: Path) -> None:
    half = AutoencoderKL.from_config(model.config).to(dtype)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path / "torch")
    flax_model, params = FlaxAutoencoderKL.from_pretrained(tmp_path / "torch", jnp.bfloat16)
    assert flax_model.dtype == jnp.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {str(dtype).removeprefix("torch.")}
    flax_model.save_pretrained(tmp_path / "flax", params)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "flax")
    assert loaded.dtype == dtype
    assert weights_sha256(loaded.state_dict()) == weights_sha256(half.state_dict())


def test_parameters_are_copies(model: AutoencoderKL) -> None:
    flax_model = FlaxAutoencoderKL(**model.config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    params = flax_model.convert_state_dict(weights)
    weights["quant_conv.bias"].fill_(7)
    np.testing.assert_array_equal(params["quant_conv"]["bias"], model.state_dict()["quant_conv.bias"])
    flax_model.convert_params(params)["quant_conv.bias"].fill_(7)
    np.testing.assert_array_equal(params["quant_conv"]["bias"], model.state_dict()["quant_conv.bias"])


def test_weights_of_another_model_are_refused(model: AutoencoderKL, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    flax_model = FlaxAutoencoderKL(**{**model.config, "latent_channels": 8})
    with pytest.raises(LoadError, match=r"the weights at state_dict do not match .* has the shape"):
        flax_model.convert_state_dict(model.state_dict())
    (tmp_path / WEIGHTS).unlink()
    flax_weights.write(tmp_path / flax_weights.FILE, {"unet/bias": torch.ones(1)})
    with pytest.raises(LoadError, match=r"tensors are missing, 1 are extra"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)
