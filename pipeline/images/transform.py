"""Resize and crop images to the size at which they are encoded.

An image is resized so that it just covers its target: the square of `resolution`, or the bucket nearest to its shape.
For a square, the shorter side becomes `resolution`, and the longer side `round(long * resolution / short)`. Then the
target is cropped: at the center, `excess // 2` from the top and from the left, or at a uniformly random position.
With `flip`, half of the images are mirrored.

Resizing is always antialiased, and equals Pillow's filter of the same name within 1/255 per channel. Reductions to half
or less, which cost most, run in torch, which is three to five times faster. All others run in Pillow, for two reasons.
If noise images are reduced to more than half, torch's integer weights are off by 2 in one of ten. If an image is about
twice as tall as wide, Pillow 13 resizes the columns first, and clamping between the passes then gives another image.

A line of pixels would become a very long image. If the resized image had more than MAX_RESIZED pixels, and more than
MAX_TIMES as many as the crop, only the crop is computed. It may then differ by the effect of clamping between the
passes.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.images.buckets import Bucket, find_nearest
from pipeline.images.seeds import derive_seed
from pipeline.records import Crop, Flip, Interpolation

# Part of a cache's identity. Increase it if the same settings give other pixels.
VERSION = 1

MAX_RESIZED = 1 << 25  # pixels; half a GB during the resize. At 1,024 px, an image 32 times as long as high.
MAX_TIMES = 16
MAX_TALL = 1.9  # height / width up to which Pillow resizes the rows first, as torch does

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """The settings of the transform. Sizes are in pixels.

    resolution: height and width of the output; with buckets, the side of a square of their area.
    buckets: the possible output sizes, multiples of `multiple_of`; default: only the square of `resolution`.
    min_size: images with a shorter side than this are filtered.
    seed: of random crops and flips.
    """

    resolution: int
    buckets: tuple[Bucket, ...] = ()
    multiple_of: int = 0
    min_size: int = 0
    interpolation: Interpolation = "bicubic"
    crop: Crop = "center"
    flip: Flip = "none"
    seed: int = 0

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The heights and widths of all outputs."""
        return self.buckets or ((self.resolution, self.resolution),)

    def fit(self, height: int, width: int, shard: str = "", key: str = "") -> Fit | None:
        """Return the transform of an image of this size, or None if it is filtered. shard, key: for random numbers."""
        if min(height, width) < self.min_size:
            return None
        square = (self.resolution, self.resolution)
        out_height, out_width = find_nearest(self.buckets, height, width) if self.buckets else square
        if out_height * width >= out_width * height:  # the height determines the scale
            tall, wide = out_height, max(out_width, round(width * out_height / height))
        else:
            tall, wide = max(out_height, round(height * out_width / width)), out_width
        excess = (tall - out_height) + (wide - out_width)  # one of them is 0
        cut = excess // 2 if self.crop == "center" else int(self._draw("crop", shard, key) * (excess + 1))
        return Fit(
            height=tall,
            width=wide,
            top=cut if tall > out_height else 0,
            left=cut if wide > out_width else 0,
            out_height=out_height,
            out_width=out_width,
            enlarged=tall > height or wide > width,
            flipped=self.flip == "random" and self._draw("flip", shard, key) < 0.5,
        )

    def _draw(self, purpose: str, shard: str, key: str) -> float:
        """Return a random number in [0, 1) that follows from the sample."""
        return random.Random(derive_seed(self.seed, purpose, shard, key)).random()

    def apply(self, pixels: np.ndarray, fit: Fit) -> Tensor:
        """Transform RGB uint8 [H, W, 3] to uint8 [out_height, out_width, 3]."""
        if fit.height * fit.width > max(MAX_RESIZED, MAX_TIMES * fit.out_height * fit.out_width):
            cut = resize_cut(pixels, fit, self.interpolation)
        else:
            resized = resize(pixels, fit.height, fit.width, self.interpolation)
            cut = resized[fit.top : fit.top + fit.out_height, fit.left : fit.left + fit.out_width]
        return (cut.flip(1) if fit.flipped else cut).contiguous()


def resize(pixels: np.ndarray, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize RGB uint8 [H, W, 3] to uint8 [height, width, 3], antialiased."""
    tall, wide = pixels.shape[:2]
    if (tall, wide) == (height, width):
        return torch.from_numpy(pixels.copy())
    halves = 2 * height <= tall and 2 * width <= wide
    if interpolation == "lanczos" or not halves or tall > MAX_TALL * wide:
        image = Image.fromarray(pixels).resize((width, height), _PILLOW[interpolation])
        return torch.from_numpy(np.asarray(image).copy())
    source = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]
    resized = F.interpolate(source, size=(height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def resize_cut(pixels: np.ndarray, fit: Fit, interpolation: Interpolation) -> Tensor:
    """Compute only the crop of the resized image, uint8 [out_height, out_width, 3]."""
    rows, top, bottom = _choose_window(fit.top, fit.out_height, fit.height, pixels.shape[0])
    columns, left, right = _choose_window(fit.left, fit.out_width, fit.width, pixels.shape[1])
    image = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    size, box = (fit.out_width, fit.out_height), (left, top, right, bottom)
    return torch.from_numpy(np.asarray(image.resize(size, _PILLOW[interpolation], box)).copy())


def _choose_window(first: int, count: int, resized: int, side: int) -> tuple[slice, float, float]:
    """Return the source pixels of one side that `count` resized pixels depend on, and the box inside them.

    Pillow stores boxes in float32. In a whole image of 65,535 pixels the box would be off by several resized pixels.
    """
    step = side / resized
    begin, end = first * step, min((first + count) * step, side)
    margin = math.ceil(3 * max(step, 1)) + 1  # the radius of Lanczos is three pixels of the coarser image
    low, high = max(0, math.floor(begin) - margin), min(side, math.ceil(end) + margin)
    return slice(low, high), begin - low, end - low
