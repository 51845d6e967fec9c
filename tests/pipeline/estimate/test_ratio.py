"""The ratio estimator, and whether its intervals cover the truth as often as they say."""

import numpy as np
import pytest

from pipeline.estimate.ratio import Count, Counted, estimate_total


def test_the_interval_covers_the_truth_in_about_95_of_100_samples() -> None:
    """Files of 200 sizes, with a number of images that the size does not fix."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(50_000, 200_000, 200)
    images = rng.poisson(sizes / 1000)
    covered = 0
    for _ in range(600):
        chosen = rng.choice(200, 12, replace=False)
        counted = [Counted(float(images[index]), int(sizes[index])) for index in chosen]
        count = estimate_total(counted, 200, int(sizes.sum()))
        assert count.error is not None
        covered += abs(count.images - images.sum()) <= count.error
    assert 0.92 <= covered / 600 <= 0.98


def test_the_error_is_that_of_the_files_that_were_not_drawn() -> None:
    """Two of three files, with 10 and 20 images in 100 bytes each: 45 in 300, with a spread of 5² + 5²."""
    count = estimate_total([Counted(10, 100), Counted(20, 100)], 3, 300)
    alone = estimate_total([Counted(10, 100), Counted(20, 100)], 300, 30_000)
    assert count.images == pytest.approx(45)
    assert count.error is not None and alone.error is not None
    # standard errors of the mean: 50 / 2 is the variance, of which a third or nearly all is left
    assert count.error / 3 == pytest.approx(alone.error / 300 * np.sqrt((1 / 3) / (298 / 300)))


def test_a_census_is_exact() -> None:
    count = estimate_total([Counted(3, 100), Counted(5, 900)], 2, 1000)
    assert count == Count(8.0, 0.0)
    assert count.is_exact


def test_files_that_were_read_in_part_make_an_error_even_if_all_were_drawn() -> None:
    count = estimate_total([Counted(30, 100, variance=4.0)], 1, 100)
    assert count.images == 30
    assert count.error == pytest.approx(1.96 * 2, rel=0.01)


def test_one_file_of_many_has_an_unknown_error() -> None:
    count = estimate_total([Counted(10, 100)], 5, 1000)
    assert count == Count(100.0, None, is_exact=False)
    assert (count + Count(3.0)).error is None


def test_errors_of_kinds_add_as_independent_ones() -> None:
    assert Count(10.0, 3.0) + Count(5.0, 4.0) == Count(15.0, 5.0)


def test_equal_files_that_were_not_all_drawn_are_an_estimate() -> None:
    count = estimate_total([Counted(10, 100)] * 3, 50, 5000)
    assert count == Count(500.0, 0.0, is_exact=False)
    assert not (Count(1.0) + count).is_exact


def test_empty_files_have_no_images() -> None:
    assert estimate_total([Counted(0, 0)], 1, 0) == Count(0.0, 0.0)
    assert estimate_total([Counted(0, 0), Counted(0, 0)], 3, 0).error is None
