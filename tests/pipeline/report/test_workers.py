"""The throughput of the workers on the page, from records of runs: planted, damaged and hostile ones."""

import math
import re
from typing import Any

import numpy as np
import pytest

from jobs.executor import WorkerProgress
from jobs.worker_throughput import WorkerThroughput
from pipeline.report.plots import MAX_LINES, MAX_ROWS, draw_workers
from pipeline.report.workers import find_slow_workers, read_worker_rates


def record_run(rates: list[float], seconds: int = 400, late: int = 0) -> dict[str, Any]:
    """Return the record of a run in which each worker encoded this many images per second.

    late: the second from which on the first worker ran.
    """
    now = 0.0
    throughput = WorkerThroughput(lambda: now)
    starts = [late, *[0] * len(rates)]
    for second in range(seconds):
        now = float(second)
        running = [(number, rate) for number, rate in enumerate(rates) if second >= starts[number]]
        throughput.note(
            {
                f"worker-{number} on host": WorkerProgress(int(rate * (second - starts[number])), second / 2)
                for number, rate in running
            }
        )
    return {"throughput": throughput.describe()}


def find_slow(run: dict[str, Any]) -> list[str]:
    return [example.key for finding in find_slow_workers(read_worker_rates([run])) for example in finding.examples]


def test_a_slow_worker_is_named() -> None:
    assert find_slow(record_run([5.0, 4.0, 6.0, 5.0, 2.0])) == ["worker-4 on host"]
    assert find_slow(record_run([5.0, 4.0, 6.0, 5.0, 3.0])) == [], "others are nearly as slow"
    assert find_slow(record_run([5.0, 4.0, 6.0, 5.0, 2.0], seconds=50)) == [], "the run was too short"
    assert find_slow(record_run([5.0, 4.0, 2.0])) == [], "there are too few workers"
    assert find_slow(record_run([5.0, 5.0, 1.0, 1.0, 5.0])) == [], "many are slow: they are of two kinds"
    assert find_slow(record_run([0.1, 0.1, 0.1, 0.1, 0.01])) == [], "there are too few images"
    assert find_slow(record_run([5.0] * 5, late=300)) == [], "a worker that began late is not slow"


def test_the_rates_are_those_of_the_workers() -> None:
    rates = read_worker_rates([{"verb": "encode"}, record_run([1.0]), record_run([8.0, 4.0], late=200)])
    assert rates is not None
    assert list(rates.names) == ["worker-1 on host", "worker-0 on host"], "the run with the most images"
    assert rates.mean == pytest.approx([4.0, 8.0], rel=0.06)
    assert rates.images.tolist() == [4 * 399, 8 * 199]
    assert np.isnan(rates.counts[1]).any() and not np.isnan(rates.counts[0]).any()


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.clear(),
        lambda found: found.update(workers=[]),
        lambda found: found.update(workers={"a": {"first": 0, "images": ["x"], "busy_seconds": 0}}),
        lambda found: found.update(workers={"a": {"first": 10**9, "images": [1], "busy_seconds": 0}}),
        lambda found: found.update(workers={"a": {"first": -5, "images": [1], "busy_seconds": 0}}),
        lambda found: found.update(seconds=0),
        lambda found: found.update(elapsed=math.inf),
        lambda found: found.update(elapsed=1e12),
    ],
)
def test_damaged_records_are_skipped(damage: Any) -> None:
    run = record_run([1.0, 2.0])
    damage(run["throughput"])
    assert read_worker_rates([run]) is None


@pytest.mark.parametrize("workers", [1, 2, MAX_LINES, MAX_LINES + 1, 3 * MAX_ROWS])
def test_names_of_workers_are_only_text(workers: int) -> None:
    run = record_run([3.0] * workers, seconds=30)
    hostile = "<script>alert(1)</script> $x^2$ & \"'"
    found = run["throughput"]["workers"]
    run["throughput"]["workers"] = {f"{hostile} {name}": value for name, value in found.items()}
    rates = read_worker_rates([run])
    assert rates is not None
    svg = draw_workers(rates)
    assert "<script" not in svg and "&lt;script&gt;alert(1)&lt;/script&gt; $x^2$ &amp;" in svg
    assert len(svg) < 200_000
    assert len(re.findall(r"worker-\d+", svg)) >= min(workers, MAX_ROWS if workers > MAX_LINES else 1)
