"""`--min-std`: near-empty images are filtered by the standard deviation of their pixels after the crop."""

import numpy as np
import pytest
import torch

from pipeline.errors import FilteredOut
from pipeline.images.near_empty import MAX_STD, is_near_empty
from pipeline.images.prepare import make_opener
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from tests.conftest import encoded, smooth


def compute_std(pixels: np.ndarray) -> float:
    """Return the root of the mean of the channels' variances, in float64."""
    return float(np.sqrt(pixels.reshape(-1, 3).astype(np.float64).var(axis=0).mean()))


@pytest.mark.parametrize("seed", range(4))
def test_the_standard_deviation_is_that_of_numpy(seed: int) -> None:
    pixels = smooth(seed, 40 + seed, 31)
    std = compute_std(pixels)
    image = torch.from_numpy(pixels)
    assert (is_near_empty(image, std + 1e-9), is_near_empty(image, std - 1e-9)) == (True, False)


def test_the_standard_deviation_of_a_gray_image_is_that_of_its_levels() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    std = float(levels.astype(np.float64).std())
    image = torch.from_numpy(levels.repeat(3, axis=2))
    assert (is_near_empty(image, std + 1e-9), is_near_empty(image, std - 1e-9)) == (True, False)


def test_two_colors_of_one_brightness_are_not_empty() -> None:
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8)
    pixels[:4, :, 0] = pixels[4:, :, 1] = 200
    assert not is_near_empty(pixels, 50)


def test_the_threshold_itself_is_not_below_it() -> None:
    halves = torch.zeros(4, 4, 3, dtype=torch.uint8)
    halves[:2] = 255
    assert (is_near_empty(halves, MAX_STD), is_near_empty(halves, MAX_STD + 0.1)) == (False, True)
    assert is_near_empty(torch.full((4, 4, 3), 255, dtype=torch.uint8), 1e-6)


def test_the_crop_counts_and_not_the_rest_of_the_image() -> None:
    """A white square with a dark frame that the crop leaves out, and one in which it does not."""
    framed = np.full((64, 192, 3), 250, np.uint8)
    framed[:, :60] = framed[:, 132:] = 0
    opener = make_opener(Transform(resolution=64, min_std=2.0), Limits())
    with pytest.raises(FilteredOut, match="min_std"):
        opener(encoded(framed, "PNG"), "s", "k")
    opener(encoded(framed[:, :128], "PNG"), "s", "k")
    make_opener(Transform(resolution=64), Limits())(encoded(framed, "PNG"), "s", "k")
