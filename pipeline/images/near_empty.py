"""Find images that show almost nothing: blank pages, and tiles of one color."""

import numpy as np
from PIL import Image
from torch import Tensor

LEVELS = 256
MAX_STD = 127.5  # half of the pixels 0, the others 255


def is_near_empty(pixels: Tensor, min_std: float) -> bool:
    """Return whether the standard deviation of an image is below `min_std`.

    pixels: RGB uint8 [H, W, 3]. min_std: in gray levels, from 0 to MAX_STD. The standard deviation is the root of the
    mean variance of the three channels. So that of a gray image is that of its gray levels, and two colors of the same
    brightness are not equal. The sums are those of integers, so the result is the same on every machine.
    """
    counts = Image.fromarray(pixels.numpy()).histogram()
    size = pixels.shape[0] * pixels.shape[1]
    variances = 0  # of all channels, times size * size
    for channel in np.array(counts, np.int64).reshape(3, LEVELS):
        levels = np.arange(LEVELS)
        variances += size * int(channel @ levels**2) - int(channel @ levels) ** 2
    return variances < 3 * (size * min_std) ** 2
