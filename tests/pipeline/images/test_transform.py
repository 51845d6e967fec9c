import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import FilteredOut
from pipeline.images import resize as module
from pipeline.images.buckets import make_grid
from pipeline.images.resize import resize, resize_cut
from pipeline.images.transform import Transform
from tests.conftest import smooth


def textured(seed: int, height: int, width: int) -> np.ndarray:
    """Return an image with edges and details of several sizes, RGB uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    layers = [draw.integers(0, 2, (height // side + 1, width // side + 1, 3)) * 255 for side in (31, 17)]
    images = [np.kron(layer, np.ones((side, side, 1))) for layer, side in zip(layers, (31, 17), strict=True)]
    return (sum(image[:height, :width] for image in images) / 2).astype(np.uint8)


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
def test_the_short_side_is_resized_and_the_center_is_cropped(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int], enlarged: bool
) -> None:
    fit = Transform(resolution=64).fit(*size)
    assert fit is not None
    assert ((fit.height, fit.width), (fit.top, fit.left), fit.enlarged) == (resized, corner, enlarged)


def test_pixels_equal_pillows_resize_and_crop() -> None:
    pixels, transform = smooth(1, 96, 128), Transform(resolution=64)
    fit = transform.fit(96, 128)
    assert fit is not None
    done = transform.apply(pixels, fit)
    expected = Image.fromarray(pixels).resize((85, 64), Image.Resampling.BICUBIC).crop((10, 0, 74, 64))
    assert (done.dtype, done.shape, done.is_contiguous()) == (torch.uint8, (64, 64, 3), True)
    assert np.abs(done.numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_small_images_are_filtered() -> None:
    with pytest.raises(FilteredOut, match="min_size"):
        Transform(resolution=64, min_size=50).fit(49, 500)
    assert Transform(resolution=64, min_size=50).fit(50, 500) is not None


@pytest.mark.parametrize("name", FILTERS)
def test_resizing_differs_from_pillow_by_at_most_one(name: str) -> None:
    draw = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in draw.integers(20, 500, 2))
        # Noise is the hardest case: every value overshoots, and is clamped between the passes.
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        scale = draw.uniform(0.1, 1.0) if number % 4 else draw.uniform(1.0, 2.0)
        target = (max(1, round(height * scale)), max(1, round(width * scale)))
        ours = resize(pixels, *target, name).numpy().astype(int)  # type: ignore[arg-type]
        theirs = np.asarray(Image.fromarray(pixels).resize(target[::-1], FILTERS[name]))
        assert np.abs(ours - theirs).max() <= 1, (height, width, target)


@pytest.mark.parametrize("size", [(64, 100), (100, 64)])
def test_random_crops_cover_every_position_and_depend_on_the_sample(size: tuple[int, int]) -> None:
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


def test_a_random_flip_mirrors_half_of_the_images() -> None:
    transform = Transform(resolution=64, flip="random")
    fits = [transform.fit(64, 64, "s.tar", str(key)) for key in range(1000)]
    assert 450 < sum(fit.flipped for fit in fits if fit) < 550
    pixels = smooth(1, 64, 64)
    mirrored, plain = (next(fit for fit in fits if fit and fit.flipped == flipped) for flipped in (True, False))
    assert torch.equal(transform.apply(pixels, mirrored).flip(1), transform.apply(pixels, plain))
    assert transform.apply(pixels, mirrored).is_contiguous()


@pytest.mark.parametrize(
    ("size", "resolution", "factor"),
    [
        ((128, 128), 64, 1),  # half of it would be the target
        ((254, 254), 64, 1),
        ((255, 255), 64, 2),  # half of it is 127.5, rounded up
        ((256, 341), 64, 2),  # 128 x 171, at least twice 64 x 85
        ((256, 342), 64, 1),  # 128 x 171, less than twice 64 x 86
        ((511, 511), 64, 4),
        ((1024, 2000), 64, 8),
        ((9000, 9000), 64, 8),  # the largest factor
        ((40, 4000), 64, 1),  # enlarged
    ],
)
def test_jpegs_are_reduced_to_at_least_twice_the_target(size: tuple[int, int], resolution: int, factor: int) -> None:
    for shape in (size, size[::-1]):
        assert Transform(resolution=resolution, jpeg_decode="scaled").choose_reduction(*shape, False) == factor
        assert Transform(resolution=resolution).choose_reduction(*shape, False) == 1


def test_the_reduction_is_the_largest_that_leaves_twice_the_resized_image() -> None:
    draw = np.random.default_rng(5)
    for buckets in ((), make_grid(64, 8)):
        transform = Transform(resolution=64, buckets=buckets, jpeg_decode="scaled", min_size=40)
        for height, width in draw.integers(1, 2000, (300, 2)).tolist():
            fit = transform.fit(height, width) if min(height, width) >= 40 else None
            fitting = [
                factor
                for factor in (1, 2, 4, 8)
                if fit and -(-height // factor) >= 2 * fit.height and -(-width // factor) >= 2 * fit.width
            ]
            assert transform.choose_reduction(height, width, False) == max(fitting, default=1), (height, width)
            whole = [factor for factor in fitting if height % factor == width % factor == 0]
            assert transform.choose_reduction(height, width, True) == max(whole, default=1), (height, width)


@pytest.mark.parametrize("name", FILTERS)
def test_a_fraction_of_a_pixel_at_the_end_differs_from_pillow_by_at_most_one(name: str) -> None:
    """Half of an image of 451 x 300 pixels is 225.5 of 226 pixels wide."""
    draw = np.random.default_rng(3)
    for _ in range(60):
        height, width = (int(side) for side in draw.integers(40, 400, 2))
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        extent = (height - int(draw.integers(8)) / 8, width - int(draw.integers(8)) / 8)
        scale = draw.uniform(0.1, 0.5)
        target = (max(1, int(height * scale)), max(1, int(width * scale)))
        ours = resize(pixels, *target, name, extent).numpy().astype(int)  # type: ignore[arg-type]
        box = (0, 0, extent[1], extent[0])
        theirs = np.asarray(Image.fromarray(pixels).resize(target[::-1], FILTERS[name], box))
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1, (height, width, extent, target)


@pytest.mark.parametrize("size", [(512, 512), (451, 300), (300, 451), (513, 519), (301, 2001), (700, 301)])
@pytest.mark.parametrize("name", FILTERS)
def test_a_reduced_image_is_resized_to_the_same_place(size: tuple[int, int], name: str) -> None:
    """Means of blocks stand for libjpeg's reduction, and the partial ones at the ends for its padding."""
    transform = Transform(resolution=64, interpolation=name, jpeg_decode="scaled")  # type: ignore[arg-type]
    fit, factor = transform.fit(*size), transform.choose_reduction(*size, False)
    assert fit is not None and factor > 1
    pixels = textured(4, *size)
    padding = [(0, -side % factor) for side in size]
    padded = np.pad(pixels.astype(float), [*padding, (0, 0)], mode="edge")
    blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, 3)
    reduced = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    whole = transform.apply(pixels, fit).float()
    placed = transform.apply(reduced, fit, (size[0] / factor, size[1] / factor)).float()
    assert (placed - whole).pow(2).mean().sqrt() < 4, "without the extent, it is above 5"


LINES = [(1, 20_000), (20_000, 1), (1, 65_535), (65_535, 1), (3, 65_535)]


@pytest.mark.parametrize("size", LINES)
@pytest.mark.parametrize("buckets", [(), make_grid(1024, 64)])
def test_a_line_of_pixels_takes_no_more_memory_than_an_image(
    size: tuple[int, int], buckets: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    original = Image.Image.resize

    def resize_and_record(image: Image.Image, target: tuple[int, int], *options: object) -> Image.Image:
        sizes.append(target)
        return original(image, target, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", resize_and_record)
    ramp = (np.arange(max(size)) >> 8).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None] if size[0] > size[1] else ramp, size)[..., None].repeat(3, 2)
    transform = Transform(resolution=1024, buckets=buckets)
    fit = transform.fit(*size)
    assert fit is not None
    done = transform.apply(pixels, fit)
    assert sizes == [(fit.out_width, fit.out_height)]
    assert (fit.top, fit.left) == ((fit.height - fit.out_height) // 2, (fit.width - fit.out_width) // 2)
    # The output shows the middle of the line.
    assert abs(done.float().mean() - (max(size) // 2 >> 8)) < 1


def test_resizing_only_the_crop_equals_resizing_and_cropping() -> None:
    draw = np.random.default_rng(1)
    for name in FILTERS:
        for crop in ("center", "random"):
            for size in ((2, 300), (300, 7), (90, 500), (400, 130)):
                pixels = smooth(int(draw.integers(1000)), *size)
                transform = Transform(resolution=64, interpolation=name, crop=crop)  # type: ignore[arg-type]
                fit = transform.fit(*size, "s.tar", "k")
                assert fit is not None
                whole = resize(pixels, fit.height, fit.width, name).int()  # type: ignore[arg-type]
                cut = whole[fit.top : fit.top + 64, fit.left : fit.left + 64]
                assert (resize_cut(pixels, fit, name).int() - cut).abs().max() <= 2, (name, crop, size)  # type: ignore[arg-type]
                extent = (size[0] - 0.5, size[1] - 0.75)
                whole = resize(pixels, fit.height, fit.width, name, extent).int()  # type: ignore[arg-type]
                cut = whole[fit.top : fit.top + 64, fit.left : fit.left + 64]
                assert (resize_cut(pixels, fit, name, extent).int() - cut).abs().max() <= 2, (name, crop, size)  # type: ignore[arg-type]


def test_images_of_ordinary_shapes_are_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resize_cut", None)
    for resolution, size in ((64, (64, 64)), (64, (1000, 65)), (64, (130, 20_000)), (2048, (20, 300))):
        transform = Transform(resolution=resolution)
        fit = transform.fit(*size)
        assert fit is not None
        assert transform.apply(np.zeros((*size, 3), np.uint8), fit).shape == (resolution, resolution, 3)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("buckets", [(), make_grid(32, 8)])
def test_leaving_out_what_is_not_needed_changes_no_pixel(
    name: str, buckets: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise shows every difference in weights and in the order of the passes. torch's part of the work is left out."""
    draw = np.random.default_rng(len(name))
    in_passes = 0
    for number in range(400):
        side, aspect = draw.integers(16, 129), np.exp(draw.uniform(-1.5, 1.5) / 2)
        size = (max(1, int(side * aspect)), max(1, int(side / aspect)))
        pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
        crop = ("center", "random")[number % 2]
        transform = Transform(resolution=32, buckets=buckets, interpolation=name, crop=crop)  # type: ignore[arg-type]
        fit = transform.fit(*size, "s.tar", str(number))
        assert fit is not None
        if 2 * fit.height <= size[0] and name != "lanczos":
            continue
        whole = np.asarray(Image.fromarray(pixels).resize((fit.width, fit.height), FILTERS[name]))
        expected = whole[fit.top : fit.top + fit.out_height, fit.left : fit.left + fit.out_width]
        assert np.array_equal(transform.apply(pixels, fit), expected), (size, fit)
        in_passes += module._is_resized_in_passes(pixels, fit, name, False)  # type: ignore[arg-type]
    assert in_passes > 50
