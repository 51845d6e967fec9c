"""INTER_AREA in numpy: OpenCV's own bytes, and the rule itself."""

import hashlib

import numpy as np
import pytest

from pipeline.images.area import shrink_and_crop
from pipeline.images.fit import Fit

Size = tuple[int, int]


def shrink(pixels: np.ndarray, size: Size) -> np.ndarray:
    return shrink_and_crop(pixels, Fit(*size, 0, 0, *size, enlarged=False)).numpy()


def make_pattern(height: int, width: int) -> np.ndarray:
    rows, columns, channels = np.ogrid[:height, :width, :3]
    values = (rows * rows * 37 + columns * columns * 101 + rows * columns * 59 + channels * 83) // 7
    return np.asarray(values % 256, np.uint8)


def draw_sizes(seed: int) -> tuple[Size, Size]:
    """Return the height and width of an image and of its reduction, whole factors among them."""
    draw = np.random.default_rng(seed)
    target = draw.integers(1, 60, 2)
    factors = draw.integers(1, 7, 2) if seed % 3 == 0 else draw.uniform(1, 7, 2)
    source = np.maximum(target, (target * factors).astype(int))
    return (int(source[0]), int(source[1])), (int(target[0]), int(target[1]))


@pytest.mark.parametrize(
    ("source", "target", "sha256"),
    [
        ((96, 128), (64, 85), "2902aca256da101d"),
        ((100, 100), (50, 50), "8c409cc9867f9044"),  # blocks of 2 x 2
        ((90, 120), (30, 20), "d2b129642d02852b"),  # blocks of 3 x 6
        ((300, 77), (123, 77), "a54aa6f057f9ef99"),  # one side only
        ((147, 245), (3, 5), "59875915b9e48409"),  # 1 / (1 / 49) is not 49
        ((200, 301), (61, 199), "8ebb5b991c930423"),
        ((64, 65), (63, 64), "0412662795e78332"),
    ],
)
def test_the_bytes_are_those_of_opencv_5(source: Size, target: Size, sha256: str) -> None:
    """The hashes are of `cv2.resize(..., interpolation=cv2.INTER_AREA)` of opencv-python-headless 5.0.0."""
    assert hashlib.sha256(shrink(make_pattern(*source), target).tobytes()).hexdigest()[:16] == sha256


def test_every_byte_of_noise_is_that_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    for seed in range(200):
        source, target = draw_sizes(seed)
        pixels = np.random.default_rng(seed).integers(0, 256, (*source, 3), dtype=np.uint8)
        expected = cv2.resize(pixels, target[::-1], interpolation=cv2.INTER_AREA)
        assert np.array_equal(shrink(pixels, target), expected), (source, target)


def cover(source: int, target: int) -> np.ndarray:
    """Return the part of each pixel of the result that each source pixel covers, float64 [target, source]."""
    scale = source / target
    begins, pixels = np.arange(target)[:, None] * scale, np.arange(source)
    overlap = np.minimum(begins + scale, pixels + 1) - np.maximum(begins, pixels)
    return overlap.clip(0) / scale


def test_each_pixel_is_the_mean_of_the_area_that_it_covers() -> None:
    for seed in range(40):
        source, target = draw_sizes(seed)
        pixels = np.random.default_rng(seed).integers(0, 256, (*source, 3), dtype=np.uint8)
        rows, columns = (cover(*sides) for sides in zip(source, target, strict=True))
        exact = columns @ np.tensordot(rows, pixels, 1)
        assert np.abs(shrink(pixels, target) - exact).max() < 0.501, (source, target)


def test_halves_are_rounded_up_in_blocks_of_two_by_two_and_to_even_otherwise() -> None:
    for value, rounded in ((2, 1), (6, 2), (10, 3)):  # means of 0.5, 1.5 and 2.5
        block = np.zeros((2, 2, 3), np.uint8)
        block[0, 0] = value
        assert shrink(block, (1, 1))[0, 0, 0] == rounded
    for value, rounded in ((1, 0), (3, 2), (5, 2)):
        pair = np.zeros((2, 1, 3), np.uint8)
        pair[0] = value
        assert shrink(pair, (1, 1))[0, 0, 0] == rounded


def test_computing_only_the_crop_changes_no_pixel() -> None:
    draw = np.random.default_rng(2)
    for seed in range(60):
        source, target = draw_sizes(seed)
        pixels = draw.integers(0, 256, (*source, 3), dtype=np.uint8)
        top, left = (int(draw.integers(side)) for side in target)
        height, width = int(draw.integers(1, target[0] - top + 1)), int(draw.integers(1, target[1] - left + 1))
        cut = shrink_and_crop(pixels, Fit(*target, top, left, height, width, enlarged=False)).numpy()
        assert np.array_equal(cut, shrink(pixels, target)[top : top + height, left : left + width]), (source, target)
