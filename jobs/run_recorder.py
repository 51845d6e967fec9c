"""Write the record and the log of a run into the cache: its start, a heartbeat, its end and its messages.

Users read them, and so does a second job on a store that does not support concurrent writers. If the record cannot be
written any more, a warning is logged and the job continues. A separate thread writes the record, so that the heartbeat
does not depend on the job's main thread.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jobs.executor import format_error
from jobs.messages import LOGGER, RunLogHandler, get_shown_level, log_each, log_error, log_note, log_warning
from jobs.scheduler import Failure
from jobs.signals import Signals
from pipeline.cache import runs
from pipeline.cache.runs import Run
from pipeline.errors import JobError, LatentmillError, Stopped, StorageError
from pipeline.wording import count_noun

FIRST_SECONDS = 4.0  # before the second entry: whoever watches a job that has just begun should soon see its units
HEARTBEAT_SECONDS = 30.0  # between two entries, after a few shorter intervals
WARNING_SECONDS = 600.0  # between two warnings that the record cannot be written


class RunRecorder:
    """Writes a run's record and its log.

    secrets: texts that are removed from the log.
    """

    def __init__(self, run: Run, signals: Signals, secrets: Iterable[str] = ()) -> None:
        self.run, self.signals = run, signals
        self._messages = RunLogHandler(secrets)
        self._log_written = b""
        self._facts: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._is_over = threading.Event()
        self._warned_at: float | None = None

    def begin(self, single_writer: bool) -> None:
        """Write the first entry, some after 4, 12 and 28 seconds, and one every 30 seconds from then on.

        single_writer: the store does not support concurrent writers.
        Raises JobError if another run is writing to such a store. Each run writes its record first and checks for
        others afterwards, so two runs that start together cannot miss each other.
        """
        self._messages.add(f"{self.run.content['verb']} with latentmill {self.run.content['versions']['latentmill']}")
        with self._writing:
            self.run.write(conditional_creates=not single_writer)
        threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True).start()
        if not single_writer:
            return
        url = self.run.cache.url
        missing = "conditional creates" if "://" in url else "hard links"
        log_note(f"{url} has no {missing}: run one job at a time; parts are read again at the end")
        if others := runs.find_alive(self.run.cache, exclude=self.run.name):
            raise JobError(
                f"another run (started {others[0]}) is writing to {url}, and this store does not support concurrent "
                f"writers; wait for it to finish, or for {runs.DEAD_AFTER} s if it crashed"
            )

    def update(self, **facts: Any) -> None:
        """Add facts to the next entry. Cheap: nothing is written now."""
        self._facts = {**self._facts, **facts}  # a new dict, because the thread may be reading the old one

    def log_only(self, text: str) -> None:
        """Add a line to the log without showing it."""
        self._messages.add(text)

    def note_error(self, text: str) -> None:
        """Add the reason of a failure to the next entry."""
        self.update(error=self._messages.redact(text))

    def note_failures(self, failures: Sequence[Failure]) -> None:
        """Log the units that failed for good, and add the first error to the next entry."""
        log_each([f"failed: unit {failure.name}: {failure.error}" for failure in failures], log_error)
        if failures:
            self.note_error(f"{count_noun(len(failures), 'unit')} failed: {failures[0].error}")

    def end(self, outcome: str, code: int) -> None:
        """Write the last entry. outcome: done, failed or stopped. code: the exit code."""
        self._messages.add(f"{outcome}, exit code {code}")
        with self._writing:
            self._is_over.set()
            self._write_log()
            with self._warnings_for_failures():
                self.run.end(outcome, code, **self._facts)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Add all messages of this block to the log, and write the last entry if an error or a signal ends the block.

        The block itself calls `end` after a success.
        """
        sources = (LOGGER, logging.getLogger())  # the second has the messages of other libraries
        self._messages.setLevel(get_shown_level())
        for source in sources:
            source.addHandler(self._messages)
        try:
            yield
        except Stopped:
            self.end("stopped", self.signals.exit_code)
            raise
        except BaseException as error:
            self._messages.add(format_error(error), logging.ERROR)
            self.note_error(format_error(error))
            self.end("failed", error.exit_code if isinstance(error, LatentmillError) else 1)
            raise
        finally:
            self._is_over.set()
            for source in sources:
                source.removeHandler(self._messages)

    def _write_heartbeats(self) -> None:
        seconds = min(FIRST_SECONDS, HEARTBEAT_SECONDS)
        while not self._is_over.wait(seconds):
            seconds = min(2 * seconds, HEARTBEAT_SECONDS)
            with self._writing:
                if self._is_over.is_set():  # the last entry was written while this thread waited
                    return
                self._write_log()
                with self._warnings_for_failures():
                    self.run.write(**self._facts)

    def _write_log(self) -> None:
        """Write the log if it has changed. It is written before the record, which contains its sha256."""
        content = self._messages.content
        if content != self._log_written:
            with self._warnings_for_failures():
                self.run.write_log(content)
                self._log_written = content

    @contextmanager
    def _warnings_for_failures(self) -> Iterator[None]:
        """Continue after an error of the storage inside this block, and log it at most every ten minutes."""
        try:
            yield
        except StorageError as error:
            if self._warned_at is None or time.monotonic() - self._warned_at > WARNING_SECONDS:
                self._warned_at = time.monotonic()
                log_warning(str(error))
