import numpy as np
import pytest

from pipeline.preview.fidelity import BAND, WINDOW, measure_fidelity
from tests.conftest import smooth


def make_original(kind: str, height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    flat = np.full_like(noise, {"white": 255, "black": 0}.get(kind, 0))
    return {"noise": noise, "smooth": smooth(1, height, width)}.get(kind, flat)


def add_noise(image: np.ndarray, size: int) -> np.ndarray:
    noise = np.random.default_rng(1).integers(-size, size + 1, image.shape)
    return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(WINDOW, WINDOW), (BAND + WINDOW - 1, 20), (BAND + WINDOW, 64), (90, 37)])
@pytest.mark.parametrize("kind", ["noise", "smooth", "white", "black"])
@pytest.mark.parametrize("difference", [0, 2, 60])
def test_fidelity_is_that_of_scikit_image(kind: str, size: tuple[int, int], difference: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    original = make_original(kind, *size)
    decoded = add_noise(original, difference)
    psnr, ssim = measure_fidelity(original, decoded)
    expected = metrics.structural_similarity(
        original,
        decoded,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    assert ssim == pytest.approx(expected, abs=1e-6)
    if difference:
        assert psnr == pytest.approx(metrics.peak_signal_noise_ratio(original, decoded), abs=1e-9)
    else:
        assert psnr == 100.0


def test_psnr_follows_its_definition() -> None:
    black, grey = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    assert measure_fidelity(black, grey)[0] == pytest.approx(20 * np.log10(255 / 51))
    assert measure_fidelity(grey, black) == pytest.approx(measure_fidelity(black, grey), abs=1e-6)


def test_a_nearly_equal_image_is_never_nearer_than_an_equal_one() -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    other = image.copy()
    other[0, 0, 0] = 1
    assert measure_fidelity(image, other)[0] == measure_fidelity(image, image)[0] == 100.0


def test_an_image_smaller_than_the_window_has_no_ssim() -> None:
    image = smooth(1, 8, 64)
    assert measure_fidelity(image, add_noise(image, 9))[1] is None


@pytest.mark.parametrize(
    "other", [np.zeros((16, 17, 3), np.uint8), np.zeros((16, 16, 3), np.float32)], ids=["size", "dtype"]
)
def test_images_that_cannot_be_compared_are_refused(other: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[16, 16, 3\]"):
        measure_fidelity(np.zeros((16, 16, 3), np.uint8), other)
