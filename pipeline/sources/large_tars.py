"""Divide large tars into ranges of bytes. This is done once: the plan has the boundaries."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.errors import DamagedError, ShardError, StorageError
from pipeline.limits import DEFAULT_LIMITS, Limits
from pipeline.readers.tar_boundaries import Found, TarHeaders, choose_boundaries
from pipeline.records import ListedFile, get_shard_kind
from pipeline.storage import reading

LARGE_TAR_BYTES = 4 << 30  # usual shards are smaller: no request is made for them
TAR_RANGE_BYTES = 1 << 30  # of a large tar: about as many as a usual shard has
TARS = 8  # that are divided at a time
REQUESTS = 16  # at a time, because stores are slow to answer; each may return 16 MiB

Boundaries = Mapping[str, Sequence[int]]  # by the path of a tar: the bytes at which its ranges begin, without 0
Divide = Callable[[Sequence[ListedFile]], Boundaries]


def leave_whole(files: Sequence[ListedFile]) -> Boundaries:
    """Divide no tar."""
    return {}


def divide_large_tars(
    files: Iterable[ListedFile], options: Mapping[str, str], limits: Limits = DEFAULT_LIMITS
) -> Boundaries:
    """Return the boundaries of the large tars among the files. Compressed tars and damaged ones stay whole.

    Raises StorageError if a tar cannot be read now, but perhaps later.
    """
    tars = [file for file in files if get_shard_kind(file.path) == "tar" and file.bytes > LARGE_TAR_BYTES]
    if not tars:
        return {}
    with ThreadPoolExecutor(TARS) as tar_pool, ThreadPoolExecutor(REQUESTS) as pool:
        divided = list(tar_pool.map(lambda file: _find_boundaries(file, pool, options, limits), tars))
    return {file.path: boundaries for file, boundaries in zip(tars, divided, strict=True) if boundaries}


def _find_boundaries(
    file: ListedFile, pool: ThreadPoolExecutor, options: Mapping[str, str], limits: Limits
) -> list[int]:
    """Return the boundaries of one tar; an empty list if it stays whole."""
    headers = TarHeaders(partial(reading.read_range, file.url, options), file.bytes, file.url, limits)
    count = math.ceil(file.bytes / TAR_RANGE_BYTES)
    wanted = [file.bytes * k // count for k in range(1, count)]
    try:
        found = list(pool.map(headers.search, wanted)) if headers.is_searchable() else [Found()] * len(wanted)
        return choose_boundaries(headers, wanted, found)
    except (ShardError, DamagedError):  # its unit says why
        return []
    except StorageError as error:
        if error.may_pass:
            raise
        return []
