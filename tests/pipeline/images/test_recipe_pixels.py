"""The pixels of each recipe: those of its own steps with Pillow, bit for bit."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.images.area import shrink_and_crop
from pipeline.images.fit import Fit
from pipeline.images.recipes import aspect_ratio, sd_scripts
from pipeline.images.transform import Transform
from tests.trainers import crop_like_adm

Prepare = Callable[[Image.Image], Image.Image]
SIDE = 32
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}


def crop_like_torchvision(image: Image.Image, filter_: Image.Resampling) -> Image.Image:
    width, height = image.size
    new = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
    image = image.resize(new, filter_)
    left, top = int(round((image.width - SIDE) / 2.0)), int(round((image.height - SIDE) / 2.0))  # noqa: RUF046
    return image.crop((left, top, left + SIDE, top + SIDE))


def draw_images(count: int, low: int = 10, high: int = 300) -> list[np.ndarray]:
    """Return images of noise, which shows every difference in weights and in the order of passes."""
    draw = np.random.default_rng(9)
    sizes = np.exp(draw.uniform(np.log(low), np.log(high), (count, 2))).astype(int).tolist()
    return [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def check(transform: Transform, prepare: Prepare, images: list[np.ndarray]) -> None:
    for pixels in images:
        fit = transform.fit(*pixels.shape[:2])
        assert fit is not None
        expected = np.asarray(prepare(Image.fromarray(pixels)))
        assert np.array_equal(transform.apply(pixels, fit), expected), pixels.shape


def test_center_crop_dhariwal_is_what_adm_computes() -> None:
    check(
        Transform(recipe="center-crop-dhariwal", resolution=SIDE), partial(crop_like_adm, side=SIDE), draw_images(150)
    )


@pytest.mark.parametrize("name", FILTERS)
def test_diffusers_is_what_torchvision_computes(name: str) -> None:
    transform = Transform(recipe="diffusers", resolution=SIDE, interpolation=name)  # type: ignore[arg-type]
    check(transform, lambda image: crop_like_torchvision(image, FILTERS[name]), draw_images(100))


def test_diffusers_equals_torchvision_itself() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    steps = transforms.Compose(
        [transforms.Resize(SIDE, transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(SIDE)]
    )
    check(Transform(recipe="diffusers", resolution=SIDE, interpolation="lanczos"), steps, draw_images(100))


@pytest.mark.parametrize("side", aspect_ratio.SIDES)
def test_the_tables_use_the_filters_of_pixart(side: int) -> None:
    recipe, sizes = f"aspect-ratio-{side}", aspect_ratio.list_sizes(side)
    filter_ = Image.Resampling.LANCZOS if side == 2048 else Image.Resampling.BICUBIC
    pixels = draw_images(1, 300, 500)[0][:300, :400]
    transform = Transform(recipe=recipe, resolution=side, buckets=sizes)  # type: ignore[arg-type]
    fit = transform.fit(300, 400)
    assert fit is not None
    whole = Image.fromarray(pixels).resize((fit.width, fit.height), filter_)
    expected = whole.crop((fit.left, fit.top, fit.left + fit.out_width, fit.top + fit.out_height))
    assert np.array_equal(transform.apply(pixels, fit), np.asarray(expected))


def test_sd_scripts_enlarges_with_lanczos_shrinks_by_area_and_leaves_equal_sizes() -> None:
    sides = sd_scripts.make_buckets(64, 32, 128, 8)
    transform = Transform(recipe="sd-scripts", resolution=64, buckets=sides, multiple_of=8)
    seen = set()
    for pixels in [*draw_images(120), *draw_images(1)[:1], np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)]:
        fit = transform.fit(*pixels.shape[:2])
        assert fit is not None
        right, below = fit.left + fit.out_width, fit.top + fit.out_height
        if (fit.height, fit.width) == pixels.shape[:2]:
            kind, expected = "equal", pixels[fit.top : below, fit.left : right]
        elif fit.enlarged:
            whole = Image.fromarray(pixels).resize((fit.width, fit.height), Image.Resampling.LANCZOS)
            kind, expected = "lanczos", np.asarray(whole.crop((fit.left, fit.top, right, below)))
        else:
            kind, expected = "area", shrink_and_crop(pixels, fit).numpy()
        assert np.array_equal(transform.apply(pixels, fit), expected), pixels.shape
        seen.add(kind)
    assert seen == {"equal", "lanczos", "area"}


def test_a_flip_after_the_crop_mirrors_the_crop_also_with_an_odd_margin() -> None:
    """Mirrored before the crop, the image would be shifted by one pixel."""
    transform = Transform(recipe="center-crop-dhariwal", resolution=SIDE, flip="random")
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE + 3, 3), dtype=np.uint8)
    fits = [transform.fit(SIDE, SIDE + 3, "s", str(key)) for key in range(50)]
    plain, mirrored = (next(fit for fit in fits if fit and fit.flipped == flipped) for flipped in (False, True))
    cut = transform.apply(pixels, plain)
    assert torch.equal(transform.apply(pixels, mirrored), cut.flip(1))
    assert np.array_equal(cut, pixels[:, 1 : SIDE + 1])
    assert np.array_equal(
        crop_like_adm(Image.fromarray(pixels[:, ::-1].copy()), SIDE), pixels[:, ::-1][:, 1 : SIDE + 1]
    )
    assert not np.array_equal(cut.flip(1), pixels[:, ::-1][:, 1 : SIDE + 1])


@pytest.mark.parametrize("recipe", ["center-crop-dhariwal", "diffusers", "sd-scripts", "aspect-ratio-512"])
def test_a_line_of_pixels_takes_no_more_memory_than_an_image(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = aspect_ratio.list_sizes(512) if recipe == "aspect-ratio-512" else ()
    sizes = sd_scripts.make_buckets(512, 256, 1024, 64) if recipe == "sd-scripts" else sizes
    transform = Transform(recipe=recipe, resolution=512, buckets=sizes)  # type: ignore[arg-type]
    resized: list[tuple[int, int]] = []
    original = Image.Image.resize

    def resize_and_record(image: Image.Image, target: tuple[int, int], *options: object) -> Image.Image:
        resized.append(target)
        return original(image, target, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize_and_record)
    for size in ((1, 65_535), (65_535, 1)):
        fit = transform.fit(*size)
        assert isinstance(fit, Fit)
        transform.apply(np.zeros((*size, 3), np.uint8), fit)
        assert resized.pop() == (fit.out_width, fit.out_height)
        assert not resized
