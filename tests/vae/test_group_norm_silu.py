"""The Triton kernels agree with torch in float64. Without a GPU, Triton's interpreter runs them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from tests.conftest import slow_param
from vae import group_norm_silu as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # largest differences for values of about 1
TESTED = [torch.float32, slow_param(torch.float16), slow_param(torch.bfloat16)]
# channels, groups, height, width
SHAPES = [
    (8, 4, 8, 8),
    (12, 12, 5, 7),  # a group per channel
    (24, 1, 9, 5),  # one group
    (24, 8, 7, 11),  # neither the channels nor those of a group are a power of two
    (5, 5, 1, 2),
    (12, 6, 1, 37),
    (64, 4, 9, 11),  # several tiles per program
    (600, 3, 3, 5),  # several blocks of channels
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide small activations into several programs with several tiles."""
    monkeypatch.setattr(kernels, "TILE", 512)
    monkeypatch.setattr(kernels, "BLOCKS", 3)
    monkeypatch.setattr(kernels, "MERGED", 16)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random_activation(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, mean: float = 0.5) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + mean
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def make_norm(channels: int, groups: int, dtype: torch.dtype) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    generator = torch.Generator().manual_seed(7)
    norm.weight.copy_(torch.randn(channels, generator=generator))
    norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm.to(DEVICE, dtype)


def normalize_exactly(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None, silu: bool) -> Tensor:
    """Return the result of torch in float64."""
    values = x.double() if bias is None else x.double() + bias.double()[None, :, None, None]
    y = F.group_norm(values, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("dtype", TESTED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("silu", "has_bias"), [(True, True), (False, False)])
def test_normalize_agrees_with_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, silu: bool, has_bias: bool
) -> None:
    channels, groups, height, width = shape
    x = random_activation((1, channels, height, width), dtype)
    norm = make_norm(channels, groups, dtype)
    bias = random_activation((1, channels, 1, 1), dtype, seed=3).flatten() if has_bias else None
    result = kernels.normalize(x, norm, silu=silu, bias=bias)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = normalize_exactly(x, norm, bias, silu)
    torch.testing.assert_close(result.double(), expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", TESTED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_sum_and_its_moments_agree_with_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    channels, groups, height, width = shape
    h, x = (random_activation((1, channels, height, width), dtype, seed) for seed in (1, 2))
    bias = random_activation((1, channels, 1, 1), dtype, seed=3).flatten() if has_bias else None
    result, moments = kernels.add_residual(h, x, bias)
    expected = h.double() + x.double() + (0 if bias is None else bias.double()[None, :, None, None])
    torch.testing.assert_close(result.double(), expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    norm = make_norm(channels, groups, dtype)
    assert torch.equal(
        kernels.normalize(result, norm, silu=True, moments=moments), kernels.normalize(result, norm, silu=True)
    )
    padded = kernels.add_residual_padded(h, x, bias)
    assert torch.equal(padded, F.pad(result, (0, 1, 0, 1)))
    assert padded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TESTED, ids=str)
@pytest.mark.parametrize("shape", [(128, 32, 33, 31), (512, 32, 40, 40), (320, 32, 16, 18)], ids=str)
def test_the_sizes_of_a_vae_agree_with_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the division is that of a job
    test_normalize_agrees_with_torch(shape, dtype, silu=True, has_bias=True)
    test_the_sum_and_its_moments_agree_with_torch(shape, dtype, has_bias=True)


def test_programs_and_tiles_cover_an_image_once() -> None:
    for height, width, channels in ((1, 1, 8), (33, 31, 128), (64, 64, 512), (1024, 1024, 128), (37, 3, 600)):
        x = torch.empty(1, channels, height, width, device="meta")
        grid = kernels._Grid.of(x)
        assert (grid.programs[0] - 1) * grid.rows_per_block < height * width <= grid.programs[0] * grid.rows_per_block
        assert (grid.programs[2] - 1) * grid.tile_channels < channels <= grid.programs[2] * grid.tile_channels
        assert grid == kernels._Grid.of(torch.empty_like(x))


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_larger_than_the_deviation_costs_no_accuracy(mean: float) -> None:
    """The difference of E[x^2] and E[x]^2 has no correct digit here: its terms are 1e6 or 1e8, with 7 digits."""
    x = random_activation((1, 32, 8, 23), torch.float32, mean=mean)
    norm = make_norm(32, 8, torch.float32)
    expected = normalize_exactly(x, norm, None, silu=False)
    result = kernels.normalize(x, norm, silu=False)
    torch.testing.assert_close(result.double(), expected, atol=abs(mean) * 1e-7, rtol=1e-5)


def test_a_large_bias_of_the_convolution_costs_no_accuracy() -> None:
    x, norm = random_activation((1, 32, 8, 23), torch.float32), make_norm(32, 8, torch.float32)
    bias = torch.full((32,), 1e3, device=DEVICE)
    expected = normalize_exactly(x, norm, bias, silu=False)
    torch.testing.assert_close(
        kernels.normalize(x, norm, silu=False, bias=bias).double(), expected, atol=1e-3, rtol=1e-5
    )


def test_equal_values_give_the_shift_of_the_norm() -> None:
    x, norm = torch.full((1, 8, 9, 9), 300.0, device=DEVICE), make_norm(8, 2, torch.float32)
    result = kernels.normalize(x.contiguous(memory_format=torch.channels_last), norm, silu=False)
    torch.testing.assert_close(result, norm.bias[None, :, None, None].expand_as(result), atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_an_activation_that_is_not_finite_spoils_its_own_image_only() -> None:
    x, norm = random_activation((3, 8, 8, 9), torch.float16), make_norm(8, 4, torch.float16)
    expected = kernels.normalize(x, norm, silu=True)
    x[1, 0, 3, 3] = torch.inf
    result = kernels.normalize(x, norm, silu=True)
    assert not bool(result[1].isfinite().all())
    assert torch.equal(result[::2], expected[::2])


def test_no_bit_depends_on_the_batch_or_the_position_in_it() -> None:
    x, h = (random_activation((3, 16, 10, 9), torch.float32, seed) for seed in (1, 2))
    norm, bias = make_norm(16, 4, torch.float32), random_activation((16, 1, 1, 1), torch.float32).flatten()

    def run(x: Tensor, h: Tensor) -> Tensor:
        total, moments = kernels.add_residual(h, x, bias)
        return kernels.normalize(total, norm, silu=True, bias=bias, moments=moments)

    whole = run(x, h)
    assert torch.equal(run(x[1:2], h[1:2]), whole[1:2])
    assert torch.equal(run(x.flip(0), h.flip(0)).flip(0), whole)
    assert torch.equal(run(x, h), whole)


def test_offsets_exceed_32_bits() -> None:
    """The second image begins beyond 2**31 values. Memory that is not touched takes no space on a CPU."""
    start = 2**31 + 64
    memory = torch.empty(start + 8 * 6 * 6, dtype=torch.float16, device=DEVICE)
    x = torch.as_strided(memory, (2, 8, 6, 6), (start, 1, 6 * 8, 8))
    x.copy_(random_activation((2, 8, 6, 6), torch.float16))
    norm = make_norm(8, 2, torch.float16)
    expected = normalize_exactly(x, norm, None, silu=True)
    torch.testing.assert_close(kernels.normalize(x, norm, silu=True).double(), expected, atol=2e-3, rtol=2e-3)
    total, _ = kernels.add_residual(x, x)
    assert torch.equal(total, (x + x))


def test_another_memory_format_is_refused() -> None:
    x = torch.zeros(1, 8, 4, 4, device=DEVICE)
    norm = make_norm(8, 2, torch.float32)
    with pytest.raises(ValueError, match="memory format channels_last"):
        kernels.normalize(x, norm, silu=True)
    with pytest.raises(ValueError, match="one shape"):
        kernels.add_residual(x, x[:, :4])
