"""`--flip both`: a second latent per row, that of the image mirrored left to right."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cache.tally import tally_rows
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import Rejected
from pipeline.records import EncodedImage, PreparedImage, Row, Store
from pipeline.weights import Vae
from tests.checked_images import make_image

CPU = ComputeConfig(device="cpu", precision="fp32", batch_size=2, threads=1)
IMAGES = [make_image(number, 64, 80) for number in range(3)]


def mirror(image: PreparedImage) -> PreparedImage:
    """Return an image whose pixels were mirrored before it came to the encoder."""
    return dataclasses.replace(image, pixels=torch.from_numpy(image.pixels.numpy()[:, ::-1].copy()))


def latents_of(encoded: Sequence[EncodedImage]) -> torch.Tensor:
    return torch.stack([image.latent for image in encoded if isinstance(image.latent, torch.Tensor)])


def flipped_of(encoded: Sequence[EncodedImage]) -> torch.Tensor:
    return torch.stack([image.latent_flipped for image in encoded if image.latent_flipped is not None])


@pytest.mark.parametrize("batch_size", [1, 4, 8])
@pytest.mark.parametrize(
    "settings",
    [{}, {"store": "moments", "dtype": "float16"}, {"tile_above": 32}, {"dtype": "bfloat16"}],
    ids=["mode", "moments", "tiles", "bfloat16"],
)
def test_both_latents_equal_those_of_images_and_of_mirrored_images(
    vae: Vae, settings: dict[str, Any], batch_size: int
) -> None:
    """Bit for bit, for any number of images and mirrored images in a batch."""
    settings = {"compute": dataclasses.replace(CPU, batch_size=batch_size), "dtype": "float32", **settings}
    single, both = LatentEncoder(vae, **settings), LatentEncoder(vae, **settings, has_flipped=True)
    encoded = both.encode(IMAGES)
    assert torch.equal(latents_of(encoded), latents_of(single.encode(IMAGES)))
    assert torch.equal(flipped_of(encoded), latents_of(single.encode([mirror(image) for image in IMAGES])))
    assert both.images == 3, "an image counts once"


def test_images_and_flipped_images_share_batches(vae: Vae) -> None:
    encoder = LatentEncoder(vae, dataclasses.replace(CPU, batch_size=4), "float32", has_flipped=True)
    assert [len(encoder.encode(IMAGES[:count])) for count in (1, 2, 3)] == [1, 2, 3]
    assert encoder.runs == 1 + 1 + 2


def test_pixels_are_unchanged(vae: Vae) -> None:
    before = [image.pixels.clone() for image in IMAGES]
    LatentEncoder(vae, CPU, "float32", has_flipped=True).encode(IMAGES)
    assert all(torch.equal(image.pixels, pixels) for image, pixels in zip(IMAGES, before, strict=True))


def test_the_samples_of_an_image_and_its_mirror_image_have_their_own_noise(vae: Vae) -> None:
    def encode(images: Sequence[PreparedImage], store: Store, has_flipped: bool = False) -> Sequence[EncodedImage]:
        return LatentEncoder(vae, CPU, "float32", store, seed=5, has_flipped=has_flipped).encode(images)

    encoded = encode(IMAGES, "sample", has_flipped=True)
    assert torch.equal(latents_of(encoded), latents_of(encode(IMAGES, "sample")))
    moments = encode(IMAGES, "moments", has_flipped=True)
    noises = []
    for sample, parameters in ((latents_of, latents_of), (flipped_of, flipped_of)):
        mean, logvar = parameters(moments).chunk(2, dim=1)
        noises.append((sample(encoded) - mean) / torch.exp(0.5 * logvar))
    noise = torch.cat(noises)
    assert (abs(float(noise.mean())) < 0.05, abs(float(noise.std()) - 1) < 0.05) == (True, True)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.3


def encode_with_overflows(vae: Vae, precision: str, overflows: Sequence[bool]) -> Sequence[EncodedImage]:
    """Encode two images. overflows: whether the image, or the flipped image, of each number is not finite.

    The order is that of the batch: two images, then the flipped ones.
    """
    compute = dataclasses.replace(CPU, batch_size=4, precision=precision)
    encoder = LatentEncoder(vae, compute, "float32", has_flipped=True)
    run = encoder.model.encode

    def encode(pixels: torch.Tensor) -> Any:
        result: Any = run(pixels)
        result.latent_dist.mean[torch.tensor(overflows)] = torch.inf
        return result

    encoder.model.encode = encode  # type: ignore[method-assign,assignment]
    return encoder.encode(IMAGES[:2])


@pytest.mark.parametrize("number", range(4))
def test_an_image_of_which_either_latent_overflows_is_encoded_in_float32(vae: Vae, number: int) -> None:
    encoded = encode_with_overflows(vae, "bf16", [number == index for index in range(4)])
    assert [image.is_fallback for image in encoded] == [number % 2 == 0, number % 2 == 1]
    exact = LatentEncoder(vae, dataclasses.replace(CPU, batch_size=4), "float32", has_flipped=True).encode(IMAGES[:2])
    actual, expected = (torch.cat([latents_of(results), flipped_of(results)]) for results in (encoded, exact))
    assert [torch.equal(*pair) for pair in zip(actual, expected, strict=True)] == [number == n for n in range(4)]


@pytest.mark.parametrize("number", range(4))
def test_an_image_of_which_either_latent_is_not_finite_is_rejected(vae: Vae, number: int) -> None:
    encoded = encode_with_overflows(vae, "fp32", [number == index for index in range(4)])
    assert [isinstance(image.latent, Rejected) for image in encoded] == [number % 2 == 0, number % 2 == 1]


@pytest.mark.parametrize("store", ["mode", "moments"])
def test_the_statistics_cover_both_latents_but_count_a_row_once(store: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 4, 3, 5, generator=generator) for _ in range(6)]
    rows = [Row(image, pair[None], 0) for image, pair in zip(IMAGES * 2, pairs, strict=True)]
    tally = tally_rows(rows, store)["64x80"]
    values = np.stack([pair.numpy().astype(np.float64) for pair in pairs]).reshape(12, 4, 15)
    means = values[:, :2] if store == "moments" else values
    assert (tally.samples, tally.values) == (6, 12 * 15)
    np.testing.assert_allclose(tally.mean, means.mean(axis=(0, 2)))
    np.testing.assert_allclose(tally.m2, means.var(axis=(0, 2)) * 12 * 15)
    assert (tally.min, tally.max) == (means.min(axis=(0, 2)).tolist(), means.max(axis=(0, 2)).tolist())
    if store == "moments":
        np.testing.assert_allclose(tally.variance or [], np.exp(values[:, 2:]).mean(axis=(0, 2)))
