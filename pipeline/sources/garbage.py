"""The search for cyclic garbage, switched off while millions of lasting objects are made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_search() -> Iterator[None]:
    """Do not search for unreachable cycles in this block, or in the function that this decorates.

    Python searches again and again while objects are made, and visits all of them: a third of the time of a listing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
