"""What the functions of all formats share: the settings of an export, a row's values, and the files that are made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from latentmill.cache_files import read_stats
from pipeline.cache.reader import Cache
from pipeline.errors import CacheError
from pipeline.formats.schema import BASE_SCHEMA, LATENT_FLIPPED
from pipeline.records import get_shard_kind, get_shard_stem
from pipeline.text import unescape_key

Row = Mapping[str, Any]
Space = Literal["raw", "model"]

SPOOL = 64 << 20  # bytes of latents in a file of many rows
NAME_BYTES = 255  # of a file's name, on nearly all disks


class RefusedRow(Exception):
    """One row that the format cannot hold. The message is the reason."""


@dataclass(frozen=True, slots=True)
class OutFile:
    """A file to be written. name: below the folder of the export.

    rows: the number of rows in it. keeps_existing: a file with this name is left as it is, whatever it holds. entry:
    what the files of the whole export need of this one, as a JSON value.
    """

    name: str
    data: bytes
    rows: int = 1
    keeps_existing: bool = False
    entry: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """The settings of an export, small enough to be sent to another process.

    space, dtype: of the latents that are written. caption_column, label_column: empty if they are not exported.
    with_shard: names begin with the shard, because several shards have the same keys. is_flat: the trainer has all
    files in one folder. has_flipped: latents of mirrored images are written.
    """

    cache: Cache
    space: Space
    dtype: torch.dtype | None
    caption_column: str = ""
    label_column: str = ""
    with_shard: bool = False
    is_flat: bool = False
    has_flipped: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The columns of a cache that most formats need."""
        named = [LATENT_FLIPPED.name if self.has_flipped else "", self.caption_column, self.label_column]
        return [*BASE_SCHEMA.names, *filter(None, named)]

    def read_latent(self, row: Row, flipped: bool = False) -> torch.Tensor:
        """Return a row's latent [C, h, w] in the space and the dtype of the format; of moments, the mean.

        It is scaled in float32 and then rounded once. Raises RefusedRow if a value exceeds the dtype.
        """
        latent = self.cache.raw_latent(row, flipped)
        if self.cache.info.identity.store == "moments":
            latent = latent.chunk(2)[0]
        if self.space == "model":
            latent = self.cache.scaling.to_model(latent.float())
        return self.cast(latent)

    def cast(self, latent: torch.Tensor) -> torch.Tensor:
        """Return a latent in the dtype of the format. Raises RefusedRow if a value exceeds it."""
        rounded = latent if self.dtype is None else latent.to(self.dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise RefusedRow(f"its latent has values that {str(rounded.dtype).removeprefix('torch.')} cannot hold")
        return rounded.contiguous()

    def read_label(self, row: Row) -> int:
        """Return the label of a row, which may be text, as `.cls` files are. Raises RefusedRow for other values."""
        label = row.get(self.label_column)
        if isinstance(label, str) and re.fullmatch(r"\s*-?[0-9]+\s*", label):
            return int(label)
        if isinstance(label, bool) or not isinstance(label, int):
            raise RefusedRow(f"its column '{self.label_column}' is {label!r}, not a whole number")
        return label

    def read_caption(self, row: Row) -> str | None:
        """Return the caption of a row, or None. Raises RefusedRow if it is not text."""
        caption = row.get(self.caption_column) if self.caption_column else None
        if caption is not None and not isinstance(caption, str):
            raise RefusedRow(f"its column '{self.caption_column}' is not text")
        return caption

    def read_stats(self) -> dict[str, Any]:
        """Return the cache's stats.json. Raises CacheError if there is none."""
        stats = read_stats(self.cache.folder)
        if not stats or not stats.get("count"):
            raise CacheError(f"the cache {self.cache.folder.url} has no statistics; run the encode command to its end")
        return stats

    def make_stem(self, row: Row) -> str:
        """Return the path of a row's files below the export, without an extension: its key, or its shard and key.

        The trainer knows the image by it, so no two rows may have the same. Keys of folders and tables are unescaped,
        so that the stem is that of the image. Raises RefusedRow for a path that would leave the folder.
        """
        shard, key = str(row["shard"]), str(row["key"])
        if get_shard_kind(shard) not in ("tar", "zip"):
            key = unescape_key(key)
        path = check_path(f"{get_shard_stem(shard)}/{key}" if self.with_shard else key)
        if not self.is_flat:
            return path
        return path.replace("/", "__") if self.with_shard else path.rpartition("/")[2]


def check_path(path: str) -> str:
    """Return a relative path of plain names. Raises RefusedRow for any other, which could leave the export."""
    names = path.split("/")
    if any(name in ("", ".", "..") or "\0" in name or "\\" in name for name in names):
        raise RefusedRow("its key is not a relative path of plain names")
    return path


def check_length(name: str) -> str:
    """Return the name of a file. Raises RefusedRow if a disk cannot hold it."""
    if any(len(step.encode()) > NAME_BYTES for step in name.split("/")):
        raise RefusedRow(f"the name of its file would have more than {NAME_BYTES} bytes")
    return name
