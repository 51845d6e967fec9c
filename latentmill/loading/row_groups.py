"""Read a row group of a cache by one request, without a Python object for each latent."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentmill.loading.index import Index

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.cache import Cache


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """The rows of a group in memory.

    latents: [N, K, C, h, w] as stored, on the CPU, maybe not contiguous. K is 2 with `latent_flipped`, otherwise 1.
    columns: the values of each column by its name, [N]: numbers as int64, float or bool arrays, others as objects.
    """

    latents: "Tensor"
    columns: Mapping[str, Any]


class GroupReader:
    """Reads row groups. Safe to use from several threads; make it in the process that uses it.

    columns: the names of the columns to read (`BatchRules.columns`). checksums: verify the CRC of each Parquet page.
    """

    def __init__(self, cache: "Cache", index: Index, columns: Collection[str], checksums: bool = True) -> None:
        raise NotImplementedError

    def read(self, group: int) -> RowGroup:
        """Return the rows of a group, by one request; for the first group of a Parquet file, its footer by another.

        Raises StorageError if the storage fails repeatedly, and CacheError, which names the file, the group and the
        column, if the bytes are not those of the index.
        """
        raise NotImplementedError
