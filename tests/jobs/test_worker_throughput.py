"""The images of each worker over time: no image is lost or counted twice, however often intervals are merged."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.executor import WorkerProgress
from jobs.worker_throughput import MAX_COUNTS, MAX_INTERVALS, MIN_INTERVALS, WorkerThroughput
from tests.jobs.test_metadata import write_images

Command = Callable[..., tuple[int, str, str]]


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seed", range(20))
def test_each_image_is_counted_in_its_interval(seed: int) -> None:
    """Workers start and end at any time. The images of each interval are counted again from all events."""
    rng, clock = random.Random(seed), Clock()
    throughput = WorkerThroughput(clock)
    images, events = Counter[str](), list[tuple[float, str, int]]()
    for _ in range(rng.randrange(1, 400)):
        clock.now += rng.choice([0.3, 1.0, 2.5, rng.random() * 40])
        running = [f"worker-{number}" for number in range(5) if rng.random() < 0.7]
        for name in running:
            done = rng.randrange(9)
            images[name] += done
            events.append((clock.now, name, done))
        throughput.note({name: WorkerProgress(images[name], images[name] / 4) for name in running})
    found = throughput.describe()
    expected = Counter[tuple[str, int]]()
    for at, name, done in events:
        expected[name, int(at / found["seconds"])] += done
    actual = Counter(
        {
            (name, worker["first"] + number): count
            for name, worker in found["workers"].items()
            for number, count in enumerate(worker["images"])
        }
    )
    assert +actual == +expected
    assert {name: worker["busy_seconds"] for name, worker in found["workers"].items()} == {
        name: count / 4 for name, count in images.items()
    }
    assert clock.now / found["seconds"] < MAX_INTERVALS


@pytest.mark.parametrize("workers", [1, 300, 2500])
def test_the_record_stays_small(workers: int) -> None:
    clock = Clock()
    throughput = WorkerThroughput(clock)
    for minute in range(100):
        clock.now = 60.0 * minute
        throughput.note({f"worker-{number} on host": WorkerProgress(20 * minute, 1.0) for number in range(workers)})
    counts = [worker["images"] for worker in throughput.describe()["workers"].values()]
    assert len(counts) == workers and {sum(each) for each in counts} == {20 * 99}
    assert len(counts[0]) <= MAX_INTERVALS
    assert sum(map(len, counts)) <= max(MAX_COUNTS, MIN_INTERVALS * workers)
    assert len(counts[0]) > MIN_INTERVALS / 2, "half of the intervals, right after they were merged"


@pytest.mark.parametrize("verb", ["encode", "retry"])
def test_runs_record_what_their_workers_did(encode: Command, latentmill: Command, tmp_path: Path, verb: str) -> None:
    source, cache = write_images(tmp_path / "photos", *(f"{number}.jpg" for number in range(6))), tmp_path / "c"
    intact = (source / "0.jpg").read_bytes()
    for name in ("2.jpg", "5.jpg"):
        (source / name).write_bytes(b"no image")
    assert encode(source, "--max-reject-rate", 1)[0] == 0
    if verb == "retry":
        for name in ("2.jpg", "5.jpg"):
            (source / name).write_bytes(intact)
        assert latentmill("retry", cache, "--workers", 0)[0] == 0
    (run,) = [run for run in read_runs(cache) if run["verb"] == verb]
    (worker,) = run["throughput"]["workers"].values()
    assert sum(worker["images"]) == run["counts"]["encoded"] == {"encode": 4, "retry": 2}[verb]
    assert worker["busy_seconds"] > 0 and 0 < run["device_busy"] <= 1
    assert run["images_per_second"] > 0
    assert sum(run["rejects"].values()) == {"encode": 2, "retry": 0}[verb]


def read_runs(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in cache.glob("_runs/*.json")]
