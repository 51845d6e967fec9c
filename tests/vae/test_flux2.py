"""AutoencoderKLFlux2 by itself: its configuration, its files, and the rule of its latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentmill.scaling import Scaling
from tests.checkpoints import ldm
from tests.conftest import MICRO
from vae import AssumedConfigWarning, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLFlux2Config, LoadError
from vae.auto import load_model
from vae.flux2 import COUNTER
from vae.load import WEIGHTS, weights_sha256
from vae.scaling import constants_of, fits, scaling_of

FIELDS = {**MICRO, "latent_channels": 2}


def make_model(**fields: Any) -> AutoencoderKLFlux2:
    """Return a small model with random statistics."""
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(**{**FIELDS, **fields}).eval().requires_grad_(False)
    model.bn.running_mean = torch.randn(8)
    model.bn.running_var = torch.rand(8) + 0.1
    return model


def to_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the layout of `ae.safetensors` of FLUX.2: the 1x1 convolutions are inside."""
    inside = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    statistics = {name: value for name, value in weights.items() if name.startswith("bn.") and name != COUNTER}
    tensors = ldm({name: value for name, value in weights.items() if not name.startswith("bn.")})
    for old, new in inside.items():
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    return {**tensors, **statistics}


def test_model_latents_are_packed_by_channel_row_and_column() -> None:
    rule = Scaling(shift=tuple(range(8)), scale=(1.0,) * 8, patch=(2, 2))
    raw = torch.arange(16.0).view(2, 2, 4)
    model = rule.to_model(raw)
    assert model.shape == (8, 1, 2)
    assert (model[:, 0, 0] + torch.arange(8)).tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert (model[:, 0, 1] + torch.arange(8)).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert torch.equal(rule.to_raw(model), raw)
    batch = torch.stack([raw, raw + 1]).half()
    assert torch.equal(rule.to_model(batch)[0], model.half())
    assert torch.equal(rule.to_raw(rule.to_model(batch)), batch)
    with pytest.raises(ValueError, match=r"latents of 3 x 4 cannot be packed: the sides must be multiples of 2 and 2"):
        rule.to_model(torch.zeros(2, 3, 4))


def test_the_constants_are_the_statistics_of_the_weights() -> None:
    model = make_model(batch_norm_eps=0.5)
    rule = scaling_of(model.config, model.state_dict())
    assert rule.patch == (2, 2)
    torch.testing.assert_close(torch.tensor(rule.shift), model.bn.running_mean)
    torch.testing.assert_close(torch.tensor(rule.scale), 1 / torch.sqrt(model.bn.running_var + 0.5))
    constants = constants_of(model.config, model.state_dict())
    assert fits(model.config, constants)
    assert not fits(model.config, {**constants, "latents_std": constants["latents_std"][:-1]})
    assert not fits(model.config, {**constants, "patch_size": None})
    model.bn.running_var[3] = float("nan")
    with pytest.raises(LoadError, match=r"statistics of the latents .* are not finite"):
        constants_of(model.config, model.state_dict())


def test_sides_of_images_are_multiples_of_the_patches() -> None:
    assert (AutoencoderKLFlux2Config().downscale, AutoencoderKLFlux2Config().side_multiple) == (8, 16)
    assert AutoencoderKLFlux2Config(patch_size=(1, 3)).side_multiple == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": [2]}, r"patch_size must be two integers of at least 1, not \(2,\)"),
        ({"patch_size": 2}, "patch_size must be two integers"),
        ({"batch_norm_eps": None}, "batch_norm_eps must be a number"),
        ({"batch_norm_eps": -1.0}, "must not be negative"),
        ({"decoder_block_out_channels": [32]}, "the same number of levels"),
        ({"decoder_block_out_channels": [8, 8, 8, 8]}, "8 channels cannot be divided into norm_num_groups=32"),
        ({"scaling_factor": 1.0}, "an AutoencoderKLFlux2 has no parameter 'scaling_factor'"),
        ({"_class_name": "AutoencoderKL"}, "of class AutoencoderKL, not AutoencoderKLFlux2"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderKLFlux2Config.from_dict(fields)


def test_a_directory_is_loaded_by_its_class(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, AutoencoderKLFlux2)
    assert torch.equal(loaded.bn.running_var, model.bn.running_var)
    with pytest.raises(LoadError, match=r"is of class AutoencoderKLFlux2, not AutoencoderKL: load it with the class"):
        AutoencoderKL.from_pretrained(tmp_path)
    AutoencoderKL(**MICRO).save_pretrained(tmp_path / "kl")
    with pytest.raises(LoadError, match=r"is of class AutoencoderKL, not AutoencoderKLFlux2"):
        AutoencoderKLFlux2.from_pretrained(tmp_path / "kl")
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != COUNTER}, tmp_path / WEIGHTS)
    assert AutoencoderKLFlux2.from_pretrained(tmp_path).bn.num_batches_tracked == 0
    save_file({name: tensor for name, tensor in tensors.items() if name != "bn.running_var"}, tmp_path / WEIGHTS)
    with pytest.raises(LoadError, match=r"bn\.running_var is missing"):
        AutoencoderKLFlux2.from_pretrained(tmp_path)


@pytest.mark.parametrize("decoder", [None, (8, 4, 4, 4)])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_original_layout_loads(decoder: tuple[int, ...] | None, prefix: str, tmp_path: Path) -> None:
    model = make_model(decoder_block_out_channels=decoder)
    tensors = {prefix + name: tensor for name, tensor in to_original(model.state_dict()).items()}
    save_file(tensors, tmp_path / "ae.safetensors")
    loaded = load_model(tmp_path / "ae.safetensors", model.config)
    assert torch.equal(loaded.state_dict()["bn.running_mean"], model.bn.running_mean)
    assert weights_sha256(dict(loaded.named_parameters())) == weights_sha256(dict(model.named_parameters()))


def test_the_class_and_the_decoder_of_a_file_follow_from_its_tensors(tmp_path: Path) -> None:
    fields = {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 32, "layers_per_block": 1}
    model = make_model(**fields, decoder_block_out_channels=(32, 64, 32, 32))
    save_file(to_original(model.state_dict()), tmp_path / "ae.safetensors")
    with pytest.warns(AssumedConfigWarning, match="match no preset. Assumed: the defaults of AutoencoderKLFlux2"):
        loaded = load_model(tmp_path / "ae.safetensors")
    assert isinstance(loaded, AutoencoderKLFlux2)
    assert loaded.config.decoder_block_out_channels == (32, 64, 32, 32)
