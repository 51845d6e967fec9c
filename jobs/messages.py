"""The messages of a job: lines on standard error, and the same lines in the log of the run in the cache.

At a terminal lines are plain. Otherwise each begins with its time and level, as the log of a batch system needs them.
A message may contain the name of any file, so control characters are escaped.
"""

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.text import printable_lines

LOGGER = logging.getLogger("latentmill")
PROGRESS = logging.getLogger("latentmill.progress")  # shown, but not in the log of the run: its record has the counts

FIRST_BYTES, LAST_BYTES = 64 << 10, 192 << 10  # of the messages in the log of a run
LEAST_SECRET = 6  # characters; a shorter value would hide ordinary words
AT_MOST = 20  # messages of one kind that are shown


class StderrHandler(logging.Handler):
    """Writes to `sys.stderr` as it is at that moment: a progress bar replaces it with its own stream."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = format_plain(record) if sys.stderr.isatty() else format_line(record)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # such as a closed pipe: the job continues without its messages
            self.handleError(record)


class RunLogHandler(logging.Handler):
    """Keeps the messages of a run as the lines of its log: the first and the last ones, at most 256 KiB.

    secrets: texts that are replaced by `***` in every message, including those of other libraries.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self.secrets = sorted((text for text in secrets if len(text) >= LEAST_SECRET), key=len, reverse=True)
        self._first: list[bytes] = []
        self._last: deque[bytes] = deque()
        self._room = FIRST_BYTES
        self._last_bytes = self._dropped = 0
        self.addFilter(lambda record: record.name != PROGRESS.name)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.redact(format_line(record, utc=True))
        line = text.encode(errors="backslashreplace")[: FIRST_BYTES - 1] + b"\n"
        if self._room >= len(line):
            self._first.append(line)
            self._room -= len(line)
            return
        self._room = 0
        self._last.append(line)
        self._last_bytes += len(line)
        while self._last_bytes > LAST_BYTES:
            self._last_bytes -= len(self._last.popleft())
            self._dropped += 1

    def redact(self, text: str) -> str:
        """Return a text without the secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def add(self, text: str, level: int = logging.INFO) -> None:
        """Add a line to the log that is not shown on standard error."""
        self.handle(LOGGER.makeRecord(LOGGER.name, level, "", 0, text, (), None))

    @property
    def content(self) -> bytes:
        """The log, as UTF-8. It names the number of lines that were dropped in the middle."""
        with self.lock:  # type: ignore[union-attr]
            gap = [f"... {self._dropped} lines left out ...\n".encode()] if self._dropped else []
            return b"".join([*self._first, *gap, *self._last])


def collect_secrets(*options: Mapping[str, Any]) -> set[str]:
    """Return the texts that a log must not contain: values of storage options, and secrets in environment variables."""
    secrets = {value for name, value in os.environ.items() if re.search("SECRET|TOKEN|PASSWORD|ACCOUNT_KEY", name)}
    values: list[Any] = list(options)
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, str) and "://" not in value:  # an endpoint is not a secret
            secrets.add(value)
    return secrets


def format_line(record: logging.LogRecord, utc: bool = False) -> str:
    """Return a message with its time (local, or in UTC with a Z) and its level."""
    convert, zone = (time.gmtime, "Z") if utc else (time.localtime, "")
    at = time.strftime("%Y-%m-%d %H:%M:%S", convert(record.created))
    return f"{at}{zone} {record.levelname} {printable_lines(record.getMessage())}"


def format_plain(record: logging.LogRecord) -> str:
    """Return a message as a terminal shows it: without time and level, with a prefix if it is a note or a warning."""
    kind = "warning" if record.levelno == logging.WARNING else getattr(record, "kind", "")
    text = printable_lines(record.getMessage())
    return f"{kind}: {text}" if kind else text


def log_debug(text: str) -> None:
    """Log a line that only `--verbose` shows."""
    LOGGER.debug("%s", text)


def log_info(text: str) -> None:
    """Log a line about the job's progress."""
    LOGGER.info("%s", text)


def log_note(text: str) -> None:
    """Log a line about something the user may not expect, but need not act on. Its level is INFO."""
    LOGGER.info("%s", text, extra={"kind": "note"})


def log_warning(text: str) -> None:
    """Log a line about a result that the user should check."""
    LOGGER.warning("%s", text)


def log_error(text: str) -> None:
    """Log a line about work that failed."""
    LOGGER.error("%s", text)


def log_each(texts: Sequence[str], log: Callable[[str], None]) -> None:
    """Log each of these messages of one kind with `log`; after the first 20, only how many more there are."""
    for text in texts[:AT_MOST]:
        log(text)
    if len(texts) > AT_MOST:
        log(f"... and {len(texts) - AT_MOST:,} more like these")


def get_shown_level() -> int:
    """Return the lowest level that is shown."""
    return _own_handler.level


def configure_logging(verbose: bool) -> None:
    """Show messages on standard error. verbose: include debug messages and the warnings of other libraries."""
    _own_handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    _library_handler.setLevel(logging.WARNING if verbose else logging.CRITICAL + 1)
    logging.captureWarnings(True)


_own_handler, _library_handler = StderrHandler(logging.INFO), StderrHandler(logging.CRITICAL + 1)
LOGGER.addHandler(_own_handler)
LOGGER.setLevel(logging.DEBUG)
LOGGER.propagate = False
logging.getLogger().addHandler(_library_handler)  # without a handler, Python prints them
