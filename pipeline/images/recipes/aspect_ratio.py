"""`aspect-ratio-512`, `-1024` and `-2048`: the multi-scale training of PixArt and SANA.

Their tables have 40 sizes, each with an aspect ratio (height / width) of two digits. An image has the size of the
nearest ratio of the table; the size's own ratio does not count. It is resized until it covers that size, with the free
side rounded down: BICUBIC, or LANCZOS for 2048, antialiased by Pillow. Then torchvision's CenterCrop follows.
"""

from pipeline.images.buckets import Bucket
from pipeline.images.fit import Fit, find_center_half_even, make_fit
from pipeline.records import Interpolation

VERSION = 1
SIDES = (512, 1024, 2048)

# fmt: off
# Height / width, and the height and width for 1024. Those for 512 and 2048 are half and twice of them.
TABLE: tuple[tuple[float, Bucket], ...] = (
    (0.25, (512, 2048)), (0.26, (512, 1984)), (0.27, (512, 1920)), (0.28, (512, 1856)),
    (0.32, (576, 1792)), (0.33, (576, 1728)), (0.35, (576, 1664)), (0.4, (640, 1600)),
    (0.42, (640, 1536)), (0.48, (704, 1472)), (0.5, (704, 1408)), (0.52, (704, 1344)),
    (0.57, (768, 1344)), (0.6, (768, 1280)), (0.68, (832, 1216)), (0.72, (832, 1152)),
    (0.78, (896, 1152)), (0.82, (896, 1088)), (0.88, (960, 1088)), (0.94, (960, 1024)),
    (1.0, (1024, 1024)), (1.07, (1024, 960)), (1.13, (1088, 960)), (1.21, (1088, 896)),
    (1.29, (1152, 896)), (1.38, (1152, 832)), (1.46, (1216, 832)), (1.67, (1280, 768)),
    (1.75, (1344, 768)), (2.0, (1408, 704)), (2.09, (1472, 704)), (2.4, (1536, 640)),
    (2.5, (1600, 640)), (2.89, (1664, 576)), (3.0, (1728, 576)), (3.11, (1792, 576)),
    (3.62, (1856, 512)), (3.75, (1920, 512)), (3.88, (1984, 512)), (4.0, (2048, 512)),
)
# fmt: on


def list_sizes(side: int) -> tuple[Bucket, ...]:
    """Return the sizes of a table, (height, width) each, in its order. side: 512, 1024 or 2048."""
    return tuple((height * side // 1024, width * side // 1024) for _, (height, width) in TABLE)


def fit(height: int, width: int, side: int) -> Fit:
    """Return the transform of an image of this size. side: of the table; of ratios as near as each other, the first."""
    ratio = height / width
    chosen = min(range(len(TABLE)), key=lambda index: abs(TABLE[index][0] - ratio))
    tall, wide = out = list_sizes(side)[chosen]
    resized = (tall, int(width * tall / height)) if tall / height > wide / width else (int(height * wide / width), wide)
    return make_fit((height, width), resized, find_center_half_even(resized, out), out)


def choose_interpolation(side: int) -> Interpolation:
    """Return the filter of a table."""
    return "lanczos" if side == 2048 else "bicubic"
