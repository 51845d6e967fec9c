"""The keys of a Parquet file's row groups, so that a key is unique in the whole file though a unit reads a range of it.

Each process reads the keys of a row group once, whichever of the file's ranges it works on, and keeps 16 bytes of each:
the first half of its sha256. So a file of n ranges is not read n/2 times for its keys.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

FILES = 8  # that are remembered
_WORDS = 2  # of 64 bits, of a hash


class FileKeys:
    """What is known of one file. Threads may share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.groups: dict[int, np.ndarray] = {}  # hashes by row group, uint64 [keys, 2]

    def before(self, group: int, read: Callable[[int], Iterable[str]]) -> "Known":
        """The keys in front of a row group. read: the keys of a row group, out of the file."""
        with self.lock:
            for earlier in range(group):
                if earlier not in self.groups:
                    self.groups[earlier] = _hashes(read(earlier))
            return Known([self.groups[earlier] for earlier in range(group)])


class Known:
    """A set of keys, by their hashes."""

    def __init__(self, hashes: list[np.ndarray]) -> None:
        found = np.concatenate([*hashes, _hashes(())])
        self.hashes = found[found[:, 0].argsort()]

    def __contains__(self, key: str) -> bool:
        if not len(self.hashes):
            return False
        ((first, second),) = _hashes([key])
        start, end = self.hashes[:, 0].searchsorted(first, "left"), self.hashes[:, 0].searchsorted(first, "right")
        return bool((self.hashes[start:end, 1] == second).any())


def _hashes(keys: Iterable[str]) -> np.ndarray:
    data = b"".join(hashlib.sha256(key.encode()).digest()[: 8 * _WORDS] for key in keys)
    return np.frombuffer(data, np.uint64).reshape(-1, _WORDS)


def keys_of_file(url: str, size: int, etag: str, column: str | None) -> FileKeys:
    """What this process knows of a column of a file; nothing where there is no ETag to tell its versions apart."""
    return _remembered(url, size, etag, column) if etag else FileKeys()


@lru_cache(maxsize=FILES)
def _remembered(url: str, size: int, etag: str, column: str | None) -> FileKeys:
    return FileKeys()
