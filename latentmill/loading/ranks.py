"""The rank of this process, and what all ranks must agree on."""

import os
from collections.abc import Sequence
from typing import Any

from latentmill.cache_files import OpenCache
from latentmill.errors import LatentmillError, UsageError
from latentmill.loading.index import Index, read_index


def find_rank(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """Return the rank and the number of ranks: those given, or those of torch.distributed, or of torchrun's variables.

    Raises UsageError if only one is given, or if there is no such rank.
    """
    if (rank is None) != (world is None):
        raise UsageError("rank and world are given together or not at all")
    if rank is None or world is None:
        rank, world = _ask_torch() or (_read_variable("RANK", 0), _read_variable("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise UsageError(f"there is no rank {rank} in a world of {world}")
    return rank, world


def _read_variable(name: str, default: int) -> int:
    """Return a number in the environment. Raises UsageError if it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"the environment variable {name} is {text!r}, not a number")
    return int(text)


def _ask_torch() -> tuple[int, int] | None:
    """Return the rank and the number of ranks of torch.distributed, or None if it is not initialized."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank(), distributed.get_world_size()


def read_shared_index(
    cache: OpenCache, files: Sequence[str] | None, is_shared: bool, settings: dict[str, Any]
) -> Index:
    """Return the row groups of a cache: on all ranks those of the files that rank 0 sees, as the cache may grow.

    is_shared: False: of this rank alone. Otherwise all ranks must call this. Without torch.distributed, it is of this
    rank alone. settings: what must be equal on all ranks. Raises UsageError, which names one that is not.
    """
    if not is_shared or _ask_torch() is None:
        return read_index(cache, files)
    from torch import distributed

    index: Index | LatentmillError | None = None
    message: list[Any] = [None]
    if distributed.get_rank() == 0:
        index = _try_to_read(cache, files)
        message = [(index if isinstance(index, LatentmillError) else index.files, settings)]
    distributed.broadcast_object_list(message)
    found, expected = message[0]
    if isinstance(found, LatentmillError):
        raise found
    for name, value in expected.items():
        if settings[name] != value:
            raise UsageError(f"{name} is {value!r} on rank 0, but {settings[name]!r} on this rank")
    return index if isinstance(index, Index) else read_index(cache, found)


def _try_to_read(cache: OpenCache, files: Sequence[str] | None) -> Index | LatentmillError:
    try:
        return read_index(cache, files)
    except LatentmillError as error:  # the other ranks must hear of it
        return error
