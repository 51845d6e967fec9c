import math

import pytest

from pipeline.images.buckets import find_nearest, make_grid
from pipeline.images.transform import Transform


@pytest.mark.parametrize(("side", "multiple_of"), [(1024, 64), (512, 64), (512, 8), (250, 24), (16, 8)])
def test_a_grid_has_one_area_and_both_orientations(side: int, multiple_of: int) -> None:
    buckets = make_grid(side, multiple_of)
    assert list(buckets) == sorted(set(buckets))
    for height, width in buckets:
        assert height % multiple_of == width % multiple_of == 0
        assert side / 2 <= min(height, width)
        assert max(height, width) <= 2 * side
        assert (width, height) in buckets
        assert height * width <= side * side
        assert max(height, width) == side // multiple_of * multiple_of or (
            (min(height, width) + multiple_of) * max(height, width) > side * side
            or (max(height, width) + multiple_of) * min(height, width) > side * side
        ), "neither side can be longer"
    square = side // multiple_of * multiple_of
    assert (square, square) in buckets


def test_the_grid_contains_training_sizes_of_sdxl() -> None:
    """Sizes from the SDXL report (Podell et al. 2023, appendix I) that have the area of this grid."""
    assert {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344), (640, 1600), (576, 1792)} <= set(
        make_grid(1024, 64)
    )


def test_the_nearest_bucket_has_the_nearest_aspect_ratio() -> None:
    buckets = make_grid(512, 64)
    for height, width in [(1, 1), (100, 133), (3000, 2000), (400, 399), (10, 1000), (1000, 10), (512, 704)]:
        chosen = find_nearest(buckets, height, width)
        distances = [abs(math.log((h / w) / (height / width))) for h, w in buckets]
        assert abs(math.log((chosen[0] / chosen[1]) / (height / width))) == pytest.approx(min(distances))
    assert find_nearest(buckets, 7, 7) == (512, 512)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((512, 512), (512, 512)), ((300, 400), (448, 576)), ((4000, 1500), (768, 320)), ((33, 64), (320, 704))],
)
def test_a_resized_image_just_covers_its_bucket(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    fit = Transform(resolution=512, buckets=make_grid(512, 64), multiple_of=64).fit(*size)
    assert fit is not None
    assert (fit.out_height, fit.out_width) == bucket
    assert (fit.height == bucket[0] and fit.width >= bucket[1]) or (fit.width == bucket[1] and fit.height >= bucket[0])
    assert fit.height / fit.width == pytest.approx(size[0] / size[1], rel=0.01), "the aspect ratio is kept"
    assert (fit.top, fit.left) == ((fit.height - bucket[0]) // 2, (fit.width - bucket[1]) // 2)
    assert fit.enlarged == (fit.height > size[0])
