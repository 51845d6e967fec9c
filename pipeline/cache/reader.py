"""Reading a cache: its latents as tensors, raw or as a diffusion model sees them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.cache import identity, parts, stats
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError, IdentityError
from pipeline.formats import parquet, webdataset
from pipeline.formats.schema import OutputSchema
from pipeline.records import TEXT_EXTENSIONS
from pipeline.storage.connection import absolute
from pipeline.storage.folder import Folder
from vae import AutoencoderKLConfig
from vae.scaling import Scaling, scaling_of

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def to_tensor(row: Mapping[str, Any]) -> Tensor:
    """The raw latent of a row of a cache (a dict with `latent`, `shape`, `dtype`): [C, h, w]."""
    return torch.frombuffer(bytearray(row["latent"]), dtype=_DTYPES[row["dtype"]]).reshape(row["shape"])


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache that has been opened. `content` is its cache.json."""

    folder: Folder
    content: Mapping[str, Any]

    @classmethod
    def open(
        cls, url: str, options: Mapping[str, str] | None = None, digest: str | None = None, verify: bool = False
    ) -> "Cache":
        """Open a cache. digest: what its stats.json must say; pin it in a training configuration.

        With a digest, there must also be as many files as stats.json is of. verify: read every file and make the digest
        again; without it, a file that was changed after stats.json was written is not noticed.
        Raises CacheError if there is no cache, IdentityError if it has another digest.
        """
        folder = Folder(absolute(url), options or {})
        content = identity.read_cache_json(folder)
        if content is None:
            raise CacheError(f"there is no latentmill cache at {url}: it has no {identity.NAME}")
        if digest is not None or verify:
            check_digest(folder, digest, verify)
        return cls(folder, content)

    @property
    def config(self) -> AutoencoderKLConfig:
        """The configuration of the VAE that made the latents."""
        return AutoencoderKLConfig.from_dict(self.content["vae"]["config"])

    @property
    def scaling(self) -> Scaling:
        """The rule between the raw latents stored here and model latents."""
        return scaling_of(self.config)

    @property
    def layout(self) -> OutputSchema:
        """What the files look like."""
        return identity.parse_schema(self.content)

    def files(self) -> list[str]:
        """The names of the files with rows, sorted: the cache is their concatenation."""
        return [f"{parts.DATA}/{name}" for name in self.folder.names(parts.DATA)]

    def rows(self, file: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of one file as dicts, in order, the same for both containers. columns: of Parquet, to read less."""
        yield from read_rows(self.folder, file, columns=columns, texts=self.layout.columns.texts)


def check_digest(folder: Folder, digest: str | None, verify: bool) -> None:
    """Raise IdentityError unless a cache is the one that stats.json describes, with this digest (None: any).

    verify: hash every file.
    """
    content = stats.read_stats(folder) or {}
    told, files = content.get("digest"), parts.list_part_files(folder)
    if digest not in (None, told):
        raise IdentityError(f"the cache {folder.url} has the digest {told}, not {digest}")
    if len(files) != content.get("files"):
        raise IdentityError(
            f"the cache {folder.url} has {len(files)} files, its {stats.NAME} is of {content.get('files')}: a job is "
            f"at work on it, or was interrupted; the same encode command ends it"
        )
    if verify and (found := stats.cache_digest(parts.hash_files(folder, files))) != told:
        raise IdentityError(
            f"the files of the cache {folder.url} have the digest {found}, its {stats.NAME} says {told}: they were "
            f"changed; {VERIFY_HINT}"
        )


def read_rows(
    folder: Folder,
    file: str,
    wanted: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = TEXT_EXTENSIONS,
) -> Iterator[dict[str, Any]]:
    """The rows of a file of a cache as dicts, in order: all, or those at the `wanted` indexes."""
    with folder.open(file) as stream:
        if file.endswith(webdataset.SUFFIX):
            yield from webdataset.read_rows(stream, wanted, texts)
        else:
            yield from parquet.read_rows(stream, wanted, columns)
