"""Aspect-ratio buckets: a few sizes of about the same area, at which images of any shape are encoded.

The grid is the one of NovelAI ("Novel AI Improvements on Stable Diffusion", 2022), which trainers have used since. It
has all pairs of sides that are multiples of `multiple_of`, from half to twice `side`. Each side is paired with the
longest other side for which the area is at most side * side.
"""

import math
from collections.abc import Sequence

Bucket = tuple[int, int]  # height, width


def make_grid(side: int, multiple_of: int) -> tuple[Bucket, ...]:
    """Return the sorted buckets of about side * side pixels. Both arguments in pixels; side >= 2 * multiple_of."""
    sides = range(math.ceil(side / 2 / multiple_of) * multiple_of, 2 * side + 1, multiple_of)
    pairs = {(first, side * side // first // multiple_of * multiple_of) for first in sides}
    square = side // multiple_of * multiple_of
    both = {(square, square)} | {pair for pair in pairs if min(pair) >= sides[0]}
    return tuple(sorted(both | {(width, height) for height, width in both}))


def find_nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """Return the bucket whose aspect ratio differs from the image's by the smallest factor; of equals, the largest."""

    def distance(bucket: Bucket) -> tuple[float, int]:
        return abs(math.log(bucket[0] * width / (bucket[1] * height))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)
