"""Reading a cache: its rows, and their latents as tensors, raw or as a diffusion model sees them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from latentmill.cache_files import DATA, PART_SUFFIXES, check_digest, check_overlays
from latentmill.cache_info import NAME, CacheInfo, parse_cache_json
from latentmill.canonical_json import VERIFY_HINT
from latentmill.error_text import describe_error
from latentmill.errors import CacheError, LatentmillError, NoCacheError, UsageError
from latentmill.folder import CacheFolder, make_absolute
from latentmill.loading.random_access import RowAccess
from latentmill.overlays import Overlays, open_overlays
from latentmill.part_files import PARQUET_SUFFIX, read_rows, to_tensor
from latentmill.scaling import Scaling

if TYPE_CHECKING:  # rows can be read without torch
    from torch import Tensor

NO_OVERLAYS = Overlays()


@dataclass(frozen=True, slots=True)
class Cache:
    """An open cache.

    folder: where it is. info: its cache.json. overlays: the columns that `latentmill annotate` added.
    """

    folder: CacheFolder
    info: CacheInfo
    overlays: Overlays = NO_OVERLAYS
    _access: RowAccess = field(default_factory=RowAccess, init=False, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
        digest: str | None = None,
        verify: bool = False,
        vae: Any = None,
        columns_version: int | str | None = None,
    ) -> Self:
        """Open a cache.

        url: a path, or a URL that fsspec supports. options: of its fsspec filesystem. digest: the expected digest of
        its stats.json; pin it in a training configuration. With a digest, the number of files must also equal the
        number in stats.json. verify: read every file and compute the digest again; otherwise a file that was changed
        after stats.json was written is not detected. vae: the VAE that must have made the cache: the sha256 of its
        weights, a directory or safetensors file with them, a torch module, a state dict (`latentmill.weights_hash`), or
        the name in cache.json. columns_version: the version of the added columns, by its number (0: none of
        them) or by its columns digest, which can be pinned as well; None for the newest.
        Raises CacheError if there is no cache, or if its cache.json is not one that this version can read;
        IdentityError if it has another digest or was made by another VAE; UsageError if it has no such version of its
        columns; StorageError if the storage refuses.
        """
        url = os.fspath(url)
        folder, info = cls._read_info(url, options or {})
        if info is None:
            raise NoCacheError(f"there is no latentmill cache at {url}: it has no {NAME}")
        if digest is not None or verify:
            check_digest(folder, digest, verify)
        if vae is not None:
            from latentmill.weights_hash import check_vae

            check_vae(folder.url, info, vae)
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

    def __len__(self) -> int:
        """The number of rows that the cache had when it was first asked for this, or for a row."""
        return self._access.index(self).row_count

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row by its number: an entry of a batch of `latentmill.Loader` with its defaults.

        Tensors have no first axis. Row i is that of the concatenation of `files()`; a negative number counts from the
        end. A whole row group is read for it, so this is for looking at a cache. Raises IndexError if there is no such
        row.
        """
        return self._access.get(self, row)

    def find(self, shard: str, key: str) -> int:
        """Return the number of the row of a sample. Raises KeyError if it has none.

        The keys of whole files are read until it is found. Those of a unit that is a whole tar or file are tried first.
        """
        return self._access.find(self, shard, key)

    def files(self) -> list[str]:
        """Return the names of the files with rows, sorted. The cache is their concatenation."""
        return [f"{DATA}/{name}" for name in self.folder.list_files(DATA) if name.endswith(PART_SUFFIXES[DATA])]

    def rows(
        self, file: str, columns: Sequence[str] | None = None, wanted: Sequence[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of one file as dicts, in order, the same for both containers.

        Rows have the added columns. Such a column replaces one of the same name.
        columns: of Parquet, to read less. wanted: the indexes of the rows to yield, ascending; None for all.
        Raises UsageError for columns that the cache does not have, CacheError if the file is damaged, and StorageError
        if it cannot be read.
        """
        later = [name for name in self.overlays.schema.names if columns is None or name in columns]
        own = columns
        if columns is not None and later:
            own = [name for name in columns if name not in later] or ["key"]
        try:
            with self.folder.open(file) as stream:
                rows = read_rows(stream, file, wanted, own, self.info.columns.texts, self.info.columns.binary)
                yield from self._add_overlays(rows, file, later, columns, wanted) if later else rows
        except LatentmillError:
            raise
        except Exception as error:  # damaged bytes can make tarfile and Arrow raise anything
            reason = describe_error(error)
            raise CacheError(f"{self.folder.url_of(file)} cannot be read: {reason:.200}; {VERIFY_HINT}") from error

    def _add_overlays(
        self,
        rows: Iterator[dict[str, Any]],
        file: str,
        later: Sequence[str],
        columns: Sequence[str] | None,
        wanted: Sequence[int] | None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a file with the added columns."""
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
