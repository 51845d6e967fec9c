"""Random numbers of an epoch, by their purpose: the same on every rank, platform and version of numpy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentmill.errors import UsageError

Int64s = NDArray[np.int64]
LIMIT = 1 << 63  # of seeds and epochs
GROUPS, TAILS, STRETCHES, ROLL, ROWS, LANE, CHOICE = range(7)  # the purposes


def check_epoch(epoch: int) -> None:
    """Raise UsageError if there is no epoch of that number."""
    if not 0 <= epoch < LIMIT:
        raise UsageError(f"epoch must be from 0 to 2^63 - 1, not {epoch}")


@dataclass(frozen=True, slots=True)
class Draws:
    """Independent random numbers for each purpose and number, from a seed and an epoch.

    They are the raw output of Philox, which numpy does not change. is_random: otherwise permutations keep the order.
    """

    seed: int
    epoch: int
    is_random: bool = True

    def raw(self, count: int, purpose: int, number: int = 0) -> NDArray[np.uint64]:
        """Return uniform 64-bit numbers, [count]."""
        key = np.array([self.seed, self.epoch], np.uint64)
        counter = np.array([0, 0, purpose, number], np.uint64)
        return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count), np.uint64)

    def permute(self, count: int, purpose: int, number: int = 0) -> Int64s:
        """Return the integers below `count` in random order, [count].

        They are sorted by a draw. Its low bits are the integer itself, so that no two are equal, and sorting is fast.
        """
        places = np.arange(count, dtype=np.uint64)
        if not self.is_random:
            return places.astype(np.int64)
        bits = np.uint64(max(count - 1, 1).bit_length())
        order = (self.raw(count, purpose, number) >> bits << bits) | places
        order.sort()
        return (order & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)

    def below(self, limit: int, purpose: int, number: int = 0) -> int:
        """Return a random integer below `limit`; 0 if nothing is random."""
        return int(self.raw(1, purpose, number)[0] % np.uint64(limit)) if self.is_random else 0
