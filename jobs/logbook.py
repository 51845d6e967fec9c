"""A run's record in the cache, kept while a job works: how it began, that it lives, how it ended, and what it said.

It is for people, and for a second job on a store that cannot keep two apart. Where it cannot be written any more, that
is said, and the job goes on. A thread of its own writes it, so that a run shows that it lives whatever it is doing.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.engine import format_error
from jobs.messages import LOGGER, RunLogHandler, shown_level
from jobs.progress import log_info
from jobs.run_units import Signals
from pipeline.cache import runs
from pipeline.cache.runs import Run
from pipeline.errors import JobError, LatentmillError, Stopped, StorageError

HEARTBEAT_SECONDS = 30.0  # signs of life
SECONDS_BETWEEN_WARNINGS = 600.0  # that the record cannot be written


class RunRecorder:
    """Writes a run's record and its log. secrets: texts that the log must not hold."""

    def __init__(self, run: Run, signals: Signals, secrets: Iterable[str] = ()) -> None:
        self.run, self.signals = run, signals
        self._messages = RunLogHandler(secrets)
        self._log_written = b""
        self._facts: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._noted: float | None = None

    def begin(self, single_writer: bool) -> None:
        """Write the first entry, then one every 30 seconds.

        single_writer: the store does not support concurrent writers.

        Raises JobError where another run is at work on such a store. Both say so first, and then look.
        """
        self._messages.add(f"{self.run.content['verb']} with latentmill {self.run.content['versions']['latentmill']}")
        with self._writing:
            self.run.write(conditional_creates=not single_writer)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        if not single_writer:
            return
        url = self.run.cache.url
        has_no = "conditional creates" if "://" in url else "hard links"
        log_info(f"note: {url} has no {has_no}: one job at a time, and parts are read again at the end")
        if others := runs.find_alive(self.run.cache, exclude=self.run.name):
            raise JobError(
                f"a run that started {others[0]} is at work on {url}, whose storage does not keep two jobs apart; "
                f"wait for its end, or {runs.DEAD_AFTER} s after it died"
            )

    def tell(self, **facts: Any) -> None:
        """Have the next entry say this, too. Cheap: nothing is written now."""
        self._facts = {**self._facts, **facts}  # a new dict, which the thread may be reading meanwhile

    def keep(self, text: str) -> None:
        """Put a line into the log that is not shown."""
        self._messages.add(text)

    def ended(self, outcome: str, code: int) -> None:
        """Write how the run ended: done, failed or stopped. Nothing is written after that."""
        self._messages.add(f"{outcome}, exit code {code}")
        with self._writing:
            self._over.set()
            self._write_log()
            with self._failures_noted():
                self.run.end(outcome, code, **self._facts)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write how the run ended where something ends it inside this block; a good end is the block's own to write.

        What is said in the block goes into the run's log.
        """
        sources = (LOGGER, logging.getLogger())  # other libraries' messages, too
        self._messages.setLevel(shown_level())
        for source in sources:
            source.addHandler(self._messages)
        try:
            yield
        except Stopped:
            self.ended("stopped", self.signals.exit_code)
            raise
        except BaseException as error:
            self._messages.add(format_error(error), logging.ERROR)
            self.ended("failed", error.exit_code if isinstance(error, LatentmillError) else 1)
            raise
        finally:
            self._over.set()
            for source in sources:
                source.removeHandler(self._messages)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            with self._writing:
                if self._over.is_set():  # the end was written while this waited
                    return
                self._write_log()
                with self._failures_noted():
                    self.run.write(**self._facts)

    def _write_log(self) -> None:
        """Write the log, if there is more to write; before the record, which has its sha256."""
        content = self._messages.content
        if content != self._log_written:
            with self._failures_noted():
                self.run.write_log(content)
                self._log_written = content

    @contextmanager
    def _failures_noted(self) -> Iterator[None]:
        """Go on where the storage refuses, and say so once in a while."""
        try:
            yield
        except StorageError as error:
            if self._noted is None or time.monotonic() - self._noted > SECONDS_BETWEEN_WARNINGS:
                self._noted = time.monotonic()
                log_info(f"note: {error}")
