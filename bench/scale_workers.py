"""The simulated workers of `bench.scale`: one process that leaves behind what real workers would.

    python -m bench.scale_workers FD STORE TEMPLATE CACHE_KEY SECONDS

It receives tasks through the connection FD, and answers each with the pickled report of the unit: at once, or after
SECONDS, in which each worker runs one task after the other. The first task of a worker takes a random part of that, so
that the tasks do not all end together.
"""

import heapq
import pickle
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from bench.scale_store import ObjectStore, Template

ROOT = Path(__file__).resolve().parents[1]
Job = tuple[str, str, str]  # the names of the unit, of its path and of its worker
Done = tuple[str, str, bytes]  # the names of the unit and of its worker, and the pickled report


class WorkerProcess:
    """The process of the workers, as the driver sees it."""

    def __init__(self, store: Path, template: Path, cache_key: str, seconds: float) -> None:
        self.connection, other = Pipe()
        arguments = (other.fileno(), store, template, cache_key, seconds)
        command = [sys.executable, "-m", "bench.scale_workers", *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[other.fileno()])
        other.close()

    def send(self, jobs: Sequence[Job]) -> None:
        """Start tasks."""
        self.connection.send(jobs)

    def receive(self, seconds: float) -> list[Done]:
        """Return the tasks that have ended, after at most this time."""
        done: list[Done] = []
        while self.connection.poll(0 if done else seconds):
            done += self.connection.recv()
        return done

    def close(self) -> float:
        """End the process. Returns its CPU seconds."""
        self.connection.close()
        self.process.wait()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime


def serve(connection: Connection, store: ObjectStore, template: Template, cache_key: str, seconds: float) -> None:
    """Run tasks until the driver closes the connection."""
    waiting: list[tuple[float, Job]] = []
    free_at: dict[str, float] = {}
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if connection.poll(pause):
            now = time.monotonic()
            for job in connection.recv():
                worker = job[2]
                share = 1.0 if worker in free_at else random.random()
                free_at[worker] = max(now, free_at.get(worker, now)) + share * seconds
                heapq.heappush(waiting, (free_at[worker], job))
        ended: list[Job] = []
        while waiting and waiting[0][0] <= time.monotonic():
            ended.append(heapq.heappop(waiting)[1])
        if ended:
            store.add_by_rule(entry for unit, _, _ in ended for entry in template.make_objects(cache_key, unit))
            connection.send(
                [(unit, worker, template.copy(template.report, unit, path)) for unit, path, worker in ended]
            )


def main() -> None:
    """Serve one driver."""
    descriptor, store, template, cache_key, seconds = sys.argv[1:]
    loaded = Template.load(Path(template))
    assert pickle.loads(loaded.report).unit == loaded.unit
    try:
        serve(Connection(int(descriptor)), ObjectStore(Path(store), loaded), loaded, cache_key, float(seconds))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
