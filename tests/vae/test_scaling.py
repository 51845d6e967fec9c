import pytest
import torch

from latentmill.scaling import Scaling
from vae import AutoencoderKLConfig
from vae.scaling import scaling_of

# Raw latents of four channels with one value each, and the model latents of each rule, computed by hand.
RAW = (1.0, -2.0, 0.5, 4.0)
RULES = {
    "sd": ({"scaling_factor": 0.18215}, (0.18215, -0.3643, 0.091075, 0.7286)),
    "sdxl": ({"scaling_factor": 0.13025}, (0.13025, -0.2605, 0.065125, 0.521)),
    "sd3": ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, (1.43729255, -3.15420745, 0.67204255, 6.02879255)),
    "flux": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, (0.31924851, -0.76405149, 0.13869851, 1.40254851)),
    "constants": (
        {"scaling_factor": 0.5, "latents_mean": (1.0, 2.0, -1.5, 0.0), "latents_std": (2.0, 4.0, 0.5, 8.0)},
        (0.0, -0.5, 2.0, 0.25),
    ),
    "constants alone": (
        {"scaling_factor": 1.0, "latents_mean": (1.0, 2.0, -1.5, 0.0), "latents_std": (2.0, 4.0, 0.5, 8.0)},
        (0.0, -1.0, 4.0, 0.5),
    ),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> tuple[Scaling, tuple[float, ...]]:
    fields, expected = RULES[request.param]
    return scaling_of(AutoencoderKLConfig(**fields)), expected


def test_each_rule_gives_the_values_computed_by_hand(rule: tuple[Scaling, tuple[float, ...]]) -> None:
    scaling, expected = rule
    raw = torch.tensor(RAW).view(4, 1, 1)
    assert scaling.to_model(raw).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert scaling.to_raw(torch.tensor(expected).view(4, 1, 1)).flatten().tolist() == pytest.approx(RAW, abs=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 4, 3, 5), (2, 2, 4, 3, 5)])
def test_a_round_trip_restores_the_latents(rule: tuple[Scaling, tuple[float, ...]], shape: tuple[int, ...]) -> None:
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = rule[0].to_model(raw)
    assert model.shape == shape
    assert not torch.equal(model, raw)
    torch.testing.assert_close(rule[0].to_raw(model), raw)


def test_the_constants_apply_to_their_channel_in_a_batch() -> None:
    scaling = Scaling((0.0, 1.0, 2.0, 3.0), (1.0, 10.0, 100.0, 1000.0))
    model = scaling.to_model(torch.full((2, 4, 4, 4), 5.0))
    assert model.mean(dim=(0, 2, 3)).tolist() == [5, 40, 300, 2000]
    assert torch.equal(model[0], model[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_does_not_change(rule: tuple[Scaling, tuple[float, ...]], dtype: torch.dtype) -> None:
    raw = torch.ones(4, 2, 2, dtype=dtype)
    assert rule[0].to_model(raw).dtype == rule[0].to_raw(raw).dtype == dtype


def test_the_input_is_not_changed(rule: tuple[Scaling, tuple[float, ...]]) -> None:
    raw = torch.ones(4, 2, 2)
    rule[0].to_model(raw), rule[0].to_raw(raw)
    assert torch.equal(raw, torch.ones(4, 2, 2))
