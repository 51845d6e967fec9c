"""Tiling: edges, memory, and no tiling unless it is enabled."""

import pytest
import torch

from tests.conftest import MICRO
from vae import AutoencoderKL
from vae.tiling import Tiles, run_in_tiles


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**MICRO, sample_size=64).eval().requires_grad_(False)


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("shape", [(64, 64), (65, 64), (100, 230), (7, 300)])
def test_tiling_a_pointwise_function_does_not_change_its_result(shape: tuple[int, int]) -> None:
    x = random_image(*shape)
    assert torch.allclose(run_in_tiles(lambda tile: tile * 2, x, Tiles.of(64, 64, 0.25)), x * 2)


def test_the_model_never_receives_more_than_a_tile() -> None:
    sizes = []

    def run(tile: torch.Tensor) -> torch.Tensor:
        sizes.append(max(tile.shape))
        return tile

    run_in_tiles(run, random_image(500, 300), Tiles.of(64, 64, 0.25))
    assert max(sizes) == 64
    assert len(sizes) == 11 * 7


def test_images_are_tiled_only_if_tiling_is_enabled(model: AutoencoderKL) -> None:
    x = random_image(128, 192)
    whole = model.encode(x).latent_dist.mode()
    model.enable_tiling()
    try:
        tiled = model.encode(x).latent_dist.mode()
        small = model.encode(random_image(64, 64)).latent_dist.mode()
    finally:
        model.disable_tiling()
    assert tiled.shape == whole.shape
    assert not torch.allclose(tiled, whole, atol=1e-4)
    assert torch.equal(model.encode(x).latent_dist.mode(), whole)
    assert torch.equal(model.encode(random_image(64, 64)).latent_dist.mode(), small)


def test_images_up_to_a_tile_are_not_tiled(model: AutoencoderKL) -> None:
    x = random_image(128, 128)
    whole = model.encode(x).latent_dist.mode()
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = 128, 16
    try:
        assert torch.equal(model.encode(x).latent_dist.mode(), whole)
    finally:
        model.disable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = 64, 8


def test_tuples_are_returned_on_request(model: AutoencoderKL) -> None:
    x = random_image(96, 96)
    (posterior,) = model.tiled_encode(x, return_dict=False)
    (sample,) = model.tiled_decode(posterior.mode(), return_dict=False)
    assert sample.shape == x.shape


def test_the_first_of_a_pair_of_sizes_sets_the_size_of_tiles() -> None:
    model = AutoencoderKL(**{**MICRO, "sample_size": [256, 128]})
    assert model.config.sample_size == (256, 128)
    assert (model.tile_sample_min_size, model.tile_latent_min_size) == (256, 32)
