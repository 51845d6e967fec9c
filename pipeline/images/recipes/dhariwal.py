"""`center-crop-dhariwal`: the ImageNet recipe of Dhariwal and Nichol's ADM, bit for bit.

DiT, SiT, LightningDiT, MAR, EDM2 and REPA have it (`center_crop_arr`). While the shorter side is at least twice the
target, both sides are halved with a BOX filter. Then the shorter side is resized to the target with a BICUBIC filter,
also if that enlarges the image, and the center is cropped. Both filters are Pillow's. Sides are rounded to the nearest
integer, a half to the even one.
"""

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.images import resize
from pipeline.images.fit import Fit, find_center, make_fit

VERSION = 1


def fit(height: int, width: int, side: int) -> Fit:
    """Return the transform of an image of this size. side: of the square."""
    tall, wide = height, width
    while min(tall, wide) >= 2 * side:
        tall, wide = tall // 2, wide // 2
    scale = side / min(tall, wide)
    resized = round(tall * scale), round(wide * scale)
    return make_fit((height, width), resized, find_center(resized, (side, side)), (side, side))


def resize_and_crop(pixels: np.ndarray, fit: Fit) -> Tensor:
    """Transform RGB uint8 [H, W, 3] to uint8 [side, side, 3]."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * fit.out_height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return resize.resize_and_crop(np.asarray(image), fit, "bicubic", is_exact=True)
