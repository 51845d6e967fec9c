"""The transform of one image as numbers: the size to which it is resized, and the crop of it."""

from dataclasses import dataclass

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class Fit:
    """The transform of one image, in pixels.

    The image is resized to height x width. Then out_height x out_width is cropped at (top, left), and mirrored left to
    right if `flipped`. enlarged: whether resizing enlarges it.
    """

    height: int
    width: int
    top: int
    left: int
    out_height: int
    out_width: int
    enlarged: bool
    flipped: bool = False


def make_fit(original: Size, resized: Size, corner: Size, out: Size) -> Fit:
    """Return the transform of an image. corner: the top and left of the crop in the resized image."""
    return Fit(*resized, *corner, *out, enlarged=resized[0] > original[0] or resized[1] > original[1])


def find_center(resized: Size, out: Size) -> Size:
    """Return the top and left of the crop at the center: half of the excess, rounded down."""
    return (resized[0] - out[0]) // 2, (resized[1] - out[1]) // 2


def find_center_half_even(resized: Size, out: Size) -> Size:
    """Return the top and left of torchvision's CenterCrop: half of the excess, a half rounded to the even number."""
    return round((resized[0] - out[0]) / 2), round((resized[1] - out[1]) / 2)
