"""A cache that jobs work on: `latentmill.Cache`, on a folder that can be written to."""

import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from latentmill import cache as reader
from latentmill import part_files
from latentmill.cache_info import CacheInfo, parse_cache_json
from pipeline.cache import identity
from pipeline.errors import DamagedFileError
from pipeline.formats.schema import OutputSchema
from pipeline.records import TEXT_EXTENSIONS
from pipeline.storage.connection import make_absolute
from pipeline.storage.folder import Folder
from vae import VaeConfig
from vae.config import parse_config


@dataclass(frozen=True, slots=True)
class Cache(reader.Cache):
    """An open cache, with the VAE's configuration and the layout of the files as the pipeline uses them.

    It reads the storage with the retries and limits of the jobs.
    """

    folder: Folder

    @staticmethod
    def _read_info(url: str, options: Mapping[str, Any]) -> tuple[Folder, CacheInfo | None]:
        folder = Folder(make_absolute(url), options)
        data = folder.read_if_exists(identity.NAME)
        return folder, None if data is None else parse_cache_json(data, folder.url)

    @property
    def config(self) -> VaeConfig:
        """The configuration of the VAE that made the latents. Raises ValueError for one that no model has."""
        return parse_config(self.info.vae.config)

    @property
    def layout(self) -> OutputSchema:
        """Return the container, the stored form of a posterior, and the columns."""
        return identity.parse_schema(self.info)

    def rows(
        self, file: str, columns: Sequence[str] | None = None, wanted: Sequence[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of one file as `latentmill.Cache.rows` does, with the added columns.

        Raises DamagedFileError if the file cannot be read as rows.
        """
        with name_damage(self.folder, file):
            yield from reader.Cache.rows(self, file, columns, wanted)


def read_rows(
    folder: Folder,
    file: str,
    wanted: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    binary: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of a cache as dicts, in order: all, or those at the `wanted` indexes.

    They have the columns of the file alone; `Cache.rows` adds those of `latentmill annotate`.
    Raises DamagedFileError if the file cannot be read as rows.
    """
    with name_damage(folder, file), folder.open(file) as stream:
        yield from part_files.read_rows(stream, file, wanted, columns, texts, binary)


@contextmanager
def name_damage(folder: Folder, file: str) -> Iterator[None]:
    """Turn what the libraries raise for a damaged file of a cache into a DamagedFileError that names it."""
    try:
        yield
    except (pa.ArrowException, tarfile.TarError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
        url = folder.url_of(file)
        raise DamagedFileError(f"{url} is damaged; run `latentmill verify {folder.url}`") from error
