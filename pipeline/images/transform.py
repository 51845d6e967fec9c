"""Pixels to the size they are encoded at: resize, then crop.

An image is resized until it just covers its target, the square of `resolution` or the bucket nearest to its shape: to
a square, the short side to `resolution` and the long side to `round(long * resolution / short)`. Then the target is cut
out: the middle, `(excess) // 2` from the top and from the left, or a place drawn evenly from all there are. Half of the
images are mirrored where that is asked for. Resizing is always antialiased and equals Pillow's of the
same name within 1/255 a channel. Reductions to half and less, where it costs most, run in torch, which is three to
five times faster; the rest runs in Pillow itself: torch's integer weights are off by 2 in one of ten noise images
reduced to more than half, and of an image about twice as tall as wide Pillow 13 resizes the columns first, which
clamping between the passes makes another image.

A line of pixels becomes a very long image. Where it would have more than MAX_RESIZED pixels, and more than MAX_TIMES
as many as are cut out, only these are made; they may differ then by what clamping between the passes changes.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.images.buckets import Bucket, nearest
from pipeline.images.seeds import seed_of
from pipeline.records import Crop, Flip, Interpolation

# Part of a cache's identity: goes up when the same settings give other pixels.
VERSION = 1

MAX_RESIZED = 1 << 25  # half a GB while it is resized: at 1,024 px an image 32 times as long as high
MAX_TIMES = 16
MAX_TALL = 1.9  # height over width up to which Pillow resizes the rows first, as torch does

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class Fit:
    """How an image is brought to size: resized to height x width, then out_height x out_width cut from (top, left),
    then mirrored left to right where `flipped`."""

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
    """resolution: height and width of what comes out, in pixels; of buckets the side of the square of their area.

    buckets: the sizes that come out, multiples of `multiple_of`; without any, the square of `resolution` alone.
    min_size: an image with a shorter side than this is filtered.
    seed: of the draws that `crop` and `flip` ask for.
    """

    resolution: int
    buckets: tuple[Bucket, ...] = ()
    multiple_of: int = 0
    min_size: int = 0
    interpolation: Interpolation = "bicubic"
    crop: Crop = "center"
    flip: Flip = "none"
    seed: int = 0

    def fit(self, height: int, width: int, shard: str = "", key: str = "") -> Fit | None:
        """What to do with an image of this size; None where it is to be left out. Draws follow from shard and key."""
        if min(height, width) < self.min_size:
            return None
        square = (self.resolution, self.resolution)
        out_height, out_width = nearest(self.buckets, height, width) if self.buckets else square
        if out_height * width >= out_width * height:  # the height decides the scale
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
        return random.Random(seed_of(self.seed, purpose, shard, key)).random()

    def apply(self, pixels: np.ndarray, fit: Fit) -> Tensor:
        """RGB uint8 [H, W, 3] -> uint8 [3, out_height, out_width]."""
        if fit.height * fit.width > max(MAX_RESIZED, MAX_TIMES * fit.out_height * fit.out_width):
            cut = resize_cut(pixels, fit, self.interpolation)
        else:
            resized = resize(pixels, fit.height, fit.width, self.interpolation)
            cut = resized[fit.top : fit.top + fit.out_height, fit.left : fit.left + fit.out_width]
        return (cut.flip(1) if fit.flipped else cut).permute(2, 0, 1).contiguous()


def resize(pixels: np.ndarray, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """RGB uint8 [H, W, 3] -> uint8 [height, width, 3], antialiased."""
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
    """What `fit` cuts out of the resized image, uint8 [out_height, out_width, 3], without the rest of it."""
    rows, top, bottom = _window(fit.top, fit.out_height, fit.height, pixels.shape[0])
    columns, left, right = _window(fit.left, fit.out_width, fit.width, pixels.shape[1])
    image = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    size, box = (fit.out_width, fit.out_height), (left, top, right, bottom)
    return torch.from_numpy(np.asarray(image.resize(size, _PILLOW[interpolation], box)).copy())


def _window(first: int, count: int, resized: int, side: int) -> tuple[slice, float, float]:
    """What of a side's pixels is seen by `count` of the resized ones, and where in it they begin and end.

    Pillow has boxes in float32: in an image of 65,535 pixels they would be off by some of the resized ones.
    """
    step = side / resized
    begin, end = first * step, min((first + count) * step, side)
    seen = math.ceil(3 * max(step, 1)) + 1  # Lanczos looks three pixels far, of the coarser image
    low, high = max(0, math.floor(begin) - seen), min(side, math.ceil(end) + seen)
    return slice(low, high), begin - low, end - low
