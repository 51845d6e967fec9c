import pytest
import torch
from torch import Tensor, nn

from vae.group_norm import BLOCK, MIN_CHANNELS, ChannelsLastGroupNorm

CHANNELS = MIN_CHANNELS


def make_norm() -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(32, CHANNELS, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def make_activation(batch: int, height: int, width: int, mean: float) -> Tensor:
    x = torch.randn(batch, CHANNELS, height, width, generator=torch.Generator().manual_seed(1)) + mean
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 70), (1, 5), (3, BLOCK + 10)])
@pytest.mark.parametrize(("mean", "error"), [(0.0, 2e-5), (-100.0, 1e-3)])
def test_results_are_exact_whatever_the_mean(height: int, width: int, mean: float, error: float) -> None:
    norm, x = make_norm(), make_activation(2, height, width, mean)
    y = ChannelsLastGroupNorm(norm)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = norm.double()(x.double().contiguous())
    torch.testing.assert_close(y.double(), expected, atol=error, rtol=0)


def test_channels_of_one_group_may_have_other_means() -> None:
    norm, x = make_norm(), make_activation(1, 96, 64, 0.0)
    x += torch.arange(CHANNELS).view(-1, 1, 1) * 3
    x[:, :, :48] -= 20
    y = ChannelsLastGroupNorm(norm)(x)
    torch.testing.assert_close(y.double(), norm.double()(x.double().contiguous()), atol=1e-4, rtol=0)


def test_a_result_does_not_depend_on_the_batch() -> None:
    norm, x = ChannelsLastGroupNorm(make_norm()), make_activation(3, 80, 72, 1.0)
    assert torch.equal(norm(x)[1], norm(x[1:2])[0])


def test_other_memory_formats_have_the_kernel_of_torch() -> None:
    norm, x = make_norm(), make_activation(1, 8, 8, 1.0).contiguous()
    assert torch.equal(ChannelsLastGroupNorm(norm)(x), norm(x))


def test_only_wide_norms_are_replaced() -> None:
    assert ChannelsLastGroupNorm.suits(make_norm())
    assert not ChannelsLastGroupNorm.suits(nn.GroupNorm(4, 8))
    assert not ChannelsLastGroupNorm.suits(nn.LayerNorm(CHANNELS))
