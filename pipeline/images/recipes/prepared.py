"""`none`: the images are prepared already. An image that does not fit is rejected."""

from pipeline.errors import Rejected
from pipeline.images.fit import Fit, make_fit

VERSION = 1


def fit(height: int, width: int, side: int, multiple_of: int) -> Fit:
    """Return the transform of an image of this size: itself.

    Raises Rejected (`wrong_size`) unless both sides are multiples of `multiple_of`, and it has at most side * side
    pixels.
    """
    if height % multiple_of or width % multiple_of or height * width > side * side:
        raise Rejected("transform", "wrong_size", width, height, multiple_of, side, side)
    return make_fit((height, width), (height, width), (0, 0), (height, width))
