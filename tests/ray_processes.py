"""The processes of a Ray that this machine runs."""

from collections.abc import Iterator
from pathlib import Path


def list_descendants(pid: int) -> Iterator[int]:
    """Yield the ids of all descendants of a process, from /proc."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from list_descendants(int(child))


def find_actors(ancestor: int) -> list[int]:
    """Return the ids of the actor processes below the process that started their Ray."""
    pids = []
    for pid in list_descendants(ancestor):
        try:
            if b"ray::RayWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(pid)
        except OSError:  # the process has ended
            continue
    return pids
