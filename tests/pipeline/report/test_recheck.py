"""The cause of a latent that differs from that of its image."""

import pytest
import torch

from latentmill.scaling import Scaling
from pipeline.encoder import ComputeConfig, LatentEncoder, measure_error
from pipeline.report.recheck import find_cause
from pipeline.weights import Vae
from tests.checked_images import make_image

CPU = ComputeConfig(device="cpu", precision="fp32", batch_size=1, threads=1)


@pytest.mark.parametrize(("factor", "cause"), [(1.0, "none"), (1.03, "none"), (1.07, "unknown")])
def test_a_latent_may_differ_by_what_verify_accepts(vae: Vae, factor: float, cause: str) -> None:
    encoder, image = LatentEncoder(vae, CPU, "float32"), make_image(0, 32, 32)
    latent = encoder.encode([image])[0].latent
    assert isinstance(latent, torch.Tensor)
    assert find_cause(latent * factor, image, encoder, Scaling((0.0,), (0.5,))) == cause


@pytest.mark.parametrize("values", [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_values_that_are_not_finite_have_no_error(values: tuple[float, float]) -> None:
    assert measure_error(*(torch.full((2, 2), value) for value in values)) is None


def test_channels_in_another_order_are_swapped(vae: Vae) -> None:
    encoder, image = LatentEncoder(vae, CPU, "float32"), make_image(0, 32, 32)
    latent = encoder.encode([image])[0].latent
    assert isinstance(latent, torch.Tensor)
    assert find_cause(latent.roll(1, dims=0), image, encoder, Scaling((0.0,), (0.5,))) == "swapped-channels"
