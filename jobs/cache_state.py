"""What a command needs to find in a cache. Imports no torch, because `stats` and `annotate` need none."""

from collections.abc import Mapping, Sized
from typing import Any

from pipeline.cache import stats
from pipeline.cache.reader import Cache
from pipeline.errors import CacheError


def check_has_rows(cache: str, found: Sized) -> None:
    """Raise CacheError if a cache has no rows. found: its files with rows, or what is made of them."""
    if not len(found):
        raise CacheError(f"the cache {cache} has no rows yet; encode images into it first")


def read_required_stats(cache: Cache, named: str) -> Mapping[str, Any]:
    """Return the content of stats.json. Raises CacheError if there is none. named: the cache as the user named it."""
    content = stats.read_stats(cache.folder)
    if content is None:
        raise CacheError(f"{named} has no {stats.NAME} yet; run the encode command to its end first")
    return content
