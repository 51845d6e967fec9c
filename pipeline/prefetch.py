"""The one place where steps run at the same time: a bounded look-ahead on a pool of threads."""

import concurrent.futures
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(
    pool: Executor,
    function: Callable[[In], Out],
    items: Iterable[In],
    window: int,
    wait: Callable[["Future[Out]"], Out] = Future.result,
    weight: Callable[[In], int] = lambda item: 0,
    budget: int = 0,
) -> Iterator[Out]:
    """`map(function, items)` with up to `window` calls under way: the same results, in the same order.

    Items are taken in the caller's thread, one whenever a result is handed out, so memory is bounded by `window`; and
    by `budget`, which the weights of all but the last item under way do not exceed together.
    wait: gets a call's result, once the call has ended.
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
        left = [each for each in running if not each.cancel()]
        concurrent.futures.wait(left)  # what they use may be closed next


class Peekable(Iterator[In]):
    """An iterator that can be asked whether anything is left."""

    def __init__(self, items: Iterable[In]) -> None:
        self._items = iter(items)
        self._next: list[In] = []

    def __next__(self) -> In:
        return self._next.pop() if self._next else next(self._items)

    @property
    def is_done(self) -> bool:
        return self.peek() is None

    def peek(self) -> In | None:
        """What comes next, and stays; None at the end."""
        if not self._next:
            try:
                self._next.append(next(self._items))
            except StopIteration:
                return None
        return self._next[0]
