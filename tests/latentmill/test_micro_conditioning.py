"""SDXL's six numbers in the conventions of the trainers."""

from typing import Any

import pytest

import latentmill
from latentmill import time_ids
from pipeline.images.recipes import sd_scripts
from pipeline.images.transform import Transform

Size = tuple[int, int]
TRANSFORM = Transform(recipe="sd-scripts", resolution=512, buckets=sd_scripts.make_buckets(512, 256, 1024, 64))


def make_row(width: int, height: int, flipped: bool = False, transform: Transform = TRANSFORM) -> dict[str, Any]:
    """Return the columns with the geometry of an image of this size, as `prepare_sample` fills them."""
    fit = transform.fit(height, width)
    assert fit is not None
    return {
        "height": fit.out_height,
        "width": fit.out_width,
        "original_height": height,
        "original_width": width,
        "resized_height": fit.height,
        "resized_width": fit.width,
        "crop_top": fit.top,
        "crop_left": fit.left,
        "flipped": flipped,
    }


@pytest.mark.parametrize(
    ("size", "target", "recorded", "real"),
    [
        ((1300, 800), (640, 384), (8, 0, 632, 384), (0, 5)),
        ((640, 480), (576, 448), (0, 8, 576, 440), (10, 0)),
        ((3000, 1000), (832, 256), (32, 0, 800, 256), (0, 10)),
    ],
)
def test_sd_scripts_gives_the_borders_that_its_trainer_stores(
    size: Size, target: Size, recorded: tuple[int, int, int, int], real: Size
) -> None:
    """recorded: left, top, right and bottom of its `get_crop_ltrb`. real: left and top of the crop that it makes."""
    original, out, (left, top, right, _) = size[::-1], target[::-1], recorded
    row = make_row(*size)
    assert time_ids(row, "sd-scripts") == (*original, top, left, *out)
    assert time_ids(row | {"flipped": True}, "sd-scripts") == (*original, top, target[0] - right, *out)
    assert time_ids(row, "diffusers") == (*original, *real[::-1], *out)


def test_the_borders_of_sd_scripts_are_whole_numbers_that_differ_in_a_mirrored_image() -> None:
    """699 x 1000 in 448 x 576 is 402.624 pixels wide, with borders of 22 and 23.376 pixels."""
    assert time_ids(make_row(699, 1000), "sd-scripts") == (1000, 699, 0, 22, 576, 448)
    assert time_ids(make_row(699, 1000), "sd-scripts", flipped=True) == (1000, 699, 0, 23, 576, 448)
    assert time_ids(make_row(1000, 699), "sd-scripts") == (699, 1000, 22, 0, 448, 576)
    assert time_ids(make_row(1000, 699), "sd-scripts", flipped=True) == (699, 1000, 22, 0, 448, 576)


def test_diffusers_counts_the_left_in_the_mirrored_image() -> None:
    square = Transform(recipe="diffusers", resolution=512)
    row = make_row(643, 480, transform=square)  # resized to 685 x 512, cropped at 86
    assert time_ids(row) == (480, 643, 0, 86, 512, 512)
    assert time_ids(row | {"flipped": True}) == (480, 643, 0, 87, 512, 512)
    assert time_ids(row, flipped=True) == (480, 643, 0, 87, 512, 512)
    assert time_ids(row | {"flipped": True}, flipped=False) == (480, 643, 0, 86, 512, 512)


def test_simpletuner_has_the_resized_size_as_the_original() -> None:
    row = make_row(640, 480)
    assert time_ids(row, "simpletuner") == (448, 597, 0, 10, 448, 576)
    assert time_ids(row | {"flipped": True}, "simpletuner") == (448, 597, 0, 11, 448, 576)


def test_another_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="'sdxl' is not one of diffusers, sd-scripts, simpletuner"):
        time_ids(make_row(640, 480), "sdxl")  # type: ignore[arg-type]


def test_the_package_exports_it() -> None:
    assert "time_ids" in dir(latentmill)
