"""Resize images as Pillow does, always antialiased, and crop them.

Without `is_exact`, the result is within 1/255 per channel of Pillow's filter of the same name: reductions to half or
less, which cost most, run in torch, which is three to five times faster. All others run in Pillow, for two reasons.
If noise images are reduced to more than half, torch's integer weights are off by 2 in one of ten. If an image is about
twice as tall as wide, Pillow 13 resizes the columns first, and clamping between the passes then gives another image.

Pillow resizes the rows first, then the columns. Between the two passes, what the crop does not need is left out. The
pixels of the crop are exactly those of resizing the whole image.

A line of pixels would become a very long image. If the resized image had more than MAX_RESIZED pixels, and more than
MAX_TIMES as many as the crop, only the crop is computed. It may then differ by the effect of clamping between the
passes, also with `is_exact`.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.images.fit import Fit
from pipeline.records import Interpolation

MAX_RESIZED = 1 << 25  # pixels; half a GB during the resize. At 1,024 px, an image 32 times as long as high.
MAX_TIMES = 16
MAX_TALL = 1.9  # height / width up to which Pillow resizes the rows first, as torch does

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

Extent = tuple[float, float]  # height and width


def resize_and_crop(
    pixels: np.ndarray,
    fit: Fit,
    interpolation: Interpolation,
    extent: Extent | None = None,
    is_exact: bool = False,
) -> Tensor:
    """Resize RGB uint8 [H, W, 3] and crop it to uint8 [out_height, out_width, 3].

    extent: height and width of the image in these pixels; default: H and W. They are fractions if the image was
    reduced, and its last row or column is a partial one. is_exact: whether the pixels must be Pillow's.
    """
    extent = extent or pixels.shape[:2]
    if fit.height * fit.width > max(MAX_RESIZED, MAX_TIMES * fit.out_height * fit.out_width):
        return resize_cut(pixels, fit, interpolation, extent)
    if extent == pixels.shape[:2] and _is_resized_in_passes(pixels, fit, interpolation, is_exact):
        return resize_in_passes(pixels, fit, interpolation)
    resized = resize(pixels, fit.height, fit.width, interpolation, extent, is_exact)
    return crop(resized, fit)


def crop(resized: Tensor, fit: Fit) -> Tensor:
    """Return the crop of an image that has its final size, [out_height, out_width, 3]."""
    return resized[fit.top : fit.top + fit.out_height, fit.left : fit.left + fit.out_width]


def resize(
    pixels: np.ndarray,
    height: int,
    width: int,
    interpolation: Interpolation,
    extent: Extent | None = None,
    is_exact: bool = False,
) -> Tensor:
    """Resize RGB uint8 [H, W, 3] to uint8 [height, width, 3], antialiased. See `resize_and_crop`."""
    tall, wide = pixels.shape[:2]
    rows, columns = extent or (tall, wide)
    if (tall, wide) == (height, width):
        return torch.from_numpy(pixels.copy())
    if is_exact or not _is_resized_by_torch((tall, wide), (height, width), interpolation):
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


def _is_resized_in_passes(pixels: np.ndarray, fit: Fit, interpolation: Interpolation, is_exact: bool) -> bool:
    """Return whether `resize_in_passes` equals Pillow's resize, and has something to leave out."""
    tall, wide = pixels.shape[:2]
    target = (fit.height, fit.width)
    is_cropped = target != (fit.out_height, fit.out_width)
    by_torch = not is_exact and _is_resized_by_torch((tall, wide), target, interpolation)
    by_pillow = (tall, wide) != target and not by_torch
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
