"""Estimate the number of images of many files from a few of them, and the error of that estimate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)  # 95% of a normal distribution are within so many standard errors


@dataclass(frozen=True, slots=True)
class Count:
    """A number of images. error: half of the 95% interval; None if it is unknown.

    is_exact: whether every image was counted. An estimate can have an error of 0: of equal files, say.
    """

    images: float
    error: float | None = 0.0
    is_exact: bool = True

    def __add__(self, other: "Count") -> "Count":
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0, other.error or 0) if known else None
        return Count(self.images + other.images, error, self.is_exact and other.is_exact)


@dataclass(frozen=True, slots=True)
class Counted:
    """The images of one file. bytes: of the file. variance: of `images`; None if they were all counted."""

    images: float
    bytes: int
    variance: float | None = None


def estimate_total(counted: Sequence[Counted], files: int, size: int) -> Count:
    """Return the images of `files` files with `size` bytes in total, of which some were drawn at random and counted.

    The images per byte of the drawn files apply to all (ratio estimator). The variance has two stages: the spread
    between the drawn files, and the uncertainty of the files that were read in part.
    """
    images, read = sum(item.images for item in counted), sum(item.bytes for item in counted)
    drawn, is_exact = len(counted), len(counted) == files and all(item.variance is None for item in counted)
    if is_exact:
        return Count(float(images))
    if not read:
        return Count(0.0, None, is_exact=False)
    rate = images / read
    variance = files / drawn * sum(item.variance or 0.0 for item in counted)
    total = images if drawn == files else rate * size
    if drawn < files:
        if drawn == 1:
            return Count(total, None, is_exact=False)
        spread = sum((item.images - rate * item.bytes) ** 2 for item in counted) / (drawn - 1)
        variance += files**2 * (1 - drawn / files) * spread / drawn
    return Count(total, _find_quantile(drawn - 1) * math.sqrt(variance), is_exact=False)


def _find_quantile(degrees: int) -> float:
    """Return about the 97.5% quantile of Student's t, by the expansion of Cornish and Fisher."""
    if degrees < 1:
        return _Z
    first, second = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / degrees + second / degrees**2
