"""A cache that jobs work on: `latentmill.Cache`, on a folder that can be written to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentmill import cache as reader
from latentmill import part_files
from latentmill.cache import check_digest
from latentmill.cache_info import NAME
from pipeline.cache import identity
from pipeline.errors import CacheError
from pipeline.formats.schema import OutputSchema
from pipeline.records import TEXT_EXTENSIONS
from pipeline.storage.connection import absolute
from pipeline.storage.folder import Folder
from vae import AutoencoderKLConfig


@dataclass(frozen=True, slots=True)
class Cache(reader.Cache):
    """An open cache, with the VAE's configuration and the layout of the files as the pipeline has them."""

    folder: Folder

    @classmethod
    def open(
        cls, url: str, options: Mapping[str, Any] | None = None, digest: str | None = None, verify: bool = False
    ) -> "Cache":
        """Open a cache as `latentmill.Cache.open` does. Retries and limits of the storage are those of the jobs."""
        folder = Folder(absolute(url), options or {})
        info = identity.read_cache_json(folder)
        if info is None:
            raise CacheError(f"there is no latentmill cache at {url}: it has no {NAME}")
        if digest is not None or verify:
            check_digest(folder, digest, verify)
        return cls(folder, info)

    @property
    def config(self) -> AutoencoderKLConfig:
        """The configuration of the VAE that made the latents. Raises ValueError for one that no AutoencoderKL has."""
        return AutoencoderKLConfig.from_dict(self.info.vae.config)

    @property
    def layout(self) -> OutputSchema:
        """Return the container, the stored form of a posterior, and the columns."""
        return identity.parse_schema(self.info)


def read_rows(
    folder: Folder,
    file: str,
    wanted: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = TEXT_EXTENSIONS,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of a cache as dicts, in order: all, or those at the `wanted` indexes."""
    with folder.open(file) as stream:
        yield from part_files.read_rows(stream, file, wanted, columns, texts)
