"""Reading a cache: its rows, and their latents as tensors, raw or as a diffusion model sees them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from latentmill.cache_info import NAME, CacheInfo, parse_cache_json
from latentmill.canonical_json import VERIFY_HINT, cache_digest, parse_json_object
from latentmill.errors import CacheError, IdentityError, NoCacheError, UsageError
from latentmill.folder import CacheFolder, make_absolute
from latentmill.overlay_files import FILES
from latentmill.overlays import Overlays, compute_digest, open_overlays
from latentmill.part_files import PARQUET_SUFFIX, read_rows, to_tensor
from latentmill.scaling import Scaling

if TYPE_CHECKING:  # rows can be read without torch
    from torch import Tensor

DATA, EMPTY, STATS = "data", "_empty", "stats.json"
NO_OVERLAYS = Overlays()
_BLOCK = 8 << 20  # bytes per request while a file is hashed


@dataclass(frozen=True, slots=True)
class Cache:
    """An open cache.

    folder: where it is. info: its cache.json. overlays: the columns that `latentmill annotate` added later.
    """

    folder: CacheFolder
    info: CacheInfo
    overlays: Overlays = NO_OVERLAYS

    @classmethod
    def open(
        cls,
        url: str,
        options: Mapping[str, Any] | None = None,
        digest: str | None = None,
        verify: bool = False,
        columns_version: int | str | None = None,
    ) -> Self:
        """Open a cache.

        url: a path, or a URL that fsspec supports. options: of its fsspec filesystem. digest: the expected digest of
        its stats.json; pin it in a training configuration. With a digest, the number of files must also equal the
        number in stats.json. verify: read every file and compute the digest again; otherwise a file that was changed
        after stats.json was written is not detected. columns_version: the version of the columns that came later, by
        its number (0: none of them) or by its columns digest, which can be pinned as well; None for the newest.
        Raises CacheError if there is no cache, or if its cache.json is not one that this version can read;
        IdentityError if it has another digest; UsageError if it has no such version of its columns; StorageError if the
        storage refuses.
        """
        folder, info = cls._read_info(url, options or {})
        if info is None:
            raise NoCacheError(f"there is no latentmill cache at {url}: it has no {NAME}")
        if digest is not None or verify:
            check_digest(folder, digest, verify)
        overlays = open_overlays(folder, columns_version)
        if verify:
            check_overlays(overlays)
        return cls(folder, info, overlays)

    @staticmethod
    def _read_info(url: str, options: Mapping[str, Any]) -> tuple[CacheFolder, CacheInfo | None]:
        """Return the folder at a URL, and the content of its cache.json; None if there is no such file."""
        folder = CacheFolder(make_absolute(url), options)
        data = folder.read_if_exists(NAME)
        return folder, None if data is None else parse_cache_json(data, folder.url)

    @property
    def scaling(self) -> Scaling:
        """The rule between the raw latents in the cache and model latents."""
        return self.info.scaling

    def files(self) -> list[str]:
        """Return the names of the files with rows, sorted. The cache is their concatenation."""
        return [f"{DATA}/{name}" for name in self.folder.list_files(DATA)]

    def rows(
        self, file: str, columns: Sequence[str] | None = None, wanted: Sequence[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of one file as dicts, in order, the same for both containers.

        Rows have the columns that came later. Such a column replaces one of the same name.
        columns: of Parquet, to read less. wanted: the indexes of the rows to yield, ascending; None for all.
        """
        later = [name for name in self.overlays.schema.names if columns is None or name in columns]
        own = columns
        if columns is not None and later:
            own = [name for name in columns if name not in later] or ["key"]
        with self.folder.open(file) as stream:
            rows = read_rows(stream, file, wanted, own, self.info.columns.texts, self.info.columns.binary)
            yield from self._add_overlays(rows, file, later, columns, wanted) if later else rows

    def _add_overlays(
        self,
        rows: Iterator[dict[str, Any]],
        file: str,
        later: Sequence[str],
        columns: Sequence[str] | None,
        wanted: Sequence[int] | None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a file with the columns that came later."""
        overlay = self.overlays.iterate_rows(file, later, wanted)
        for row in rows:
            more = next(overlay, None)
            if more is None:
                raise CacheError(f"{self.folder.url_of(file)} has more rows than its overlays; {VERIFY_HINT}")
            row |= more
            is_chosen = columns is not None and file.endswith(PARQUET_SUFFIX)
            yield {name: row[name] for name in columns or () if name in row} if is_chosen else row

    def raw_latent(self, row: Mapping[str, Any], flipped: bool = False) -> "Tensor":
        """Return the latent of a row as it is stored: [C, h, w] in the cache's dtype, on the CPU.

        Of a cache of moments: [2C, h, w], the mean and then the log-variance. flipped: return the latent of the image
        mirrored left to right. Raises UsageError if the cache has none, because it was not made with `--flip both`.
        """
        if not flipped:
            return to_tensor(row)
        if self.info.identity.preprocessing.flip != "both":
            raise UsageError(
                f"the cache {self.folder.url} has no flipped latents; encode the images into a new one with --flip both"
            )
        return to_tensor(row, "latent_flipped")

    def model_latent(self, row: Mapping[str, Any], flipped: bool = False) -> "Tensor":
        """Return the latent of a row as a diffusion model sees it: scaled, [C, h, w] in the cache's dtype, on the CPU.

        Of a cache of moments: the scaled mean. flipped: see `raw_latent`.
        """
        latent = self.raw_latent(row, flipped)
        if self.info.identity.store == "moments":
            latent = latent.chunk(2)[0]
        return self.scaling.to_model(latent)


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
