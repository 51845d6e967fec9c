"""`sd-scripts`: the buckets of kohya's sd-scripts, with its four options.

An image goes to the bucket whose width / height is nearest, or to the bucket of exactly its own size. It is resized
until it covers the bucket: by INTER_AREA if neither side grows, by Pillow's LANCZOS otherwise, and not at all if it has
that size already. Then the center is cropped.

With `bucket_no_upscale` (`fit_without_enlarging`) there is no list of buckets. Images of more than the area are shrunk
so that one side is a multiple of the steps; all others keep their size. Then both sides are cropped to multiples.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pipeline.images import area, resize
from pipeline.images.buckets import Bucket
from pipeline.images.fit import Fit, find_center, make_fit

VERSION = 1


def make_buckets(side: int, shortest: int, longest: int, steps: int) -> tuple[Bucket, ...]:
    """Return the buckets of at most side * side pixels, (height, width) each, sorted by width, then by height.

    shortest, longest: of a bucket's sides; rounded down and up to a multiple of `steps`.
    """
    shortest, longest = shortest // steps * steps, math.ceil(longest / steps) * steps
    square = side // steps * steps
    buckets = {(square, square)}
    for width in range(max(shortest, steps), longest + 1, steps):
        height = min(longest, side * side // width // steps * steps)
        if height >= max(shortest, steps):
            buckets |= {(height, width), (width, height)}
    return tuple(sorted(buckets, key=lambda bucket: (bucket[1], bucket[0])))


def fit(height: int, width: int, buckets: Sequence[Bucket]) -> Fit:
    """Return the transform of an image of this size. buckets: in the order of `make_buckets`; of equals, the first."""
    ratio = width / height
    bucket = (height, width)
    if bucket not in buckets:
        bucket = min(buckets, key=lambda bucket: abs(bucket[1] / bucket[0] - ratio))
    scale = bucket[0] / height if ratio > bucket[1] / bucket[0] else bucket[1] / width
    resized = int(height * scale + 0.5), int(width * scale + 0.5)
    return make_fit((height, width), resized, find_center(resized, bucket), bucket)


def fit_without_enlarging(height: int, width: int, side: int, steps: int) -> Fit | None:
    """Return the transform of an image of this size with `bucket_no_upscale`. None if its bucket would be empty."""
    resized = _shrink(height, width, side * side, steps) if height * width > side * side else (height, width)
    bucket = resized[0] // steps * steps, resized[1] // steps * steps
    if not min(bucket):
        return None
    return make_fit((height, width), resized, find_center(resized, bucket), bucket)


def _shrink(height: int, width: int, pixels: int, steps: int) -> tuple[int, int]:
    """Return the size to which an image of more than `pixels` is resized. A side may be 0.

    One side is a multiple of the steps: the one with which the rounded sides have the nearer aspect ratio.
    """
    ratio = width / height
    wide = math.sqrt(pixels * ratio)
    tall = pixels / wide
    by_width, by_height = _round_to_steps(wide, steps), _round_to_steps(tall, steps)
    other_height, other_width = _round_to_steps(by_width / ratio, steps), _round_to_steps(by_height * ratio, steps)
    if not other_height or not by_height:
        return 0, 0
    if abs(by_width / other_height - ratio) < abs(other_width / by_height - ratio):
        return int(by_width / ratio + 0.5), by_width
    return by_height, int(by_height * ratio + 0.5)


def _round_to_steps(side: float, steps: int) -> int:
    """Return a side rounded to an integer, then down to a multiple of the steps."""
    return int(side + 0.5) // steps * steps


def bound_pixels(side: int, steps: int) -> int:
    """Return an upper bound of the pixels of `fit_without_enlarging`: rounding can add a row and a column."""
    return side * side + 5 * side * side // steps + 1


def resize_and_crop(pixels: np.ndarray, fit: Fit) -> Tensor:
    """Transform RGB uint8 [H, W, 3] to uint8 [out_height, out_width, 3]."""
    if pixels.shape[:2] == (fit.height, fit.width) or fit.enlarged:
        return resize.resize_and_crop(pixels, fit, "lanczos", is_exact=True)
    return area.shrink_and_crop(pixels, fit)
