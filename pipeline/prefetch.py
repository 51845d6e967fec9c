"""A bounded look-ahead on a thread pool: calls run concurrently, and their results come in order."""

import concurrent.futures
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def map_in_order(
    pool: Executor,
    function: Callable[[In], Out],
    items: Iterable[In],
    window: int,
    wait: Callable[["Future[Out]"], Out] = Future.result,
    weight: Callable[[In], int] = lambda item: 0,
    budget: int = 0,
) -> Iterator[Out]:
    """Yield the results of `map(function, items)` in order, with up to `window` calls in progress.

    Items are taken in the caller's thread, one per yielded result, so `window` bounds the memory. `budget` bounds it
    too: the weights of all items in progress but the last do not exceed it together.
    wait: waits for a call to end, and returns its result.
    """
    running: deque[Future[Out]] = deque()
    weights: deque[int] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            weights.append(weight(item))
            while len(running) >= window or sum(weights) > budget:
                weights.popleft()
                yield wait(running.popleft())
        while running:
            yield wait(running.popleft())
    finally:
        uncancelled = [future for future in running if not future.cancel()]
        concurrent.futures.wait(uncancelled)  # the caller may close their resources next


class Peekable(Iterator[In]):
    """An iterator that can show its next item without taking it."""

    def __init__(self, items: Iterable[In]) -> None:
        self._items = iter(items)
        self._next: list[In] = []

    def __next__(self) -> In:
        return self._next.pop() if self._next else next(self._items)

    @property
    def is_done(self) -> bool:
        """Whether no item is left."""
        return self.peek() is None

    def peek(self) -> In | None:
        """Return the next item without taking it, or None at the end."""
        if not self._next:
            try:
                self._next.append(next(self._items))
            except StopIteration:
                return None
        return self._next[0]
