"""Run every row of the fault table a number of times, and write docs/faults.md.

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
# Fault table

This page lists the faults that are tested, and how often each test passed. It is written by
`LATENTMILL_TEST_S3={store} python -m tests.faults --times {times}{once}` (on {date}, {machine}, Python {python}).

Each row is one or more tests that inject the fault while a job runs: over HTTP on an S3 server ({store}) behind a
proxy, on Ray clusters of one or two nodes, or on disk. After each fault, the test checks the cache:

- Every sample is there once, as a row or a reject. pyarrow and tarfile alone count them.
- Every file has the bytes that were committed.
- The digest is that of an undisturbed run.

If the fault must end the job, the test checks the exit code and the message, and that the same command resumes. For
kills at random moments, see the [engineering log](engineering-log.md#2026-11-26-kills-and-faulty-workers).

| row | fault | test | passed | seconds |
|---|---|---|---|---|
"""


class Collector:
    """A pytest plugin that collects the results of the tests with a `fault` mark."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {}
        self.passed: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.runs: dict[str, int] = defaultdict(int)
        self.least = 0  # rows below this one are skipped

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
    parser.add_argument("--once-below", type=int, default=0, metavar="ROW", help="run rows below ROW only once")
    parser.add_argument("-k", default="", help="run only matching tests; the same as pytest -k")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    collector = Collector()
    argv = ["-q", "-m", "fault", "--timeout", "600", "-p", "no:cacheprovider", str(ROOT / "tests")]
    argv += ["-k", options.k] if options.k else []
    for number in range(options.times):
        collector.least = options.once_below if number else 0
        pytest.main(argv, plugins=[collector])
    lines = [
        f"| {row} | {fault} | `{name.split('::', 1)[1]}` | {collector.passed[name]} of {collector.runs[name]} | "
        f"{collector.seconds[name] / collector.runs[name]:.0f} |\n"
        for name, (row, fault) in sorted(collector.rows.items(), key=lambda item: item[1][0])
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
    return 0 if all(collector.passed[name] == collector.runs[name] for name in collector.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
