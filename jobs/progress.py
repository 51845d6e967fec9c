"""What a person sees while a job runs: a bar where there is a terminal, else a plain line every few seconds.

All of it goes to standard error.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 5.0


class Meter:
    """Counts, and says how far the job is. A task's size is in whatever unit the job measures (bytes, pictures)."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = max(total, 1)
        self.finished = 0
        self.finished_pictures = 0
        self.pictures = 0
        self.rejects = 0
        self.started = time.perf_counter()
        self._last_line = self.started
        self._bar: Progress | None = None

    def task_done(self, size: int, pictures: int, rejects: int) -> None:
        """Count a task that ended."""
        self.finished += size
        self.finished_pictures += pictures
        self.rejects += rejects

    @property
    def share(self) -> float:
        """How much is done, from 0 to 1: by the tasks that ended, and by the pictures of those under way."""
        share = self.finished / self.total
        if self.finished_pictures:
            under_way = max(self.pictures - self.finished_pictures, 0)
            share += under_way * self.finished / self.finished_pictures / self.total
        return min(share, 1.0)

    @property
    def line(self) -> str:
        seconds = time.perf_counter() - self.started
        rate = self.pictures / seconds if seconds else 0.0
        left = f", {duration(seconds / self.share * (1 - self.share))} left" if 0 < self.share < 1 else ""
        return f"{self.pictures:,} pictures {self.what}, {rate:.1f}/s, {self.rejects:,} rejected{left}"

    def tick(self, pictures: int, waiting_for: str) -> None:
        """Show how far the job is; to be called about once a second."""
        self.pictures = max(self.pictures, self.finished_pictures, pictures)
        text = f"waiting for {waiting_for}" if waiting_for else self.line
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.share, text=text)
        elif time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            say(f"{self.share:4.0%}  {text}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, where there is a terminal, for as long as this lasts."""
        console = Console(stderr=True)
        if not console.is_terminal:
            yield
            return
        with Progress(BarColumn(), TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"), console=console) as bar:
            bar.add_task("", total=1.0, text="starting")
            self._bar = bar
            yield
            bar.update(bar.task_ids[0], completed=self.share, text=self.line)


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
