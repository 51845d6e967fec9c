"""`diffusers`: torchvision's Resize and CenterCrop, as the training scripts of diffusers use them on Pillow images.

The shorter side becomes `side`, and the longer one is rounded down. The center is rounded half to even. Since April
2025 the scripts resize with LANCZOS, some with BILINEAR; always antialiased by Pillow.
"""

from pipeline.images.fit import Fit, find_center_half_even, make_fit

VERSION = 1


def fit(height: int, width: int, side: int) -> Fit:
    """Return the transform of an image of this size. side: of the square."""
    shorter, longer = min(height, width), max(height, width)
    scaled = int(side * longer / shorter)
    resized = (side, scaled) if height < width else (scaled, side)
    return make_fit((height, width), resized, find_center_half_even(resized, (side, side)), (side, side))
