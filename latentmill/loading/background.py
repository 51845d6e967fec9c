"""An iterator whose items are made ahead by a thread."""

import threading
import weakref
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from latentmill.errors import UsageError

Item = TypeVar("Item")
_PATIENCE = 10.0  # seconds to wait for the thread, which may be within a request


class _Channel(Generic[Item]):
    """What the thread and the reader share. A result is an item, an error, or None at the end."""

    def __init__(self, ahead: int) -> None:
        self.results: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
        self.free = threading.Semaphore(ahead)
        self.is_closed = False


class Background(Iterator[Item]):
    """Iterates over what a generator yields in a thread, up to `ahead` items before they are taken.

    An error of the generator is raised in its place. Nothing starts before the first item is asked for. The thread ends
    with `close`, with the last reference to this object, and before the interpreter exits.
    """

    def __init__(self, items: Generator[Item, None, None], ahead: int) -> None:
        self._channel = _Channel[Item](ahead)
        self._thread = threading.Thread(
            target=_fill, args=(items, self._channel), name="latentmill-loader", daemon=True
        )
        self._is_over = False
        self.close = weakref.finalize(self, _stop, self._channel, self._thread)

    def __next__(self) -> Item:
        if self._is_over:
            raise StopIteration
        if self._channel.is_closed:
            raise UsageError("the loader was closed, or moved to another place, during this loop: start a new loop")
        if self._thread.ident is None:
            self._thread.start()
        result = self._channel.results.get()
        if isinstance(result, tuple):
            self._channel.free.release()
            return result[0]
        self._is_over = True
        if result is None:
            raise StopIteration
        raise result


def _fill(items: Generator[Item, None, None], channel: _Channel[Item]) -> None:
    """Put the items of a generator into a channel while it has room."""
    try:
        while True:
            channel.free.acquire()
            if channel.is_closed:
                return
            channel.results.put((next(items),))
    except StopIteration:
        channel.results.put(None)
    except BaseException as error:
        channel.results.put(error)
    finally:
        items.close()


def _stop(channel: _Channel[Item], thread: threading.Thread) -> None:
    channel.is_closed = True
    channel.free.release()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(_PATIENCE)
