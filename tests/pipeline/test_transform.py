import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.transform import Transform, resize
from tests.conftest import smooth

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.mark.parametrize(
    ("size", "resized", "corner", "enlarged"),
    [
        ((96, 128), (64, 85), (0, 10), False),
        ((128, 96), (85, 64), (10, 0), False),
        ((64, 64), (64, 64), (0, 0), False),
        ((50, 100), (64, 128), (0, 32), True),
        ((1000, 65), (985, 64), (460, 0), False),
    ],
)
def test_the_short_side_is_resized_and_the_middle_cut_out(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int], enlarged: bool
) -> None:
    fit = Transform(resolution=64).fit(*size)
    assert fit is not None
    assert ((fit.height, fit.width), (fit.top, fit.left), fit.enlarged) == (resized, corner, enlarged)


def test_pixels_are_those_of_pillows_resize_and_crop() -> None:
    pixels, transform = smooth(1, 96, 128), Transform(resolution=64)
    fit = transform.fit(96, 128)
    assert fit is not None
    done = transform.apply(pixels, fit)
    expected = Image.fromarray(pixels).resize((85, 64), Image.Resampling.BICUBIC).crop((10, 0, 74, 64))
    assert (done.dtype, done.shape, done.is_contiguous()) == (torch.uint8, (3, 64, 64), True)
    assert np.abs(done.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_small_pictures_are_left_out() -> None:
    assert Transform(resolution=64, min_size=50).fit(49, 500) is None
    assert Transform(resolution=64, min_size=50).fit(50, 500) is not None


@pytest.mark.parametrize("name", FILTERS)
def test_resizing_equals_pillows_within_one(name: str) -> None:
    draw = np.random.default_rng(0)
    for turn in range(60):
        height, width = (int(side) for side in draw.integers(20, 500, 2))
        # noise is the hardest picture: every value overshoots, and is clamped between the passes
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        scale = draw.uniform(0.1, 1.0) if turn % 4 else draw.uniform(1.0, 2.0)
        target = (max(1, round(height * scale)), max(1, round(width * scale)))
        ours = resize(pixels, *target, name).numpy().astype(int)  # type: ignore[arg-type]
        theirs = np.asarray(Image.fromarray(pixels).resize(target[::-1], FILTERS[name]))
        assert np.abs(ours - theirs).max() <= 1, (height, width, target)


@pytest.mark.parametrize("size", [(64, 100), (100, 64)])
def test_a_random_crop_lies_anywhere_and_is_the_samples_own(size: tuple[int, int]) -> None:
    transform = Transform(resolution=64, crop="random", seed=3)
    fits = [transform.fit(*size, "s.tar", str(key)) for key in range(2000)]
    places = np.array([(fit.top, fit.left) for fit in fits if fit])
    counts = np.bincount(places.max(axis=1), minlength=37)
    assert len(counts) == 37, "from 0 to the excess"
    assert counts.min() > 25
    assert places.min() == 0
    assert (places.min(axis=1) == 0).all(), "the short side has no excess"
    assert transform.fit(*size, "s.tar", "7") == fits[7]
    assert any(transform.fit(*size, "t.tar", str(key)) != fits[key] for key in range(9)), "the shard counts too"


def test_a_random_flip_mirrors_half_of_the_pictures() -> None:
    transform = Transform(resolution=64, flip="random")
    fits = [transform.fit(64, 64, "s.tar", str(key)) for key in range(1000)]
    assert 450 < sum(fit.flipped for fit in fits if fit) < 550
    pixels = smooth(1, 64, 64)
    mirrored, plain = (next(fit for fit in fits if fit and fit.flipped == flipped) for flipped in (True, False))
    assert torch.equal(transform.apply(pixels, mirrored).flip(2), transform.apply(pixels, plain))
    assert transform.apply(pixels, mirrored).is_contiguous()
