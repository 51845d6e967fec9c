"""Shrink images as OpenCV's INTER_AREA does, to the bit, in numpy.

Each pixel of the result is the mean of the area of the source that it covers. A source pixel on the edge of that area
counts by the part of it that is covered. The rows are reduced first, then the columns. As in OpenCV, sums are in
float32, and terms are added from the left and from the top, because another order rounds to other values. Values are
rounded to the nearest integer, a half to the even one.

OpenCV sums integers if the factors of both sides are whole. It then multiplies the sum by 1/n in float32; a block of
2 x 2 pixels is `(sum + 2) >> 2`, which rounds a half up.

Pillow's BOX filter is another rule: it counts a source pixel in full or not at all.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.images.fit import Fit

MIN_PART = 1e-3  # a smaller part of a pixel is left out

Taps = Sequence[tuple[int, np.float32]]  # the source pixels of a pixel along one side, with their weights


def shrink_and_crop(pixels: np.ndarray, fit: Fit) -> Tensor:
    """Shrink RGB uint8 [H, W, 3] to fit.height x fit.width, and return its crop, uint8 [out_height, out_width, 3].

    fit.height and fit.width are at most H and W. What the crop does not need is not computed.
    """
    tall, wide = pixels.shape[:2]
    down, across = 1 / (fit.height / tall), 1 / (fit.width / wide)  # not tall / fit.height: it may round differently
    if down.is_integer() and across.is_integer():
        return torch.from_numpy(_average_blocks(pixels, int(down), int(across), fit))
    rows = _find_taps(tall, down, fit.top, fit.out_height)
    columns = _find_taps(wide, across, fit.left, fit.out_width)
    top, left = rows[0][0][0], columns[0][0][0]
    needed = pixels[top : rows[-1][-1][0] + 1, left : columns[-1][-1][0] + 1].transpose(1, 0, 2)
    narrow = _add_up(np.ascontiguousarray(needed), columns, left)
    small = _add_up(np.ascontiguousarray(narrow.transpose(1, 0, 2)), rows, top)
    return torch.from_numpy(np.rint(small).astype(np.uint8))


def _find_taps(source: int, scale: float, first: int, count: int) -> list[Taps]:
    """Return the taps of `count` pixels from `first` on, for a side of `source` pixels that shrinks by `scale`."""
    return [_find_covered(index * scale, scale, source) for index in range(first, first + count)]


def _find_covered(begin: float, scale: float, source: int) -> Taps:
    """Return the source pixels from `begin` to `begin + scale`, each with the part of the whole that it covers."""
    end, length = begin + scale, min(scale, source - begin)
    high = min(math.floor(end), source - 1)
    low = min(math.ceil(begin), high)
    taps = [(index, np.float32(1 / length)) for index in range(low, high)]
    if low - begin > MIN_PART:
        taps.insert(0, (low - 1, np.float32((low - begin) / length)))
    if end - high > MIN_PART:
        taps.append((high, np.float32(min(end - high, 1.0, length) / length)))
    return taps


def _add_up(source: np.ndarray, pixels: Sequence[Taps], first: int) -> np.ndarray:
    """Return the weighted sums along the first axis, float32 [len(pixels), ...]. first: the number of source[0]."""
    sums = np.empty((len(pixels), *source.shape[1:]), np.float32)
    term = np.empty(source.shape[1:], np.float32)
    for total, ((start, weight), *taps) in zip(sums, pixels, strict=True):
        np.multiply(source[start - first], weight, out=total)
        for index, weight in taps:
            np.multiply(source[index - first], weight, out=term)
            np.add(total, term, out=total)
    return sums


def _average_blocks(pixels: np.ndarray, tall: int, wide: int, fit: Fit) -> np.ndarray:
    """Return the crop of an image that is shrunk by whole factors: the means of blocks of tall x wide pixels."""
    below, right = fit.top + fit.out_height, fit.left + fit.out_width
    needed = pixels[fit.top * tall : below * tall, fit.left * wide : right * wide]
    narrow = np.zeros((fit.out_height, needed.shape[1], 3), np.int32)
    for row in range(tall):  # `sum` of two axes takes ten times as long
        narrow += needed[row::tall]
    sums = np.zeros((fit.out_height, fit.out_width, 3), np.int32)
    for column in range(wide):
        sums += narrow[:, column::wide]
    if (tall, wide) == (2, 2):
        means = (sums + 2) >> 2
    else:
        means = np.rint(sums.astype(np.float32) * np.float32(1 / (tall * wide)))
    return np.asarray(means, np.uint8)
