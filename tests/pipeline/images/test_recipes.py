"""The geometry of each recipe: the worked examples of the trainers' own functions."""

import dataclasses

import numpy as np
import pytest

from pipeline.errors import FilteredOut, Rejected
from pipeline.images.buckets import make_grid
from pipeline.images.fit import Fit
from pipeline.images.recipes import aspect_ratio, sd_scripts
from pipeline.images.transform import Transform
from pipeline.records import Recipe

Size = tuple[int, int]


def fit(transform: Transform, width: int, height: int) -> Fit:
    found = transform.fit(height, width)
    assert found is not None
    return found


def facts(found: Fit) -> tuple[Size, Size, Size]:
    """Return width x height of the output and of the resized image, and the left and top of the crop."""
    return (found.out_width, found.out_height), (found.width, found.height), (found.left, found.top)


@pytest.mark.parametrize(
    ("size", "side", "resized", "corner"),
    [
        ((1300, 800), 512, (832, 512), (160, 0)),
        ((640, 480), 512, (683, 512), (85, 0)),
        ((3000, 1000), 512, (1536, 512), (512, 0)),
        ((4000, 3000), 512, (683, 512), (85, 0)),
        ((1000, 777), 512, (659, 512), (73, 0)),
        ((480, 641), 512, (512, 684), (0, 86)),
        ((1300, 800), 256, (416, 256), (80, 0)),
        ((640, 480), 256, (341, 256), (42, 0)),
        ((3000, 1000), 256, (768, 256), (256, 0)),
        ((4000, 3000), 256, (341, 256), (42, 0)),
        ((1000, 777), 256, (330, 256), (37, 0)),
        ((480, 641), 256, (256, 342), (0, 43)),
    ],
)
def test_center_crop_dhariwal(size: Size, side: int, resized: Size, corner: Size) -> None:
    found = fit(Transform(recipe="center-crop-dhariwal", resolution=side), *size)
    assert facts(found) == ((side, side), resized, corner)
    assert found.enlarged == (side > min(size))


@pytest.mark.parametrize(
    ("size", "resized", "left"),
    [
        ((1300, 800), (832, 512), 160),
        ((640, 480), (682, 512), 85),  # rounded down
        ((3000, 1000), (1536, 512), 512),
        ((641, 480), (683, 512), 86),
        ((643, 480), (685, 512), 86),
    ],
)
def test_diffusers(size: Size, resized: Size, left: int) -> None:
    assert facts(fit(Transform(recipe="diffusers", resolution=512), *size)) == ((512, 512), resized, (left, 0))
    turned = fit(Transform(recipe="diffusers", resolution=512), *size[::-1])
    assert facts(turned) == ((512, 512), resized[::-1], (0, left))


@pytest.mark.parametrize(("excess", "floor", "even"), [(1, 0, 0), (3, 1, 2), (5, 2, 2), (7, 3, 4), (4, 2, 2)])
def test_the_center_of_an_odd_excess_is_rounded_as_the_recipe_does(excess: int, floor: int, even: int) -> None:
    """diffusers and the tables round a half to the even number, so they differ for 3 and 7, 1 and 5 are equal."""
    for recipe, left in (("center-crop-dhariwal", floor), ("center-crop", floor), ("diffusers", even)):
        found = fit(Transform(recipe=recipe, resolution=64), 64 + excess, 64)  # type: ignore[arg-type]
        assert found.left == left, recipe
    assert fit(table(512), 512 + excess, 512).left == even
    buckets = ((64, 64),)
    assert fit(Transform(recipe="sd-scripts", resolution=64, buckets=buckets), 64 + excess, 64).left == floor


def buckets_of_sd_scripts(side: int, longest: int = 1024) -> Transform:
    return Transform(recipe="sd-scripts", resolution=side, buckets=sd_scripts.make_buckets(side, 256, longest, 64))


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "corner"),
    [
        ((1300, 800), (640, 384), (640, 394), (0, 5)),
        ((640, 480), (576, 448), (597, 448), (10, 0)),
        ((3000, 1000), (832, 256), (832, 277), (0, 10)),
        ((576, 448), (576, 448), (576, 448), (0, 0)),  # the size of a bucket
    ],
)
def test_sd_scripts(size: Size, bucket: Size, resized: Size, corner: Size) -> None:
    assert facts(fit(buckets_of_sd_scripts(512), *size)) == (bucket, resized, corner)


def test_sd_scripts_at_1024() -> None:
    found = fit(buckets_of_sd_scripts(1024, 2048), 1300, 800)
    assert facts(found) == ((1280, 768), (1280, 788), (0, 10))


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "corner"),
    [
        ((1300, 800), (640, 384), (640, 394), (0, 5)),
        ((640, 480), (512, 384), (512, 384), (0, 0)),
        ((3000, 1000), (768, 256), (768, 256), (0, 0)),
        ((500, 375), (448, 320), (500, 375), (26, 27)),  # not resized
    ],
)
def test_sd_scripts_without_enlarging(size: Size, bucket: Size, resized: Size, corner: Size) -> None:
    transform = Transform(recipe="sd-scripts", resolution=512, multiple_of=64, no_upscale=True)
    found = fit(transform, *size)
    assert facts(found) == (bucket, resized, corner)
    assert not found.enlarged


def test_an_image_without_a_bucket_is_filtered_if_sd_scripts_does_not_enlarge() -> None:
    transform = Transform(recipe="sd-scripts", resolution=512, multiple_of=64, no_upscale=True)
    for height, width in ((63, 500), (500, 63), (1, 1), (20, 60_000), (60_000, 20), (1, 1_000_000)):
        with pytest.raises(FilteredOut, match="no_upscale"):
            transform.fit(height, width)


def test_the_buckets_of_sd_scripts() -> None:
    shapes = {(256, width) for width in (832, 896, 960, 1024)} | {(320, 704), (320, 768), (384, 640), (448, 576)}
    expected = shapes | {(width, height) for height, width in shapes} | {(512, 512)}
    made = sd_scripts.make_buckets(512, 256, 1024, 64)
    assert set(made) == expected
    assert len(made) == 17
    assert list(made) == sorted(made, key=lambda bucket: bucket[::-1]), "of equals, the first by width is chosen"
    assert len(sd_scripts.make_buckets(1024, 256, 2048, 64)) == 41
    assert sd_scripts.make_buckets(512, 300, 1000, 64) == made, "rounded to the steps, down and up"


def test_sd_scripts_chooses_by_the_difference_of_width_through_height() -> None:
    """Our own buckets are chosen by the factor. For this image, that is another one."""
    sides = sd_scripts.make_buckets(512, 256, 1024, 64)
    ours = Transform(resolution=512, buckets=sides, multiple_of=64)
    found, other = fit(buckets_of_sd_scripts(512), 2300, 1000), fit(ours, 2300, 1000)
    errors = [abs(width / height - 2300 / 1000) for height, width in sides]
    assert (found.out_height, found.out_width) == sides[int(np.argmin(errors))]
    assert (facts(found)[0], facts(other)[0]) == ((704, 320), (768, 320))


def table(side: int) -> Transform:
    recipe: Recipe = f"aspect-ratio-{side}"  # type: ignore[assignment]
    return Transform(recipe=recipe, resolution=side, buckets=aspect_ratio.list_sizes(side))


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "corner"),
    [
        ((1300, 800), (640, 384), (640, 393), (0, 4)),
        ((640, 480), (576, 416), (576, 432), (0, 8)),
        ((3000, 1000), (864, 288), (864, 288), (0, 0)),
    ],
)
def test_aspect_ratio_512(size: Size, bucket: Size, resized: Size, corner: Size) -> None:
    assert facts(fit(table(512), *size)) == (bucket, resized, corner)


def test_the_tables_have_40_sizes() -> None:
    ratios = [ratio for ratio, _ in aspect_ratio.TABLE]
    assert (len(ratios), ratios) == (40, sorted(ratios))
    for side, step in ((512, 32), (1024, 64), (2048, 128)):
        sizes = aspect_ratio.list_sizes(side)
        unpaired = {(height, width) for height, width in sizes if (width, height) not in sizes}
        assert unpaired == {(704 * side // 1024, 1344 * side // 1024)}, "the ratio 0.52 has no counterpart"
        assert sizes[20] == (side, side)
        assert all(height % step == width % step == 0 for height, width in sizes)


def test_every_resized_image_covers_its_output() -> None:
    draw = np.random.default_rng(4)
    transforms = [
        *(Transform(recipe=recipe, resolution=64) for recipe in ("center-crop-dhariwal", "diffusers")),  # type: ignore[arg-type]
        buckets_of_sd_scripts(512),
        Transform(recipe="sd-scripts", resolution=128, multiple_of=8, no_upscale=True),
        *map(table, aspect_ratio.SIDES),
        Transform(resolution=512, buckets=make_grid(512, 64), multiple_of=64, no_upscale=True),
    ]
    for transform in transforms:
        for height, width in np.exp(draw.uniform(np.log(9), np.log(5000), (800, 2))).astype(int).tolist():
            try:
                found = transform.fit(height, width)
            except FilteredOut:
                assert transform.no_upscale
                continue
            assert 0 <= found.top <= found.height - found.out_height, (transform, height, width)
            assert 0 <= found.left <= found.width - found.out_width, (transform, height, width)
            assert found.out_height * found.out_width <= transform.max_pixels, (transform, height, width)
            assert not (found.enlarged and transform.no_upscale), (transform, height, width)
            if transform.buckets and not transform.no_upscale:
                assert (found.out_height, found.out_width) in transform.output_sizes


def test_none_accepts_only_images_that_fit_already() -> None:
    transform = Transform(recipe="none", resolution=64, multiple_of=8)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8)
    found = fit(transform, 128, 32)
    assert facts(found) == ((128, 32), (128, 32), (0, 0))
    assert np.array_equal(transform.apply(pixels, found), pixels)
    for height, width in ((33, 64), (64, 63), (64, 72), (8, 520)):
        with pytest.raises(Rejected) as raised:
            transform.fit(height, width)
        assert raised.value.reason == "wrong_size"
        assert f"{width} x {height} pixels" in raised.value.detail
        assert "multiples of 8, and their area at most 64 x 64 pixels" in raised.value.detail


def test_long_images_are_filtered_by_the_ratio_of_their_sides() -> None:
    for recipe in ("center-crop", "diffusers", "center-crop-dhariwal"):
        transform = Transform(recipe=recipe, resolution=64, max_aspect=2.5)  # type: ignore[arg-type]
        assert transform.fit(100, 250) is not None
        assert transform.fit(250, 100) is not None
        with pytest.raises(FilteredOut, match="max_aspect"):
            transform.fit(100, 251)
        with pytest.raises(FilteredOut, match="max_aspect"):
            transform.fit(251, 100)


def test_without_enlarging_small_images_are_filtered_from_squares_and_tables() -> None:
    for recipe in ("center-crop", "diffusers", "center-crop-dhariwal"):
        transform = Transform(recipe=recipe, resolution=64, no_upscale=True)  # type: ignore[arg-type]
        with pytest.raises(FilteredOut, match="no_upscale"):
            transform.fit(63, 500)
        assert transform.fit(64, 500) is not None
    small = dataclasses.replace(table(512), no_upscale=True)
    assert small.fit(480, 640) is not None  # 416 x 576
    with pytest.raises(FilteredOut, match="no_upscale"):
        small.fit(400, 550)


@pytest.mark.parametrize(
    ("size", "output", "corner"),
    [
        ((500, 375), (448, 320), (26, 27)),
        ((64, 64), (64, 64), (0, 0)),
        ((2000, 127), (1984, 64), (8, 31)),
    ],
)
def test_without_enlarging_small_images_keep_their_size_in_a_smaller_bucket(
    size: Size, output: Size, corner: Size
) -> None:
    transform = Transform(resolution=512, buckets=make_grid(512, 64), multiple_of=64, no_upscale=True)
    assert facts(fit(transform, *size)) == (output, size, corner)


def test_without_enlarging_buckets_filter_images_that_cannot_keep_their_size() -> None:
    transform = Transform(resolution=512, buckets=make_grid(512, 64), multiple_of=64, no_upscale=True)
    with pytest.raises(FilteredOut, match="no_upscale"):
        transform.fit(63, 400)
    with pytest.raises(FilteredOut, match="no_upscale"):
        transform.fit(100, 60_000)
    large = fit(transform, 1300, 800)
    assert (large.out_height, large.out_width) in transform.buckets


def test_random_crops_of_small_images_move_in_both_directions() -> None:
    transform = Transform(resolution=64, buckets=make_grid(64, 8), multiple_of=8, no_upscale=True, crop="random")
    fits = [transform.fit(39, 39, "s", str(key)) for key in range(400)]
    assert {(found.top, found.left) for found in fits if found} == {(y, x) for y in range(8) for x in range(8)}


def test_each_recipe_has_a_version_of_its_own() -> None:
    recipes = ("center-crop", "center-crop-dhariwal", "diffusers", "sd-scripts", "aspect-ratio-512", "none")
    assert [Transform(recipe=recipe, resolution=64).version for recipe in recipes] == [1] * 6  # type: ignore[arg-type]
