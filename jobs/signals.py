"""How SIGINT and SIGTERM end a job."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.messages import log_info
from pipeline.errors import Stopped


class Signals:
    """Whether a signal has asked the job to stop, and which one.

    While the loop of `run_tasks` polls `check`, a signal is only recorded. At any other time it raises Stopped at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.stop = threading.Event()
        self._is_polled = False

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it."""
        return 128 + self.number

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.stop.is_set():
            raise Stopped

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the workers
        if self.number:
            return
        self.number = number
        self.stop.set()
        if not self._is_polled:
            raise Stopped

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside this block."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Record signals inside this block without raising them. The block must call `check` often."""
        self._is_polled = True
        try:
            yield
        finally:
            self._is_polled = False


def run_with_signals(job: Callable[[Signals], int], message: str) -> int:
    """Run a job and return its exit code, or the exit code of the signal that ended it.

    message: printed after "stopped; " if a signal ends the job.
    """
    signals = Signals()
    try:
        with signals.caught():
            return job(signals)
    except Stopped:
        log_info(f"stopped; {message}")
        return signals.exit_code


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Keep the job's handler of SIGTERM inside this block.

    `ray.init` installs a handler that ends the process with exit code 15. After `ray.shutdown` the signal ends the
    process as well.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as request:  # raised by Ray's handler while it was installed
        signal.signal(signal.SIGTERM, handler)
        if request.code != signal.SIGTERM:
            raise
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)
