"""Millions of names as one sorted numpy array of bytes, which takes half of the memory of Python strings in a set."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

T = TypeVar("T")
CHUNK = 1 << 16  # names that are Python strings at the same time


def sort_names(names: Iterable[str]) -> np.ndarray:
    """Return names as an array [n] of their UTF-8 bytes, in the order of these bytes."""
    chunks = [encode_names(some) for some in split(names, CHUNK)]
    array = np.concatenate(chunks) if chunks else np.zeros(0, "S1")
    array.sort()
    return array


def encode_names(names: Sequence[str]) -> np.ndarray:
    """Return names as an array [n] of their UTF-8 bytes, in the same order."""
    return np.array([name.encode() for name in names], "S" if names else "S1")


def find_names(array: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the index of each name in a sorted array, int64 [n]; -1 for names that it does not have."""
    wanted = encode_names(names)
    if not len(array) or not len(wanted):
        return np.full(len(wanted), -1)
    is_short = np.char.str_len(wanted) <= array.itemsize
    wanted = wanted.astype(array.dtype)  # otherwise numpy would copy the array to the longer type
    indexes = np.minimum(np.searchsorted(array, wanted), len(array) - 1)
    return np.where(is_short & (array[indexes] == wanted), indexes, -1)


def iterate_names(array: np.ndarray) -> Iterator[str]:
    """Yield the names in an array."""
    for start in range(0, len(array), CHUNK):
        yield from (name.decode() for name in array[start : start + CHUNK].tolist())


def split(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
