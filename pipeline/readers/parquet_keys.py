"""The keys of a Parquet file's row groups. They make a key unique in the whole file, although a unit reads a range.

Each process reads the keys of a row group once, for all ranges of the file that it works on. It stores 16 bytes per
key, the first half of its sha256. Otherwise a file of n ranges would be read n/2 times for its keys.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

FILES = 8  # files whose keys a process keeps
_WORDS = 2  # 64-bit words per hash


class FileKeys:
    """The keys of one file that were read so far. Threads may share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.groups: dict[int, np.ndarray] = {}  # hashes by row group, uint64 [keys, 2]

    def read_before(self, group: int, read: Callable[[int], Iterable[str]]) -> "KeySet":
        """Return the keys of all row groups before this one. read: reads the keys of a row group from the file."""
        with self.lock:
            for earlier in range(group):
                if earlier not in self.groups:
                    self.groups[earlier] = _hash_keys(read(earlier))
            return KeySet([self.groups[earlier] for earlier in range(group)])


class KeySet:
    """A set of keys, stored as their hashes."""

    def __init__(self, hashes: list[np.ndarray]) -> None:
        rows = np.concatenate([*hashes, _hash_keys(())])
        self.hashes = rows[rows[:, 0].argsort()]

    def __contains__(self, key: object) -> bool:
        if not len(self.hashes):
            return False
        ((first, second),) = _hash_keys([str(key)])
        start, end = self.hashes[:, 0].searchsorted(first, "left"), self.hashes[:, 0].searchsorted(first, "right")
        return bool((self.hashes[start:end, 1] == second).any())


def _hash_keys(keys: Iterable[str]) -> np.ndarray:
    """Return the hashes of keys, uint64 [keys, 2]."""
    data = b"".join(hashlib.sha256(key.encode()).digest()[: 8 * _WORDS] for key in keys)
    return np.frombuffer(data, np.uint64).reshape(-1, _WORDS)


def get_file_keys(url: str, size: int, etag: str, column: str | None) -> FileKeys:
    """Return the keys of a file's column that this process has read.

    They are empty if the file has no ETag, because its versions cannot be distinguished.
    """
    return _load_cached_keys(url, size, etag, column) if etag else FileKeys()


@lru_cache(maxsize=FILES)
def _load_cached_keys(url: str, size: int, etag: str, column: str | None) -> FileKeys:
    return FileKeys()
