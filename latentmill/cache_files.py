"""The files of a cache beside cache.json: the parts, their digest, and stats.json."""

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

from latentmill.cache_info import CacheInfo
from latentmill.canonical_json import VERIFY_HINT, cache_digest, parse_json_object
from latentmill.errors import IdentityError
from latentmill.folder import CacheFolder

DATA, EMPTY, STATS = "data", "_empty", "stats.json"
_BLOCK = 8 << 20  # bytes per request while a file is hashed


class OpenCache(Protocol):
    """A cache that is open: `latentmill.Cache`, for the modules that it is built on."""

    @property
    def folder(self) -> CacheFolder:
        """Where it is."""

    @property
    def info(self) -> CacheInfo:
        """Its cache.json."""


def list_part_files(folder: CacheFolder) -> list[str]:
    """Return the files with parts, `_empty/` before `data/`, each sorted by name."""
    return [f"{below}/{name}" for below in (EMPTY, DATA) for name in folder.list_files(below)]


def hash_files(folder: CacheFolder, files: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of each of these files, by its name. Each is read one block at a time."""
    hashes = {}
    for file in files:
        sha256 = hashlib.sha256()
        with folder.open(file) as stream:
            while block := stream.read(_BLOCK):
                sha256.update(block)
        hashes[file] = sha256.hexdigest()
    return hashes


def check_digest(folder: CacheFolder, digest: str | None, verify: bool) -> None:
    """Raise IdentityError unless a cache is the one that stats.json describes, with this digest (None: any).

    verify: hash every file.
    """
    stats = read_stats(folder) or {}
    recorded, files = stats.get("digest"), list_part_files(folder)
    if digest not in (None, recorded):
        raise IdentityError(f"the cache {folder.url} has the digest {recorded}, not {digest}")
    if len(files) != stats.get("files"):
        raise IdentityError(
            f"the cache {folder.url} has {len(files)} files, but its {STATS} counts {stats.get('files')}: a job is "
            f"running, or was interrupted; run the same encode command to finish it"
        )
    if verify and (actual := cache_digest(sorted(hash_files(folder, files).items()))) != recorded:
        raise IdentityError(
            f"the files of the cache {folder.url} have the digest {actual}, but its {STATS} has {recorded}: they were "
            f"changed; {VERIFY_HINT}"
        )


def read_stats(folder: CacheFolder) -> dict[str, Any] | None:
    """Return the content of stats.json, or None if no run has ended yet. Raises CacheError if it is damaged."""
    data = folder.read_if_exists(STATS)
    return None if data is None else parse_json_object(data, folder.url_of(STATS))
