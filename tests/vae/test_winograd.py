"""The quick convolutions: the direct ones' numbers, whatever the shape, and each image by itself."""

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


def images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 5), (16, 16), (17, 33), (40, 18), (33, 7)])
@pytest.mark.parametrize(("inside", "outside", "bias"), [(128, 128, True), (128, 256, False), (256, 128, True)])
def test_the_numbers_are_the_convolutions(height: int, width: int, inside: int, outside: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(inside, outside, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)
    x = images(2, inside, height, width)
    exact = conv.double()(x.double())
    found = WinogradConv2d(conv.float())(x)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 1e-5


def test_what_comes_out_is_channels_last() -> None:
    conv = WinogradConv2d(nn.Conv2d(128, 128, 3, padding=1))
    assert conv(images(2, 128, 16, 18)).is_contiguous(memory_format=torch.channels_last)


def test_no_bit_depends_on_the_batch_or_the_place_in_it() -> None:
    conv, x = WinogradConv2d(nn.Conv2d(128, 128, 3, padding=1)), images(3, 128, 20, 24)
    alone = conv(x[1:2])
    assert torch.equal(conv(x)[1:2], alone)
    assert torch.equal(conv(x.flip(0))[1:2], alone)


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


def test_an_optimized_model_gives_the_same_latents_and_images() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(**WIDE).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images(2, 3, 34, 46).clamp(-1, 1)
    moments, back = model.encode(x).latent_dist.parameters, model(x).sample
    optimize_for_cpu(model)
    assert sum(isinstance(module, WinogradConv2d) for module in model.modules()) == 8 + 13
    assert torch.allclose(model.encode(x).latent_dist.parameters, moments, atol=2e-5)
    assert torch.allclose(model(x).sample, back, atol=2e-5)
