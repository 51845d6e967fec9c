"""Pixels to the size they are encoded at: resize, then crop.

The short side is resized to `resolution`, the long side to `round(long * resolution / short)`; then a square is cut
out: the middle, `(excess) // 2` from the top and from the left, or a place drawn evenly from all there are. Half of the
pictures are mirrored where that is asked for. Resizing is always antialiased and equals Pillow's of the
same name within 1/255 a channel. Reductions to half and less, where it costs most, run in torch, which is three to
five times faster; the rest runs in Pillow itself: torch's integer weights are off by 2 in one of ten noise pictures
reduced to more than half, and of a picture about twice as tall as wide Pillow 13 resizes the columns first, which
clamping between the passes makes another picture.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.draws import seed_of
from pipeline.records import Crop, Flip, Interpolation

# Part of a cache's identity: goes up when the same settings give other pixels.
VERSION = 1

MAX_TALL = 1.9  # height over width up to which Pillow resizes the rows first, as torch does

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture is brought to size: resized to height x width, then out_height x out_width cut from (top, left),
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
    """resolution: height and width of what comes out, in pixels. min_size: a shorter side than this is filtered.

    seed: of the draws that `crop` and `flip` ask for.
    """

    resolution: int
    min_size: int = 0
    interpolation: Interpolation = "bicubic"
    crop: Crop = "center"
    flip: Flip = "none"
    seed: int = 0

    def fit(self, height: int, width: int, shard: str = "", key: str = "") -> Fit | None:
        """What to do with a picture of this size; None where it is to be left out. Draws follow from shard and key."""
        short, long = min(height, width), max(height, width)
        if short < self.min_size:
            return None
        resized = round(long * self.resolution / short)
        tall, wide = (self.resolution, resized) if height <= width else (resized, self.resolution)
        excess = (tall - self.resolution) + (wide - self.resolution)  # one of them is 0
        cut = excess // 2 if self.crop == "center" else int(self._draw("crop", shard, key) * (excess + 1))
        return Fit(
            height=tall,
            width=wide,
            top=cut if tall > self.resolution else 0,
            left=cut if wide > self.resolution else 0,
            out_height=self.resolution,
            out_width=self.resolution,
            enlarged=short < self.resolution,
            flipped=self.flip == "random" and self._draw("flip", shard, key) < 0.5,
        )

    def _draw(self, purpose: str, shard: str, key: str) -> float:
        return random.Random(seed_of(self.seed, purpose, shard, key)).random()

    def apply(self, pixels: np.ndarray, fit: Fit) -> Tensor:
        """RGB uint8 [H, W, 3] -> uint8 [3, out_height, out_width]."""
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
