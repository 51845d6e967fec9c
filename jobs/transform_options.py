"""The options of `encode` that choose the recipe of the transform: inherited, resolved, checked, and made a Transform.

A recipe fixes most settings. An option that it fixes, or that it does not have, is refused.
"""

import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jobs.encode_options import EncodeOptions
from latentmill.cache_info import Preprocessing
from pipeline.errors import UsageError
from pipeline.images import buckets
from pipeline.images.decode_settings import DEFAULT_DECODING, DecodeSettings
from pipeline.images.recipes import aspect_ratio, sd_scripts
from pipeline.images.transform import Transform
from pipeline.records import Recipe
from pipeline.wording import to_flag

RESOLUTION = 512
LARGEST_PREPARED = 2048  # side of a square of the largest area, of images that are prepared already
_ALL: tuple[Recipe, ...] = typing.get_args(Recipe)
_TABLES = tuple(recipe for recipe in _ALL if recipe.startswith("aspect-ratio"))
# The recipes that have an option. All others refuse it.
_RECIPES_WITH: Mapping[str, tuple[Recipe, ...]] = {
    "resolution": tuple(recipe for recipe in _ALL if recipe not in _TABLES),
    "buckets": ("center-crop",),
    "multiple_of": ("center-crop",),
    "interpolation": ("center-crop", "diffusers"),
    "crop": ("center-crop", "diffusers"),
    "jpeg_decode": ("center-crop",),
    "no_upscale": tuple(recipe for recipe in _ALL if recipe not in ("sd-scripts", "none")),
    "min_bucket_reso": ("sd-scripts",),
    "max_bucket_reso": ("sd-scripts",),
    "bucket_reso_steps": ("sd-scripts",),
    "bucket_no_upscale": ("sd-scripts",),
}
_AS_IT_IS = DecodeSettings(exif="ignore", alpha="drop")  # `convert("RGB")` of Pillow, and nothing else
# What the trainers of a recipe do with EXIF orientations and alpha channels. None of them converts colors.
_DECODING: Mapping[Recipe, DecodeSettings] = {
    "center-crop-dhariwal": _AS_IT_IS,
    "sd-scripts": _AS_IT_IS,
    "diffusers": DecodeSettings(alpha="drop"),
    **dict.fromkeys(_TABLES, _AS_IT_IS),
}
# Values that change nothing, so that every recipe accepts them.
_NEUTRAL: Mapping[str, Any] = {
    "buckets": 0,
    "interpolation": "auto",
    "crop": "center",
    "jpeg_decode": "full",
    "no_upscale": False,
    "bucket_no_upscale": False,
}


def inherit_recipe(options: EncodeOptions, given: set[str], existing: Preprocessing) -> dict[str, Any]:
    """Return the options of the recipe of an existing cache; only `transform` if the user has set another recipe."""
    inherited: dict[str, Any] = {"transform": existing.transform}
    if "transform" in given and options.transform != existing.transform:
        return inherited
    is_sd_scripts = existing.transform == "sd-scripts"
    inherited |= {
        "interpolation": existing.interpolation or "auto",
        "crop": existing.crop,
        "jpeg_decode": existing.jpeg_decode,
        "bucket_no_upscale" if is_sd_scripts else "no_upscale": existing.no_upscale,
    }
    if is_sd_scripts:
        bounds = {"min_bucket_reso": existing.min_bucket_reso, "max_bucket_reso": existing.max_bucket_reso}
        inherited |= {name: value for name, value in bounds.items() if value is not None}
        inherited["bucket_reso_steps"] = existing.multiple_of
    if not given & {"resolution", "buckets"}:
        if existing.transform == "center-crop" and existing.buckets:
            inherited |= {"buckets": existing.resolution, "multiple_of": existing.multiple_of}
        else:
            inherited |= {"resolution": existing.resolution}
    return inherited


def resolve_recipe(options: EncodeOptions) -> EncodeOptions:
    """Return the options with the defaults of their recipe in place of `auto` and 0."""
    resolution, interpolation = options.resolution, options.interpolation
    if options.transform in _TABLES:
        resolution = int(options.transform.rsplit("-", 1)[1])
    elif not resolution:
        resolution = LARGEST_PREPARED if options.transform == "none" else RESOLUTION
    if interpolation == "auto":
        interpolation = "lanczos" if options.transform == "diffusers" else "bicubic"
    return replace(options, resolution=resolution, interpolation=interpolation)


def refuse_fixed_options(options: EncodeOptions, given: set[str]) -> None:
    """Raise UsageError for an option that the recipe fixes or does not have. given: the options that the user set."""
    for name, recipes in _RECIPES_WITH.items():
        is_set = name in given and getattr(options, name) != _NEUTRAL.get(name)
        if is_set and options.transform not in recipes:
            flag = to_flag(name) + (f" {options.jpeg_decode}" if name == "jpeg_decode" else "")
            others = ", ".join(recipes)
            hint = "use --bucket-no-upscale" if (name, options.transform) == ("no_upscale", "sd-scripts") else ""
            raise UsageError(
                f"{flag} cannot be used with --transform {options.transform}, which fixes it; "
                f"{hint or f'leave it out (it is for --transform {others})'}"
            )


def check_sizes(options: EncodeOptions, given: set[str], multiple: int) -> None:
    """Raise UsageError for sizes that the recipe or the VAE does not permit. multiple: of the sides, for the VAE."""
    if "multiple_of" in given and not options.buckets:
        raise UsageError("--multiple-of is for the sides of --buckets, and there are none; leave it out")
    if options.transform in _TABLES:
        _check_table(options, multiple)
        return
    if options.transform == "sd-scripts":
        _check_buckets_of_sd_scripts(options, given, multiple)
        return
    name = "multiple_of" if options.buckets else "resolution"
    _check_multiple(name, getattr(options, name), multiple)
    if options.buckets and options.buckets < 2 * options.multiple_of:
        raise UsageError(f"--buckets {options.buckets} is less than twice --multiple-of {options.multiple_of}")


def _check_multiple(name: str, value: int, multiple: int) -> None:
    if value < 1 or value % multiple:
        near = max(1, round(value / multiple)) * multiple
        raise UsageError(
            f"{to_flag(name)} {value} is not a multiple of the VAE's factor {multiple}; the nearest is {near}"
        )


def _check_table(options: EncodeOptions, multiple: int) -> None:
    for height, width in aspect_ratio.list_sizes(options.resolution):
        if height % multiple or width % multiple:
            problem = f"its size {height}x{width} is not a multiple of the VAE's factor {multiple}"
            raise UsageError(f"--transform {options.transform} does not suit this VAE: {problem}")


def _check_buckets_of_sd_scripts(options: EncodeOptions, given: set[str], multiple: int) -> None:
    _check_multiple("bucket_reso_steps", options.bucket_reso_steps, multiple)
    if options.resolution < options.bucket_reso_steps:
        steps = options.bucket_reso_steps
        raise UsageError(f"--resolution {options.resolution} is less than --bucket-reso-steps {steps}")
    for name in ("min_bucket_reso", "max_bucket_reso"):
        if options.bucket_no_upscale and name in given:
            raise UsageError(f"{to_flag(name)} has no effect with --bucket-no-upscale, as in sd-scripts; leave it out")
    if options.bucket_no_upscale:
        return
    if not 1 <= options.min_bucket_reso <= options.resolution <= options.max_bucket_reso:
        raise UsageError(
            f"--resolution {options.resolution} is not between --min-bucket-reso {options.min_bucket_reso} and "
            f"--max-bucket-reso {options.max_bucket_reso}; the settings of most trainings at 1024 are 256 and 2048"
        )


def make_transform(options: EncodeOptions, multiple: int) -> Transform:
    """Return the transform that the options describe. multiple: of the sides, for the VAE."""
    return Transform(
        recipe=options.transform,
        **_make_sizes(options, multiple),
        min_size=options.min_size,
        max_aspect=options.max_aspect,
        min_std=options.min_std,
        interpolation=options.interpolation,  # type: ignore[arg-type]  # `auto` is resolved
        jpeg_decode=options.jpeg_decode,
        crop=options.crop,
        flip=options.flip,
        seed=options.seed,
        decoding=resolve_decoding(options),
    )


def resolve_decoding(options: EncodeOptions) -> DecodeSettings:
    """Return how image files are decoded. `auto` stands for what the trainers of the recipe do."""
    named = {name: getattr(options, name) for name in ("exif", "alpha", "color")}
    chosen = {name: value for name, value in named.items() if value != "auto"}
    default = replace(_DECODING.get(options.transform, DEFAULT_DECODING), allow_truncated=options.allow_truncated)
    return replace(default, **chosen)


def _make_sizes(options: EncodeOptions, multiple: int) -> dict[str, Any]:
    """Return the fields of the transform that decide the sizes of the output."""
    side = options.resolution
    if options.transform == "none":
        return {"resolution": side, "multiple_of": multiple}
    if options.transform in _TABLES:
        return {"resolution": side, "buckets": aspect_ratio.list_sizes(side), "no_upscale": options.no_upscale}
    if options.transform == "sd-scripts":
        sizes = {"resolution": side, "multiple_of": options.bucket_reso_steps}
        if options.bucket_no_upscale:
            return sizes | {"no_upscale": True}
        shortest, longest = options.min_bucket_reso, options.max_bucket_reso
        made = sd_scripts.make_buckets(side, shortest, longest, options.bucket_reso_steps)
        return sizes | {"buckets": made, "min_bucket_reso": shortest, "max_bucket_reso": longest}
    if options.transform == "center-crop" and options.buckets:
        side, multiple_of = options.buckets, options.multiple_of
        grid = buckets.make_grid(side, multiple_of)
        return {"resolution": side, "buckets": grid, "multiple_of": multiple_of, "no_upscale": options.no_upscale}
    return {"resolution": side, "no_upscale": options.no_upscale}
