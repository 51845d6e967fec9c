"""Parity with diffusers' AutoencoderKL: the same numbers from the same weights, in float32."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from vae import AutoencoderKL

FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
}
# Small models with the structure of the public ones.
SHAPES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "latent_channels": 4},
    "sdxl": {
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "sample_size": 1024,
        "force_upcast": True,
    },
    "sd3": {
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux": {
        "block_out_channels": (24, 24, 48, 48),
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "cogview": {
        "block_out_channels": (16, 64, 64, 64),
        "layers_per_block": 3,
        "latent_channels": 16,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


@pytest.fixture(params=SHAPES)
def pair(request: pytest.FixtureRequest) -> tuple[AutoencoderKL, Any]:
    """Our model and diffusers', with the same random weights."""
    fields = {**FOUR, **SHAPES[request.param]}
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**fields).eval()
    ours = AutoencoderKL(**fields).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96), (72, 136), (70, 93)])
@torch.inference_mode()
def test_encode_decode_and_forward_are_equal(pair: tuple[AutoencoderKL, Any], height: int, width: int) -> None:
    ours, theirs = pair
    x = pictures(height, width)
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    torch.testing.assert_close(posterior.parameters, expected.parameters, atol=1e-4, rtol=0)
    z = expected.mode()
    torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(x).sample, theirs(x).sample, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_posterior_is_equal(pair: tuple[AutoencoderKL, Any]) -> None:
    ours, theirs = pair
    x = pictures(64, 64)
    posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.testing.assert_close(posterior.sample(seeded[0]), expected.sample(seeded[1]), atol=1e-4, rtol=0)
    other, other_expected = ours.encode(-x).latent_dist, theirs.encode(-x).latent_dist
    for value, right in [
        (posterior.std, expected.std),
        (posterior.var, expected.var),
        (posterior.logvar, expected.logvar),
        (posterior.kl(), expected.kl()),
        (posterior.kl(other), expected.kl(other_expected)),
        (posterior.nll(x[:, :1, :8, :8]), expected.nll(x[:, :1, :8, :8])),
    ]:
        torch.testing.assert_close(value, right, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_slicing_gives_the_references_numbers(pair: tuple[AutoencoderKL, Any]) -> None:
    ours, theirs = pair
    x = pictures(64, 64)
    ours.enable_slicing()
    theirs.enable_slicing()
    torch.testing.assert_close(
        ours.encode(x, return_dict=False)[0].mean, theirs.encode(x, return_dict=False)[0].mean, atol=1e-4, rtol=0
    )
    z = theirs.encode(x).latent_dist.mode()
    torch.testing.assert_close(
        ours.decode(z, return_dict=False)[0], theirs.decode(z, return_dict=False)[0], atol=1e-4, rtol=0
    )


def test_directories_are_exchanged(pair: tuple[AutoencoderKL, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    returned = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert loaded.config == ours.config
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(returned.state_dict()[name], tensor)
    assert returned.config.scaling_factor == ours.config.scaling_factor
