"""The log of a worker that was lost."""

from collections import deque

LOG_LINES = 20  # shown of a lost worker's log


def read_log_tail(path: str) -> list[str]:
    """Return the last lines of a log, without Ray's own lines. They are empty if the log cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = deque(file, 4 * LOG_LINES)
    except OSError:
        return []
    return [line.rstrip()[:300] for line in lines if line.strip() and not line.startswith(":")][-LOG_LINES:]
