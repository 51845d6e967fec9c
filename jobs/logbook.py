"""A run's record in the cache, kept while a job works: how it began, that it lives, and how it ended.

It is for people, and for a second job on a store that cannot keep two apart. Where it cannot be written any more, that
is said, and the job goes on.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.drive import Signals
from jobs.progress import say
from pipeline import runs
from pipeline.errors import JobError, Stopped, StorageError
from pipeline.runs import Run

SECONDS_BETWEEN = 30.0  # signs of life


class Logbook:
    """Writes a run's record. facts: what is known of its work so far."""

    def __init__(self, run: Run, signals: Signals, facts: Callable[[], dict[str, Any]]) -> None:
        self.run, self.signals, self.facts = run, signals, facts
        self.written = time.perf_counter()

    def begin(self, weak: bool, **facts: Any) -> None:
        """Write the first entry. weak: the store lets several writers win.

        Raises JobError where another run is at work on such a store. Both say so first, and then look.
        """
        self.run.write(conditional_creates=not weak, **facts)
        if not weak:
            return
        url = self.run.cache.url
        has_no = "conditional creates" if "://" in url else "hard links"
        say(f"note: {url} has no {has_no}: one job at a time, and parts are read again at the end")
        if others := runs.alive(self.run.cache, but=self.run.name):
            raise JobError(
                f"a run that started {others[0]} is at work on {url}, whose storage does not keep two jobs apart; "
                f"wait for its end, or {runs.SILENT} s after it died"
            )

    def beat(self) -> None:
        """Give a sign of life, if the last one is a while ago."""
        if time.perf_counter() - self.written > SECONDS_BETWEEN:
            self.written = time.perf_counter()
            with _said():
                self.run.write(**self.facts())

    def ended(self, outcome: str, code: int) -> None:
        """Write how the run ended: done, failed or stopped."""
        with _said():
            self.run.end(outcome, code, **self.facts())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write how the run ended where something ends it inside this block; a good end is the block's own to write."""
        try:
            yield
        except Stopped:
            self.ended("stopped", self.signals.exit_code)
            raise
        except BaseException:
            self.ended("failed", 1)
            raise


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        say(f"note: {error}")
