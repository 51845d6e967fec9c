"""Sums of float64 values without rounding errors. So the order in which values are added does not matter.

A float64 is an integer of at most 53 bits times a power of two. The integers of one power are added as two halves in
numpy, and the totals of all powers as Python integers.
"""

from collections import defaultdict
from fractions import Fraction

import numpy as np

_BITS = 53  # of the integer in a float64
_HALF = 26  # bits of the lower half
_SHIFT = 1126  # the sums are in units of 2**-1126, which divides the smallest subnormal float64
_CHUNK = 1 << 22  # values that are added at once: their halves fit into a float64 exactly
_SPLIT = 2.0**27 + 1  # of Dekker's product


class ExactSums:
    """One exact sum per column. Columns are numbered from 0, and need not be declared."""

    def __init__(self) -> None:
        self._totals: defaultdict[int, int] = defaultdict(int)

    def add(self, columns: np.ndarray, values: np.ndarray) -> None:
        """Add each value to the sum of its column.

        columns: int64 [n]. values: float64 [n], finite.
        """
        for start in range(0, len(values), _CHUNK):
            self._add_chunk(columns[start : start + _CHUNK], values[start : start + _CHUNK])

    def _add_chunk(self, columns: np.ndarray, values: np.ndarray) -> None:
        mantissas, exponents = np.frexp(values)
        integers = np.ldexp(mantissas, _BITS).astype(np.int64)
        lowest = int(exponents.min())
        span = int(exponents.max()) - lowest + 1
        bins = columns * span + (exponents - lowest)
        highs = np.bincount(bins, weights=integers >> _HALF)
        lows = np.bincount(bins, weights=integers & ((1 << _HALF) - 1))
        for number in np.flatnonzero((highs != 0) | (lows != 0)).tolist():
            column, exponent = divmod(number, span)
            total = (int(highs[number]) << _HALF) + int(lows[number])
            self._totals[column] += total << (exponent + lowest - _BITS + _SHIFT)

    def get(self, column: int) -> Fraction:
        """Return the exact sum of a column; 0 if nothing was added to it."""
        return Fraction(self._totals.get(column, 0), 1 << _SHIFT)


def multiply_exactly(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded products and their rounding errors: a * b is exactly the sum of both.

    Dekker (1971, "A Floating-Point Technique for Extending the Available Precision"), for |a|, |b| < 2**996.
    """
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the upper and the lower half of each value's digits."""
    scaled = values * _SPLIT
    high = scaled - (scaled - values)
    return high, values - high
