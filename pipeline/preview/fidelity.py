"""How near a decoded image is to the original: PSNR, and SSIM as Wang et al. (2004) define it.

SSIM: a Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03 and a range of 255. It is taken of each
of the channels R, G and B, and averaged over the channels and over all places where the window lies in the image.
"""

import math

import numpy as np

WINDOW, SIGMA = 11, 1.5
K1, K2, RANGE = 0.01, 0.03, 255.0
BAND = 32  # rows of SSIM that are computed at once, so that their sums stay in the processor's cache
EQUAL = 100.0  # dB, the most that is reported; two equal images have no error


def measure_fidelity(original: np.ndarray, decoded: np.ndarray) -> tuple[float, float | None]:
    """Return the PSNR in dB, at most 100, and the mean SSIM, in [-1, 1], of two images, RGB uint8 [H, W, 3].

    SSIM is None if a side is shorter than its window. Raises ValueError if the sizes or the dtypes differ.
    """
    if original.dtype != np.uint8 or decoded.dtype != np.uint8 or original.shape != decoded.shape:
        raise ValueError(
            f"two images cannot be compared: {original.dtype} {list(original.shape)} and "
            f"{decoded.dtype} {list(decoded.shape)}; both must be uint8 of one size"
        )
    return measure_psnr(original, decoded), measure_ssim(original, decoded)


def measure_psnr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB, at most 100."""
    difference = original.astype(np.int32) - decoded
    error = float(np.square(difference).mean())
    if error == 0:
        return EQUAL
    return min(EQUAL, 20 * math.log10(RANGE) - 10 * math.log10(error))


def measure_ssim(original: np.ndarray, decoded: np.ndarray) -> float | None:
    """Return the mean SSIM of two uint8 images [H, W, C]; None if a side is shorter than the window."""
    height, width, channels = original.shape
    rows, columns = height - WINDOW + 1, width - WINDOW + 1
    if rows < 1 or columns < 1:
        return None
    total = 0.0
    for top in range(0, rows, BAND):
        band = slice(top, min(top + BAND, rows) + WINDOW - 1)
        total += float(_map_ssim(original[band], decoded[band]).sum(dtype=np.float64))
    return min(1.0, total / float(rows * columns * channels))


def _map_ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return SSIM at each place of the window: float32 [H - 10, W - 10, C].

    A level near the mean is subtracted first: the squares become smaller by that, so that float32 suffices.
    """
    level = np.float32(np.rint(x.mean()))
    x, y = x - level, y - level
    mean_x, mean_y, squares, product = _blur(np.stack([x, y, x * x + y * y, x * y]))
    covariance = product - mean_x * mean_y
    variances = squares - mean_x * mean_x - mean_y * mean_y
    mean_x, mean_y = mean_x + level, mean_y + level
    c1, c2 = np.float32((K1 * RANGE) ** 2), np.float32((K2 * RANGE) ** 2)
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return np.asarray(likeness / ((mean_x * mean_x + mean_y * mean_y + c1) * (variances + c2)))


def _blur(maps: np.ndarray) -> np.ndarray:
    """Return the Gaussian means of float32 [N, H, W, C] over windows that lie inside: [N, H - 10, W - 10, C]."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).astype(np.float32)
    rows, columns = maps.shape[1] - WINDOW + 1, maps.shape[2] - WINDOW + 1
    down = weights[0] * maps[:, :rows]
    for i in range(1, WINDOW):
        down += weights[i] * maps[:, i : i + rows]
    both = weights[0] * down[:, :, :columns]
    for i in range(1, WINDOW):
        both += weights[i] * down[:, :, i : i + columns]
    return np.asarray(both)
