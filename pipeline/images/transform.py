"""Resize and crop images to the size at which they are encoded.

An image is resized so that it just covers its target: the square of `resolution`, or the bucket nearest to its shape.
For a square, the shorter side becomes `resolution`, and the longer side `round(long * resolution / short)`. Then the
target is cropped: at the center, `excess // 2` from the top and from the left, or at a uniformly random position.
With `flip` "random", half of the images are mirrored. With "both", the encoder mirrors them.

Resizing is always antialiased, and equals Pillow's filter of the same name within 1/255 per channel. Reductions to half
or less, which cost most, run in torch, which is three to five times faster. All others run in Pillow, for two reasons.
If noise images are reduced to more than half, torch's integer weights are off by 2 in one of ten. If an image is about
twice as tall as wide, Pillow 13 resizes the columns first, and clamping between the passes then gives another image.

Pillow resizes the rows first, then the columns. Between the two passes, what the crop does not need is left out. The
pixels of the crop are exactly those of resizing the whole image.

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
from pipeline.records import Crop, Flip, Interpolation, JpegDecode

# Part of a cache's identity. Increase it if the same settings give other pixels.
VERSION = 1

MAX_RESIZED = 1 << 25  # pixels; half a GB during the resize. At 1,024 px, an image 32 times as long as high.
MAX_TIMES = 16
MIN_REDUCED = 2
MAX_TALL = 1.9  # height / width up to which Pillow resizes the rows first, as torch does

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

Extent = tuple[float, float]  # height and width


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
    min_size: images with a shorter side than this are filtered. min_std: images whose transformed pixels have a lower
    standard deviation than this are filtered (`near_empty.is_near_empty`), in gray levels; 0 filters none.
    jpeg_decode: "scaled" decodes JPEGs at the smallest size that is at least MIN_REDUCED times the resized image.
    seed: of random crops and flips.
    """

    resolution: int
    buckets: tuple[Bucket, ...] = ()
    multiple_of: int = 0
    min_size: int = 0
    interpolation: Interpolation = "bicubic"
    jpeg_decode: JpegDecode = "full"
    crop: Crop = "center"
    flip: Flip = "none"
    seed: int = 0
    min_std: float = 0.0

    @property
    def output_sizes(self) -> tuple[Bucket, ...]:
        """The possible sizes of the output, (height, width) each."""
        return self.buckets or ((self.resolution, self.resolution),)

    def fit(self, height: int, width: int, shard: str = "", key: str = "") -> Fit | None:
        """Return the transform of an image of this size, or None if it is filtered. shard, key: for random numbers."""
        if min(height, width) < self.min_size:
            return None
        out_height, out_width = find_nearest(self.output_sizes, height, width)
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

    def choose_reduction(self, height: int, width: int, is_turned: bool) -> int:
        """Return the factor by which a JPEG of this size is reduced while it is decoded: 1, 2, 4 or 8.

        is_turned: whether the JPEG has an orientation. If so, only factors of both sides are chosen. Otherwise, the
        last row or column of the reduced image may be a partial one, and the orientation would make it the first.
        """
        fit = self.fit(height, width)
        if self.jpeg_decode == "full" or fit is None:
            return 1
        for factor in (8, 4, 2):
            tall, wide = math.ceil(height / factor), math.ceil(width / factor)
            is_whole = (height, width) == (tall * factor, wide * factor)
            is_large = tall >= MIN_REDUCED * fit.height and wide >= MIN_REDUCED * fit.width
            if is_large and (is_whole or not is_turned):
                return factor
        return 1

    def _draw(self, purpose: str, shard: str, key: str) -> float:
        """Return a random number in [0, 1) that follows from the sample."""
        return random.Random(derive_seed(self.seed, purpose, shard, key)).random()

    def apply(self, pixels: np.ndarray, fit: Fit, extent: Extent | None = None) -> Tensor:
        """Transform RGB uint8 [H, W, 3] to uint8 [out_height, out_width, 3].

        extent: height and width of the image in these pixels; default: H and W. They are fractions if the image was
        reduced, and its last row or column is a partial one.
        """
        extent = extent or pixels.shape[:2]
        if fit.height * fit.width > max(MAX_RESIZED, MAX_TIMES * fit.out_height * fit.out_width):
            cut = resize_cut(pixels, fit, self.interpolation, extent)
        elif extent == pixels.shape[:2] and _is_resized_in_passes(pixels, fit, self.interpolation):
            cut = resize_in_passes(pixels, fit, self.interpolation)
        else:
            resized = resize(pixels, fit.height, fit.width, self.interpolation, extent)
            cut = resized[fit.top : fit.top + fit.out_height, fit.left : fit.left + fit.out_width]
        return (cut.flip(1) if fit.flipped else cut).contiguous()


def resize(
    pixels: np.ndarray, height: int, width: int, interpolation: Interpolation, extent: Extent | None = None
) -> Tensor:
    """Resize RGB uint8 [H, W, 3] to uint8 [height, width, 3], antialiased. extent: see `Transform.apply`."""
    tall, wide = pixels.shape[:2]
    rows, columns = extent or (tall, wide)
    if (tall, wide) == (height, width):
        return torch.from_numpy(pixels.copy())
    if not _is_resized_by_torch((tall, wide), (height, width), interpolation):
        image = Image.fromarray(pixels).resize((width, height), _PILLOW[interpolation], (0, 0, columns, rows))
        return torch.from_numpy(np.asarray(image).copy())
    source = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]
    if (rows, columns) == (tall, wide):
        resized = F.interpolate(source, size=(height, width), mode=interpolation, antialias=True)
    else:  # torch rounds the size down, so the scale is rounded up
        scale = [math.nextafter(height / rows, math.inf), math.nextafter(width / columns, math.inf)]
        resized = F.interpolate(source, scale_factor=scale, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def _is_resized_by_torch(source: tuple[int, int], target: tuple[int, int], interpolation: Interpolation) -> bool:
    """Return whether torch's result is within 1/255 of Pillow's. source, target: height and width in pixels."""
    halves = 2 * target[0] <= source[0] and 2 * target[1] <= source[1]
    return interpolation != "lanczos" and halves and source[0] <= MAX_TALL * source[1]


def _is_resized_in_passes(pixels: np.ndarray, fit: Fit, interpolation: Interpolation) -> bool:
    """Return whether `resize_in_passes` equals Pillow's resize, and has something to leave out."""
    tall, wide = pixels.shape[:2]
    target = (fit.height, fit.width)
    is_cropped = target != (fit.out_height, fit.out_width)
    by_pillow = (tall, wide) != target and not _is_resized_by_torch((tall, wide), target, interpolation)
    return is_cropped and by_pillow and tall <= MAX_TALL * wide


def resize_in_passes(pixels: np.ndarray, fit: Fit, interpolation: Interpolation) -> Tensor:
    """Resize the rows, then the columns, without what the crop does not need. Return the crop, as `resize_cut` does.

    Each pass has the scale and the positions of the whole image, so its weights are the same, to the bit. That is
    impossible with Pillow's `box`, a float32.
    """
    tall, filter_ = pixels.shape[0], _PILLOW[interpolation]
    needed, _, _ = _choose_window(fit.top, fit.out_height, fit.height, tall)
    rows = Image.fromarray(pixels[needed]).resize((fit.width, needed.stop - needed.start), filter_)
    rows = rows.crop((fit.left, -needed.start, fit.left + fit.out_width, tall - needed.start))
    image = rows.resize((fit.out_width, fit.height), filter_)
    return torch.from_numpy(np.array(image.crop((0, fit.top, fit.out_width, fit.top + fit.out_height))))


def resize_cut(pixels: np.ndarray, fit: Fit, interpolation: Interpolation, extent: Extent | None = None) -> Tensor:
    """Compute only the crop of the resized image, uint8 [out_height, out_width, 3]."""
    tall, wide = extent or pixels.shape[:2]
    rows, top, bottom = _choose_window(fit.top, fit.out_height, fit.height, tall)
    columns, left, right = _choose_window(fit.left, fit.out_width, fit.width, wide)
    image = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    size, box = (fit.out_width, fit.out_height), (left, top, right, bottom)
    return torch.from_numpy(np.asarray(image.resize(size, _PILLOW[interpolation], box)).copy())


def _choose_window(first: int, count: int, resized: int, side: float) -> tuple[slice, float, float]:
    """Return the source pixels of one side that `count` resized pixels depend on, and the box inside them.

    Pillow stores boxes in float32. In a whole image of 65,535 pixels the box would be off by several resized pixels.
    """
    step = side / resized
    begin, end = first * step, min((first + count) * step, side)
    margin = math.ceil(3 * max(step, 1)) + 1  # the radius of Lanczos is three pixels of the coarser image
    low, high = max(0, math.floor(begin) - margin), min(math.ceil(side), math.ceil(end) + margin)
    return slice(low, high), begin - low, end - low
