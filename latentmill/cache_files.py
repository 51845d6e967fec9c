"""The files of a cache beside cache.json: the parts, their digest, and stats.json."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from latentmill.cache_info import CacheInfo
from latentmill.canonical_json import VERIFY_HINT, cache_digest, parse_json_object
from latentmill.errors import IdentityError
from latentmill.folder import CacheFolder
from latentmill.overlay_files import FILES
from latentmill.overlays import Overlays, compute_digest
from latentmill.part_files import PARQUET_SUFFIX, WEBDATASET_SUFFIX

DATA, EMPTY, STATS = "data", "_empty", "stats.json"
# The ends of the names of parts. Other programs leave files of their own, such as the index that litdata writes.
PART_SUFFIXES: Mapping[str, tuple[str, ...]] = {EMPTY: (".json",), DATA: (PARQUET_SUFFIX, WEBDATASET_SUFFIX)}
_BLOCK = 8 << 20  # bytes per request while a file is hashed


class OpenCache(Protocol):
    """A cache that is open: `latentmill.Cache`, for the modules that it is built on."""

    @property
    def folder(self) -> CacheFolder:
        """Where it is."""

    @property
    def info(self) -> CacheInfo:
        """Its cache.json."""

    @property
    def overlays(self) -> Overlays:
        """The columns that `latentmill annotate` added."""


def iterate_part_files(folder: CacheFolder) -> Iterator[str]:
    """Yield the files of all parts, in no particular order. Files with other suffixes are passed over."""
    for below, suffixes in PART_SUFFIXES.items():
        yield from (f"{below}/{name}" for name in folder.iterate_names(below) if name.endswith(suffixes))


def list_part_files(folder: CacheFolder) -> list[str]:
    """Return the files of all parts, `_empty/` before `data/`, each sorted by name."""
    return sorted(iterate_part_files(folder), key=lambda file: (file.startswith(DATA), file))


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


def check_overlays(overlays: Overlays) -> None:
    """Hash every overlay that the columns are read from. Raises IdentityError unless its version lists these bytes."""
    for version in {version.number: version for version in overlays.providers.values()}.values():
        entries = [version[index] for index in range(len(version))]
        hashes = hash_files(overlays.folder, (f"{FILES}/{entry.name}" for entry in entries))
        by_part = {entry.file: hashes[f"{FILES}/{entry.name}"] for entry in entries}
        if compute_digest(by_part) != version.info.digest:
            text = f"the overlays of version {version.number} of the columns of {overlays.folder.url} were changed"
            raise IdentityError(f"{text}; {VERIFY_HINT}")


def read_stats(folder: CacheFolder) -> dict[str, Any] | None:
    """Return the content of stats.json, or None if no run has ended yet. Raises CacheError if it is damaged."""
    data = folder.read_if_exists(STATS)
    return None if data is None else parse_json_object(data, folder.url_of(STATS))
