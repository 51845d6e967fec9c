"""`center-crop`: resize an image until it just covers its target, and crop the center.

The target is a square, or the bucket whose aspect ratio is nearest as a factor. For a square, the shorter side becomes
`resolution`, and the longer side `round(long * resolution / short)`. Our buckets, and their choice by the factor, are
our own: no trainer has exactly these.
"""

from collections.abc import Sequence

from pipeline.images.buckets import Bucket, find_nearest
from pipeline.images.fit import Fit, find_center, make_fit

VERSION = 1


def fit(height: int, width: int, sizes: Sequence[Bucket]) -> Fit:
    """Return the transform of an image of this size. sizes: the possible targets."""
    out_height, out_width = find_nearest(sizes, height, width)
    if out_height * width >= out_width * height:  # the height determines the scale
        resized = out_height, max(out_width, round(width * out_height / height))
    else:
        resized = max(out_height, round(height * out_width / width)), out_width
    return make_fit((height, width), resized, find_center(resized, (out_height, out_width)), (out_height, out_width))


def fit_without_resizing(height: int, width: int, side: int, multiple_of: int) -> Fit | None:
    """Return the crop of an image that is too small for the buckets: the largest sides that are multiples.

    None if a side is below `multiple_of`, or if the crop has more than side * side pixels, as of a line of pixels.
    """
    out = height // multiple_of * multiple_of, width // multiple_of * multiple_of
    if not 0 < out[0] * out[1] <= side * side:
        return None
    return make_fit((height, width), (height, width), find_center((height, width), out), out)
