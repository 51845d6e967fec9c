"""Transform images to the size at which they are encoded: resize, crop and mirror them, by one of several recipes.

`pipeline.images.recipes` has the recipes of `--transform`. Each gives the size to which an image is resized, and the
crop of it. Filters, random crops and flips are here, because they are the same for all. With `flip` "random", half of
the images are mirrored after the crop. With "both", the encoder mirrors them.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import FilteredOut
from pipeline.images import resize
from pipeline.images.buckets import Bucket, make_grid
from pipeline.images.decode_settings import DecodeSettings
from pipeline.images.fit import Fit
from pipeline.images.recipes import aspect_ratio, center_crop, dhariwal, diffusers, prepared, sd_scripts
from pipeline.images.resize import Extent
from pipeline.images.seeds import derive_seed
from pipeline.records import Crop, Flip, Interpolation, JpegDecode, Recipe

_MODULES: Mapping[Recipe, ModuleType] = {
    "center-crop": center_crop,
    "center-crop-dhariwal": dhariwal,
    "diffusers": diffusers,
    "sd-scripts": sd_scripts,
    **dict.fromkeys(("aspect-ratio-512", "aspect-ratio-1024", "aspect-ratio-2048"), aspect_ratio),
    "none": prepared,
}
HAS_INTERPOLATION = frozenset({"center-crop", "diffusers"})  # all others have fixed filters
MIN_REDUCED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """The settings of the transform. Sizes are in pixels.

    recipe: the rule (`--transform`).
    resolution: height and width of the output; with buckets, the side of a square of their area; with `none`, of a
    square of the largest area.
    buckets: the possible sizes of the output, unless there is only one, or they depend on the images.
    multiple_of: of the sides of the output; 0 for squares and tables.
    min_bucket_reso, max_bucket_reso: the settings from which the buckets of sd-scripts were made.
    no_upscale: images that would be enlarged keep their size, or are filtered.
    min_size, max_aspect: images with a shorter side below min_size, or with a longer side of more than max_aspect times
    the shorter one, are filtered; 0 filters none.
    min_std: images whose transformed pixels have a lower standard deviation than this are filtered
    (`near_empty.is_near_empty`), in gray levels; 0 filters none.
    interpolation: of `center-crop` and `diffusers`; all others have fixed filters.
    jpeg_decode: "scaled" decodes JPEGs at the smallest size that is at least MIN_REDUCED times the resized image.
    seed: of random crops and flips. decoding: how an image file becomes the pixels that are transformed.
    """

    recipe: Recipe = "center-crop"
    resolution: int
    buckets: tuple[Bucket, ...] = ()
    multiple_of: int = 0
    min_bucket_reso: int = 0
    max_bucket_reso: int = 0
    no_upscale: bool = False
    min_size: int = 0
    max_aspect: float = 0.0
    interpolation: Interpolation = "bicubic"
    jpeg_decode: JpegDecode = "full"
    crop: Crop = "center"
    flip: Flip = "none"
    seed: int = 0
    min_std: float = 0.0
    decoding: DecodeSettings = DecodeSettings()

    @property
    def version(self) -> int:
        """The version of the recipe. It increases if the same settings give other pixels."""
        return int(_MODULES[self.recipe].VERSION)

    @property
    def output_sizes(self) -> tuple[Bucket, ...]:
        """The possible sizes of the output, (height, width) each; typical ones if they cannot be listed."""
        if self.multiple_of and not self.buckets:
            return make_grid(self.resolution, self.multiple_of)
        return self.buckets or ((self.resolution, self.resolution),)

    @property
    def max_pixels(self) -> int:
        """An upper bound of the pixels of an output."""
        if self.recipe == "sd-scripts" and self.no_upscale:
            return sd_scripts.bound_pixels(self.resolution, self.multiple_of)
        return max(self.resolution**2, *(height * width for height, width in self.output_sizes))

    def fit(self, height: int, width: int, shard: str = "", key: str = "") -> Fit:
        """Return the transform of an image of this size. shard, key: for random numbers.

        Raises FilteredOut if a setting leaves the image out, and Rejected if `none` does not permit its size.
        """
        if min(height, width) < self.min_size:
            raise FilteredOut("min_size")
        if self.max_aspect and max(height, width) > self.max_aspect * min(height, width):
            raise FilteredOut("max_aspect")
        fit = self._fit_recipe(height, width)
        if fit is not None and fit.enlarged and self.no_upscale:
            fit = self._fit_small(height, width)
        if fit is None:
            raise FilteredOut("no_upscale")
        if self.crop == "random":
            fit = self._move_crop(fit, shard, key)
        return replace(fit, flipped=self.flip == "random" and self._draw("flip", shard, key) < 0.5)

    def _fit_recipe(self, height: int, width: int) -> Fit | None:
        match self.recipe:
            case "center-crop":
                return center_crop.fit(height, width, self.output_sizes)
            case "center-crop-dhariwal":
                return dhariwal.fit(height, width, self.resolution)
            case "diffusers":
                return diffusers.fit(height, width, self.resolution)
            case "sd-scripts" if self.no_upscale:
                return sd_scripts.fit_without_enlarging(height, width, self.resolution, self.multiple_of)
            case "sd-scripts":
                return sd_scripts.fit(height, width, self.buckets)
            case "none":
                return prepared.fit(height, width, self.resolution, self.multiple_of)
            case _:
                return aspect_ratio.fit(height, width, self.resolution)

    def _fit_small(self, height: int, width: int) -> Fit | None:
        """Return the transform of an image that the recipe would enlarge: with our buckets, it keeps its size."""
        if self.recipe == "center-crop" and self.buckets:
            return center_crop.fit_without_resizing(height, width, self.resolution, self.multiple_of)
        return None

    def _move_crop(self, fit: Fit, shard: str, key: str) -> Fit:
        """Return the same transform with its crop at a uniformly random position."""
        down, across = fit.height - fit.out_height, fit.width - fit.out_width
        top = int(self._draw("crop", shard, key) * (down + 1))
        left = int(self._draw("crop-left" if down else "crop", shard, key) * (across + 1))
        return replace(fit, top=top, left=left)

    def choose_reduction(self, height: int, width: int, is_turned: bool) -> int:
        """Return the factor by which a JPEG of this size is reduced while it is decoded: 1, 2, 4 or 8.

        is_turned: whether the JPEG has an orientation. If so, only factors of both sides are chosen. Otherwise, the
        last row or column of the reduced image may be a partial one, and the orientation would make it the first.
        """
        if self.jpeg_decode == "full":
            return 1
        try:
            fit = self.fit(height, width)
        except FilteredOut:  # only after it was decoded, because it may be rejected instead
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

        extent: see `resize.resize_and_crop`.
        """
        cut = self._resize_and_crop(pixels, fit, extent)
        return (cut.flip(1) if fit.flipped else cut).contiguous()

    def _resize_and_crop(self, pixels: np.ndarray, fit: Fit, extent: Extent | None) -> Tensor:
        match self.recipe:
            case "center-crop":
                return resize.resize_and_crop(pixels, fit, self.interpolation, extent)
            case "center-crop-dhariwal":
                return dhariwal.resize_and_crop(pixels, fit)
            case "diffusers":
                return resize.resize_and_crop(pixels, fit, self.interpolation, is_exact=True)
            case "sd-scripts":
                return sd_scripts.resize_and_crop(pixels, fit)
            case "none":
                return torch.from_numpy(pixels.copy())
            case _:
                filter_ = aspect_ratio.choose_interpolation(self.resolution)
                return resize.resize_and_crop(pixels, fit, filter_, is_exact=True)
