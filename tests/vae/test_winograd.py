"""Winograd convolutions agree with direct ones for every shape, and treat each image alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from vae import AutoencoderKL
from vae.fast import optimize_for_cpu
from vae.winograd import WinogradConv2d

WIDE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (128, 256),
    "layers_per_block": 1,
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 5), (16, 16), (17, 33), (40, 18), (33, 7)])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "bias"), [(128, 128, True), (128, 256, False), (256, 128, True)]
)
def test_the_result_is_that_of_the_direct_convolution(
    height: int, width: int, in_channels: int, out_channels: int, bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    x = random_images(2, in_channels, height, width)
    exact = conv.double()(x.double())
    result = WinogradConv2d(conv.float())(x)
    assert result.shape == exact.shape
    assert (result - exact).abs().max() < 1e-5


def test_the_output_is_channels_last() -> None:
    conv = WinogradConv2d(nn.Conv2d(128, 128, 3, padding=1))
    assert conv(random_images(2, 128, 16, 18)).is_contiguous(memory_format=torch.channels_last)


def test_no_bit_depends_on_the_batch_or_the_position_in_it() -> None:
    conv, x = WinogradConv2d(nn.Conv2d(128, 128, 3, padding=1)), random_images(3, 128, 20, 24)
    expected = conv(x[1:2])
    assert torch.equal(conv(x)[1:2], expected)
    assert torch.equal(conv(x.flip(0))[1:2], expected)


@pytest.mark.parametrize(
    ("conv", "suits"),
    [
        (nn.Conv2d(128, 128, 3, padding=1), True),
        (nn.Conv2d(127, 128, 3, padding=1), False),
        (nn.Conv2d(128, 3, 3, padding=1), False),
        (nn.Conv2d(128, 128, 3, stride=2), False),
        (nn.Conv2d(128, 128, 3, padding=0), False),
        (nn.Conv2d(128, 128, 1), False),
        (nn.Conv2d(128, 128, 3, padding=1, groups=2), False),
        (nn.Conv2d(128, 128, 3, padding=2, dilation=2), False),
        (nn.Linear(128, 128), False),
    ],
)
def test_only_wide_plain_convolutions_are_replaced(conv: nn.Module, suits: bool) -> None:
    assert WinogradConv2d.suits(conv) is suits


@pytest.mark.slow
def test_an_optimized_model_gives_the_same_latents_and_images() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(**WIDE).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = random_images(2, 3, 34, 46).clamp(-1, 1)
    moments, reconstruction = model.encode(x).latent_dist.parameters, model(x).sample
    optimize_for_cpu(model)
    assert sum(isinstance(module, WinogradConv2d) for module in model.modules()) == 8 + 13
    assert torch.allclose(model.encode(x).latent_dist.parameters, moments, atol=2e-5)
    assert torch.allclose(model(x).sample, reconstruction, atol=2e-5)
