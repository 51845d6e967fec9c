"""The implementations of attention agree with each other."""

from typing import Any

import pytest
import torch

from tests.conftest import MICRO
from vae import AutoencoderKL
from vae.attention import SDPA, PerImage, Plain, Processor, Sliced

NAMES = [f"{half}.mid_block.attentions.0.processor" for half in ("encoder", "decoder")]


@pytest.fixture
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**MICRO).eval().requires_grad_(False)


def reconstruct(model: AutoencoderKL) -> torch.Tensor:
    x = torch.rand(2, 3, 96, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return model(x).sample


@pytest.mark.parametrize("processor", [SDPA(), Plain(), Sliced(), Sliced(7), PerImage(), PerImage(500)], ids=repr)
def test_every_processor_gives_the_same_result(model: AutoencoderKL, processor: Processor) -> None:
    expected = reconstruct(model)
    model.set_attn_processor(processor)
    assert model.attn_processors == dict.fromkeys(NAMES, processor)
    assert torch.allclose(reconstruct(model), expected, atol=1e-4)
    model.set_default_attn_processor()
    assert torch.equal(reconstruct(model), expected)


def test_each_attention_may_have_its_own_processor(model: AutoencoderKL) -> None:
    chosen: dict[str, Any] = dict(zip(NAMES, (Plain(), Sliced(5)), strict=True))
    model.set_attn_processor(chosen)
    assert model.attn_processors == chosen
    with pytest.raises(ValueError, match="the keys of processor must be those of the model's attentions: encoder"):
        model.set_attn_processor({"encoder": Plain()})


def test_a_processor_receives_queries_keys_and_values_of_the_documented_shape(model: AutoencoderKL) -> None:
    shapes = []

    def return_zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shapes.append((q.shape, k.shape, v.shape))
        return torch.zeros_like(v)

    expected = reconstruct(model)
    model.set_attn_processor(return_zeros)
    assert not torch.allclose(reconstruct(model), expected)
    assert shapes == [((2, 1, 12 * 9, 8),) * 3] * 2


def test_fused_projections_give_the_same_result(model: AutoencoderKL) -> None:
    expected, names = reconstruct(model), set(model.state_dict())
    model.fuse_qkv_projections()
    assert torch.allclose(reconstruct(model), expected, atol=1e-4)
    assert set(model.state_dict()) == names, "the saved tensors do not change"
    assert model.double()(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).sample.dtype == torch.float64
    model.float().unfuse_qkv_projections()
    assert torch.equal(reconstruct(model), expected)


def test_a_model_without_attention_has_no_processors() -> None:
    model = AutoencoderKL(**MICRO, mid_block_add_attention=False)
    assert model.attn_processors == {}
    model.set_attn_processor(Plain())
    model.fuse_qkv_projections()


def test_half_precision_computes_its_softmax_in_float32() -> None:
    # In bfloat16, 5,000 equal weights of 1/5000 would have a sum of 0.6 to 1.6.
    q, v = torch.zeros(1, 1, 5000, 8), torch.ones(1, 1, 5000, 8)
    assert torch.allclose(Plain()(*(part.bfloat16() for part in (q, q, v))).float(), v, atol=0.01)
