"""Aspect buckets: the few sizes that images of all shapes are encoded at, of about one area.

The grid that trainers use since NovelAI's ("Novel AI Improvements on Stable Diffusion", 2022): all pairs of sides that
are multiples of `multiple_of`, from half to twice `side`, where each side is paired with the longest other whose area
is at most side * side.
"""

import math
from collections.abc import Sequence

Bucket = tuple[int, int]  # height, width


def grid(side: int, multiple_of: int) -> tuple[Bucket, ...]:
    """The buckets of about side * side pixels, sorted. `side` and `multiple_of` in pixels; side at least twice that."""
    sides = range(math.ceil(side / 2 / multiple_of) * multiple_of, 2 * side + 1, multiple_of)
    pairs = {(one, side * side // one // multiple_of * multiple_of) for one in sides}
    square = side // multiple_of * multiple_of
    both = {(square, square)} | {pair for pair in pairs if min(pair) >= sides[0]}
    return tuple(sorted(both | {(width, height) for height, width in both}))


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose aspect ratio is nearest, as a factor, to the image's; the larger one of two alike."""

    def distance(bucket: Bucket) -> tuple[float, int]:
        return abs(math.log(bucket[0] * width / (bucket[1] * height))), -bucket[0] * bucket[1]

    return min(buckets, key=distance)
