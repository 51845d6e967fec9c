"""The progress of a job on standard error: a bar at a terminal, otherwise a plain line every five seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jobs.messages import PROGRESS
from jobs.throughput import Throughput
from pipeline.wording import count_noun

SECONDS_BETWEEN_LINES = 5.0


class ProgressMeter:
    """Counts and shows the progress of a job. The sizes of its tasks are all in bytes, or all in images or files.

    size_per_image: the size of an image until a task has ended; 0 if it is unknown.
    """

    def __init__(self, verb: str, total: int, size_per_image: float = 0.0) -> None:
        self.verb = verb
        self.total = max(total, 1)
        self.size_per_image = size_per_image
        self.finished = 0
        self.finished_images = 0
        self.images = 0
        self.rejects = 0
        self.throughput = Throughput()
        self.waiting_for = ""
        self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def task_done(self, size: int, images: int, rejects: int) -> None:
        """Count a task that has ended."""
        self.finished += size
        self.finished_images += images
        self.rejects += rejects

    @property
    def share(self) -> float:
        """The completed share, from 0 to 1: by the size of the ended tasks, and by the images of the running ones."""
        size = self.finished / self.finished_images if self.finished_images else self.size_per_image
        running = max(self.images - self.finished_images, 0)
        return min((self.finished + running * size) / self.total, 1.0)

    @property
    def seconds_left(self) -> int | None:
        """The ETA in seconds at the throughput of the last minute; None if it is unknown."""
        rate, share = self.throughput.rate, self.share
        return round(self.images / share * (1 - share) / rate) if rate and share else None

    @property
    def facts(self) -> dict[str, Any]:
        """The values for the record of a run, which are the same as those in `line`."""
        return {
            "images": self.images,
            "images_per_second": self.throughput.rate,
            "seconds_left": self.seconds_left,
            "share": self.share,
            "waiting_for": self.waiting_for,
        }

    @property
    def line(self) -> str:
        """The progress as text."""
        seconds = self.seconds_left
        left = "" if seconds is None or self.share == 1 else f", {format_duration(seconds)} left"
        images = count_noun(self.images, "image")
        return f"{images} {self.verb}, {self.throughput.rate:.1f}/s, {self.rejects:,} rejected{left}"

    def tick(self, images: int, waiting_for: str) -> None:
        """Show the progress. Call this about once per second.

        images: how many are done. waiting_for: the state until the first worker is ready; empty from then on.
        """
        self.waiting_for = waiting_for
        self.images = max(self.images, self.finished_images, images)
        if not waiting_for:  # the time until the first worker is ready does not count for the throughput
            self.throughput.note(self.images)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.share, text=waiting_for or self.line)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            PROGRESS.info("%3.0f%%  %s", 100 * self.share, waiting_for or self.line)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar inside this block if standard error is a terminal."""
        console = Console(stderr=True)
        if not console.is_terminal:
            yield
            return
        with Progress(BarColumn(), TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"), console=console) as bar:
            bar.add_task("", total=1.0, text="starting")
            self._bar = bar
            yield
            bar.update(bar.task_ids[0], completed=self.share, text=self.line)


def format_duration(seconds: float) -> str:
    """Return seconds as text: `2 h 05 min`, `3 min 07 s` or `9 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
