"""The fused encoder computes the same function as the plain one. Without a GPU, Triton's interpreter runs it."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import MICRO, slow_param
from vae import AutoencoderKL
from vae.attention import PerImage
from vae.fast import fuse_encoder

pytest.importorskip("triton")

from vae import group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "micro": MICRO,
    "wider": {**TWO_LEVELS, "block_out_channels": (8, 12), "layers_per_block": 2},
    "one level": {**MICRO, "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    | {"block_out_channels": (8,), "latent_channels": 2, "use_quant_conv": False},
    "no attention": {**TWO_LEVELS, "block_out_channels": (12, 8), "mid_block_add_attention": False},
    "mish": {**TWO_LEVELS, "block_out_channels": (8, 16), "act_fn": "mish"},
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_model(**config: Any) -> AutoencoderKL:
    """Return a model in channels_last. All its parameters, biases as well, are random and not near their defaults."""
    torch.manual_seed(0)
    model = AutoencoderKL(**config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.5 + (1.0 if "norm" in name and "weight" in name else 0.2))
    return model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def random_pixels(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2 - 1


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        slow_param("micro", 16, 24),
        ("one level", 12, 20),
        ("no attention", 12, 10),
        slow_param("wider", 20, 12),
        slow_param("micro", 64, 64),
        slow_param("mish", 16, 16),
    ],
)
def test_the_moments_are_those_of_the_plain_encoder_in_float64(config: str, height: int, width: int) -> None:
    model, x = make_model(**CONFIGS[config]), random_pixels(2, height, width)
    expected = copy.deepcopy(model).double().moments(x.double())
    fuse_encoder(model)
    actual = model.moments(x)
    assert actual.dtype == torch.float32
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=str)
def test_the_error_in_half_precision_is_that_of_rounding(dtype: torch.dtype, largest: float) -> None:
    model, x = make_model(**MICRO).to(dtype), random_pixels(1, 16, 16).to(dtype)
    exact = copy.deepcopy(model).double().moments(x.double())
    fuse_encoder(model)
    error = model.moments(x).double() - exact
    assert float(error.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) < largest


@pytest.mark.slow
def test_no_bit_depends_on_the_batch_or_the_position_in_it() -> None:
    model, x = make_model(**CONFIGS["no attention"]), random_pixels(3, 12, 8)
    fuse_encoder(model)
    whole = model.moments(x)
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # as a job does; torch's convolutions depend on the division into threads
    assert torch.equal(model.moments(x.flip(0)).flip(0), whole)
    assert torch.equal(model.moments(torch.cat([x[:1], x[:1], x[:1]]))[1:2], whole[:1])


def test_the_parameters_keep_their_names() -> None:
    model = make_model(**MICRO)
    names, dtype = list(model.state_dict()), model.dtype
    fuse_encoder(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert model.dtype == dtype


@pytest.mark.slow
def test_the_attention_of_each_image_alone_can_be_used() -> None:
    model, x = make_model(**MICRO), random_pixels(2, 16, 16)
    expected = model.moments(x)
    fuse_encoder(model)
    model.set_attn_processor(PerImage())
    torch.testing.assert_close(model.moments(x), expected, atol=1e-5, rtol=1e-5)


class AnyGrid:
    """Replaces a kernel, and does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


class RecordedOperations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, kinds: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        self.counts[str(function).removeprefix("aten.").partition(".")[0]] += 1
        return function(*arguments, **(keywords or {}))


def test_no_activation_is_copied_or_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the kernels, there are convolutions, the products of the attention, and borders of zeros."""
    for name in ("sum_moments", "merge_moments", "normalize", "add_residual"):
        monkeypatch.setattr(group_norm_silu.kernels, name, AnyGrid())
    with torch.inference_mode(False), torch.no_grad():  # inference mode does not show what operations consist of
        model, x = make_model(**CONFIGS["wider"]), random_pixels(2, 12, 8)
        fuse_encoder(model)
        x = x.contiguous(memory_format=torch.channels_last)
        with RecordedOperations() as recorded:
            model.encoder(x)
    views = {"permute", "transpose", "view", "_unsafe_view", "select", "slice", "unbind", "t", "squeeze", "unsqueeze"}
    found = {
        name: count
        for name, count in recorded.counts.items()
        if name not in views and not name.startswith(("empty", "new_empty", "_scaled_dot_product"))
    }
    # 6 blocks of two convolutions, a shortcut, conv_in, conv_out, and a Downsample, whose input has two borders
    assert found == {"convolution": 6 * 2 + 1 + 3, "zero_": 2, "addmm": 3, "mm": 1}
