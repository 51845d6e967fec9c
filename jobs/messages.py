"""What a job says: lines on standard error, and the same lines kept for the run's log in the cache.

At a terminal lines are plain. Elsewhere each begins with its time and level, as a batch system's log needs them.
"""

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

LOGGER = logging.getLogger("latentmill")
PROGRESS = logging.getLogger("latentmill.progress")  # shown, but not kept: the run's record has the counts

FIRST_BYTES, LAST_BYTES = 64 << 10, 192 << 10  # what is kept of a run's messages
LEAST_SECRET = 6  # characters; a shorter value would hide ordinary words
AT_MOST = 20  # messages of one kind


class StderrHandler(logging.Handler):
    """Writes to whatever standard error is at that moment: a progress bar puts its own stream there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = format_plain(record) if sys.stderr.isatty() else format_line(record)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # a closed pipe, say: the job goes on without its messages
            self.handleError(record)


class RunLogHandler(logging.Handler):
    """Keeps a run's messages as the lines of its log: the first ones and the last ones, at most 256 KiB.

    secrets: texts that are not written down, whoever's message they are in.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self.secrets = sorted((text for text in secrets if len(text) >= LEAST_SECRET), key=len, reverse=True)
        self._first: list[bytes] = []
        self._last: deque[bytes] = deque()
        self._room = FIRST_BYTES
        self._last_bytes = self._left_out = 0
        self.addFilter(lambda record: record.name != PROGRESS.name)

    def emit(self, record: logging.LogRecord) -> None:
        text = format_line(record, utc=True)
        for secret in self.secrets:
            text = text.replace(secret, "***")
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
            self._left_out += 1

    def add(self, text: str, level: int = logging.INFO) -> None:
        """Keep a line that is not shown."""
        self.handle(LOGGER.makeRecord(LOGGER.name, level, "", 0, text, (), None))

    @property
    def content(self) -> bytes:
        """The log's bytes."""
        with self.lock:  # type: ignore[union-attr]
            gap = [f"... {self._left_out} lines left out ...\n".encode()] if self._left_out else []
            return b"".join([*self._first, *gap, *self._last])


def collect_secrets(*options: Mapping[str, Any]) -> set[str]:
    """The texts that must not be written down: values of storage options, and what the environment has for stores."""
    found = {value for name, value in os.environ.items() if re.search("SECRET|TOKEN|PASSWORD|ACCOUNT_KEY", name)}
    left: list[Any] = list(options)
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, str) and "://" not in value:  # an endpoint is no secret
            found.add(value)
    return found


def format_line(record: logging.LogRecord, utc: bool = False) -> str:
    """A message with its time (local, or in UTC with a Z) and its level."""
    convert, zone = (time.gmtime, "Z") if utc else (time.localtime, "")
    at = time.strftime("%Y-%m-%d %H:%M:%S", convert(record.created))
    return f"{at}{zone} {record.levelname} {record.getMessage()}"


def format_plain(record: logging.LogRecord) -> str:
    """Return a message as a terminal shows it: without time and level, but a note or a warning says that it is one."""
    kind = "warning" if record.levelno == logging.WARNING else getattr(record, "kind", "")
    return f"{kind}: {record.getMessage()}" if kind else record.getMessage()


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


def shown_level() -> int:
    """The least level of what is shown."""
    return _ours.level


def configure_logging(verbose: bool) -> None:
    """Show messages on standard error. verbose: those for debugging and the warnings of other libraries, too."""
    _ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    _others.setLevel(logging.WARNING if verbose else logging.CRITICAL + 1)
    logging.captureWarnings(True)


_ours, _others = StderrHandler(logging.INFO), StderrHandler(logging.CRITICAL + 1)
LOGGER.addHandler(_ours)
LOGGER.setLevel(logging.DEBUG)
LOGGER.propagate = False
logging.getLogger().addHandler(_others)  # without one, Python would print them
