"""The options of a recipe: refused if it fixes them, resolved, inherited, and part of the identity."""

import dataclasses
from typing import Any

import pytest

from jobs.encode_options import EncodeOptions
from jobs.transform_options import check_sizes, inherit_recipe, make_transform, refuse_fixed_options, resolve_recipe
from latentmill.cache_info import parse_cache_json
from pipeline.cache import identity
from pipeline.cache.identity import encode_cache_json
from pipeline.cache.preprocessing import describe_transform, parse_transform
from pipeline.canonical_json import with_checksum
from pipeline.errors import IdentityError, UsageError
from pipeline.images.transform import Transform
from tests.cache_infos import IDENTITY, info_of

SD_SCRIPTS = {"transform": "sd-scripts"}
NO_UPSCALE = {**SD_SCRIPTS, "bucket_no_upscale": True}


def make_options(**given: Any) -> EncodeOptions:
    return EncodeOptions(source=("s",), to="c", vae="demo", **given)


def make(downscale: int = 8, **given: Any) -> Transform:
    """Return the transform of these options, checked as `encode` checks them."""
    options = make_options(**given)
    refuse_fixed_options(options, set(given))
    options = resolve_recipe(options)
    check_sizes(options, set(given), downscale)
    return make_transform(options, downscale)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transform": "center-crop-dhariwal", "interpolation": "lanczos"}, "--interpolation cannot be used with"),
        ({"transform": "center-crop-dhariwal", "buckets": 512}, "is for --transform center-crop)"),
        ({"transform": "center-crop-dhariwal", "crop": "random"}, "--crop cannot be used with"),
        ({"transform": "diffusers", "jpeg_decode": "scaled"}, "--jpeg-decode scaled cannot be used with"),
        ({"transform": "aspect-ratio-512", "resolution": 512}, "--resolution cannot be used with"),
        ({"transform": "none", "no_upscale": True}, "--no-upscale cannot be used with"),
        ({**SD_SCRIPTS, "no_upscale": True}, "which fixes it; use --bucket-no-upscale"),
        ({**SD_SCRIPTS, "multiple_of": 64}, "--multiple-of cannot be used with"),
        ({"min_bucket_reso": 256}, "leave it out (it is for --transform sd-scripts)"),
        ({"bucket_reso_steps": 64}, "--bucket-reso-steps cannot be used with --transform center-crop"),
        ({**NO_UPSCALE, "max_bucket_reso": 2048}, "--max-bucket-reso has no effect with --bucket-no-upscale"),
        ({**SD_SCRIPTS, "bucket_reso_steps": 60}, "--bucket-reso-steps 60 is not a multiple of the VAE's factor 8"),
        ({**SD_SCRIPTS, "resolution": 32}, "--resolution 32 is less than --bucket-reso-steps 64"),
        ({**SD_SCRIPTS, "resolution": 2048}, "not between --min-bucket-reso 256 and --max-bucket-reso 1024"),
        ({**SD_SCRIPTS, "resolution": 128}, "not between --min-bucket-reso 256"),
        ({"transform": "none", "resolution": 100}, "--resolution 100 is not a multiple of the VAE's factor 8"),
        ({"transform": "diffusers", "resolution": 100}, "the nearest is 96"),
    ],
)
def test_an_option_that_the_recipe_fixes_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        make(**given)
    assert message in str(raised.value)


def test_a_table_must_suit_the_vae() -> None:
    assert make(downscale=32, transform="aspect-ratio-512").resolution == 512
    with pytest.raises(UsageError, match="its size 256x992 is not a multiple of the VAE's factor 64"):
        make(downscale=64, transform="aspect-ratio-512")


def test_values_that_change_nothing_are_accepted_by_every_recipe() -> None:
    neutral = {"interpolation": "auto", "crop": "center", "jpeg_decode": "full", "buckets": 0}
    for recipe in ("center-crop-dhariwal", "sd-scripts", "aspect-ratio-1024", "none"):
        assert make(transform=recipe, **neutral) == make(transform=recipe)


def test_the_defaults_of_a_recipe() -> None:
    assert (make().resolution, make().interpolation, make(buckets=1024).resolution) == (512, "bicubic", 1024)
    assert make(transform="diffusers").interpolation == "lanczos"
    assert make(transform="diffusers", interpolation="bilinear").interpolation == "bilinear"
    assert (make(transform="none").resolution, make(transform="none", resolution=512).resolution) == (2048, 512)
    assert make(transform="aspect-ratio-1024").resolution == 1024
    assert len(make(transform="aspect-ratio-1024").output_sizes) == 40
    assert len(make(**SD_SCRIPTS).buckets) == 17
    assert len(make(**SD_SCRIPTS, resolution=1024, max_bucket_reso=2048).buckets) == 41
    assert make(**NO_UPSCALE).buckets == ()


def test_exif_and_alpha_are_by_default_those_of_the_trainers() -> None:
    decoding = {
        "center-crop": ("apply", "white"),
        "center-crop-dhariwal": ("ignore", "drop"),
        "diffusers": ("apply", "drop"),
        "sd-scripts": ("ignore", "drop"),
        "aspect-ratio-512": ("ignore", "drop"),
        "aspect-ratio-2048": ("ignore", "drop"),
        "none": ("apply", "white"),
    }
    for recipe, expected in decoding.items():
        found = make(transform=recipe).decoding
        assert (found.exif, found.alpha, found.color) == (*expected, "keep"), recipe
    chosen = make(transform="sd-scripts", exif="apply", alpha="black", allow_truncated=True).decoding
    assert (chosen.exif, chosen.alpha, chosen.allow_truncated) == ("apply", "black", True)


RECIPES: tuple[dict[str, Any], ...] = (
    {"max_aspect": 2.5, "no_upscale": True},
    {"buckets": 512, "no_upscale": True},
    {"transform": "center-crop-dhariwal", "resolution": 256},
    {"transform": "diffusers", "interpolation": "bilinear", "crop": "random"},
    SD_SCRIPTS,
    {**SD_SCRIPTS, "resolution": 1024, "min_bucket_reso": 512, "max_bucket_reso": 2048, "bucket_reso_steps": 32},
    {**NO_UPSCALE, "resolution": 100},
    {"transform": "aspect-ratio-2048"},
    {"transform": "none"},
)


@pytest.mark.parametrize("given", RECIPES)
def test_the_identity_has_every_setting_of_a_recipe(given: dict[str, Any]) -> None:
    transform = make(**given)
    wanted = dataclasses.replace(IDENTITY, preprocessing=describe_transform(transform))
    parsed = parse_cache_json(encode_cache_json(with_checksum(info_of(wanted).to_dict())), "/c").identity
    assert parsed == wanted
    assert parse_transform(parsed) == transform


@pytest.mark.parametrize("given", RECIPES)
def test_a_run_without_options_has_the_recipe_of_the_cache(given: dict[str, Any]) -> None:
    existing = describe_transform(make(**given))
    inherited = inherit_recipe(make_options(), set(), existing)
    again = make_transform(resolve_recipe(make_options(**{**given, **inherited})), 8)
    assert describe_transform(again) == existing
    with_none_given = {**inherited, "max_aspect": given.get("max_aspect", 0.0)}
    options = resolve_recipe(make_options(**with_none_given))
    assert describe_transform(make_transform(options, 8)) == existing


@pytest.mark.parametrize(
    ("cached", "wanted", "before", "after"),
    [
        ({}, {"transform": "diffusers"}, "--transform center-crop", "--transform diffusers"),
        (SD_SCRIPTS, {"transform": "none"}, "--transform sd-scripts", "--transform none"),
        (
            {**SD_SCRIPTS, "resolution": 768},
            {**SD_SCRIPTS, "bucket_reso_steps": 32},
            "--resolution 768 and --bucket-reso-steps 64",
            "--resolution 512 and --bucket-reso-steps 32",
        ),
        (
            SD_SCRIPTS,
            {**SD_SCRIPTS, "min_bucket_reso": 512, "max_bucket_reso": 2048},
            "--min-bucket-reso 256 and --max-bucket-reso 1024",
            "--min-bucket-reso 512 and --max-bucket-reso 2048",
        ),
        (SD_SCRIPTS, NO_UPSCALE, "no --bucket-no-upscale", "--bucket-no-upscale"),
        ({"no_upscale": True}, {}, "--no-upscale", "no --no-upscale"),
        ({"max_aspect": 2.5}, {}, "--max-aspect 2.5", "--max-aspect 0"),
    ],
)
def test_settings_that_differ_are_named_as_their_options(
    cached: dict[str, Any], wanted: dict[str, Any], before: str, after: str
) -> None:
    same = {"exif": "apply", "alpha": "white"}
    first, second = (
        dataclasses.replace(IDENTITY, preprocessing=describe_transform(make(**settings, **same)))
        for settings in (cached, wanted)
    )
    with pytest.raises(IdentityError) as raised:
        identity.check_same_identity("/c", first, second)
    assert f"was made with {before}, this command has {after}; use" in str(raised.value)


def test_the_version_of_another_recipe_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {recipe: describe_transform(make(transform=recipe)) for recipe in ("diffusers", "none")}
    monkeypatch.setattr("pipeline.images.recipes.diffusers.VERSION", 2)
    after = {recipe: describe_transform(make(transform=recipe)) for recipe in ("diffusers", "none")}
    assert before["none"] == after["none"]
    assert (before["diffusers"].version, after["diffusers"].version) == (1, 2)
