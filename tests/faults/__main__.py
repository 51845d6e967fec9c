"""Runs every row of the fault table a number of times, and writes docs/faults.md.

LATENTMILL_TEST_S3=ceph python -m tests.faults --times 3 [--once-below ROW]
"""

import argparse
import datetime
import os
import platform
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/faults.md"

HEAD = """\
# Faults that were tried

Written by `LATENTMILL_TEST_S3={store} python -m tests.faults --times {times}{once}` on {date}, {machine},
Python {python}.
Each row is one or more tests that bring the fault about while a job runs: over HTTP on an S3 server ({store}) with a
proxy before it, on Ray clusters of one or two nodes, or on disk. After each the cache must have every sample once, as a
row or a reject, by a count with pyarrow and tarfile alone, every file must be what was committed, and the digest that
of a run that nothing disturbed. Where the fault must end the job: its exit code, its message, and that the same command
goes on. Kills at random moments: [benchmarks.md](benchmarks.md#kills-and-sick-workers).

| row | fault | test | passed | seconds |
|---|---|---|---|---|
"""


class Collector:
    """A pytest plugin: what became of each test with a `fault` mark."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {}
        self.passed: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.runs: dict[str, int] = defaultdict(int)
        self.least = 0  # rows below this one are left out

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._row(item) >= self.least]

    def _row(self, item: pytest.Item) -> int:
        mark = item.get_closest_marker("fault")
        return int(mark.args[0]) if mark else -1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if mark := item.get_closest_marker("fault"):
                self.rows[item.nodeid] = mark.args
                self.runs[item.nodeid] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call":
            self.passed[report.nodeid] += report.passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--once-below", type=int, default=0, metavar="ROW", help="rows below this one run once only")
    parser.add_argument("-k", default="", help="as pytest's: only some")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = Collector()
    argv = ["-q", "-m", "fault", "--timeout", "600", "-p", "no:cacheprovider", str(ROOT / "tests")]
    argv += ["-k", options.k] if options.k else []
    for number in range(options.times):
        found.least = options.once_below if number else 0
        pytest.main(argv, plugins=[found])
    lines = [
        f"| {row} | {what} | `{name.split('::', 1)[1]}` | {found.passed[name]} of {found.runs[name]} | "
        f"{found.seconds[name] / found.runs[name]:.0f} |\n"
        for name, (row, what) in sorted(found.rows.items(), key=lambda item: item[1][0])
    ]
    head = HEAD.format(
        times=options.times,
        once=f" --once-below {options.once_below}" if options.once_below else "",
        store=os.environ.get("LATENTMILL_TEST_S3", "moto"),
        date=datetime.date.today().isoformat(),
        machine=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )
    print(head + "".join(lines))
    if not options.k:
        PAGE.write_text(head + "".join(lines), encoding="utf-8")
    return 0 if all(found.passed[name] == found.runs[name] for name in found.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
