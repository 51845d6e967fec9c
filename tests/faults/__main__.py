"""Runs every row of the fault table a number of times, and writes docs/faults.md.

python -m tests.faults --times 3
"""

import argparse
import datetime
import platform
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/faults.md"

HEAD = """\
# Faults that were tried

Written by `python -m tests.faults --times {times}` on {date}, {machine}, Python {python}. Each row is one or more
tests that bring the fault about while a job runs: on a real S3 server over HTTP with a proxy before it, on local Ray
clusters of one or two nodes, or on disk. After each the cache must have every sample once, as a row or a reject, and
the digest of a run that nothing disturbed. Where the fault must end the job: its exit code, its message, and that the
same command goes on.

| row | fault | test | passed | seconds |
|---|---|---|---|---|
"""


class Collector:
    """A pytest plugin: what became of each test with a `fault` mark."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {}
        self.passed: dict[str, int] = defaultdict(int)
        self.ran: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = []
        for item in items:
            mark = item.get_closest_marker("fault")
            if mark is not None:
                self.rows[item.nodeid] = mark.args
                wanted.append(item)
        items[:] = wanted

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.failed:
            self.ran[report.nodeid] += 1
            self.passed[report.nodeid] += report.passed and report.when == "call"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("-k", default="", help="as pytest's: only some")
    options = parser.parse_args()
    found = Collector()
    only = ["-k", options.k] if options.k else []
    for _ in range(options.times):
        pytest.main(["-q", "-m", "fault", "-p", "no:cacheprovider", *only, str(ROOT / "tests")], plugins=[found])
    lines = [
        f"| {row} | {what} | `{name.split('::', 1)[1]}` | {found.passed[name]} of {options.times} | "
        f"{found.seconds[name] / options.times:.0f} |\n"
        for name, (row, what) in sorted(found.rows.items(), key=lambda item: item[1][0])
        if found.ran[name]
    ]
    head = HEAD.format(
        times=options.times,
        date=datetime.date.today().isoformat(),
        machine=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )
    print(head + "".join(lines))
    if not options.k:
        PAGE.write_text(head + "".join(lines), encoding="utf-8")
    return 0 if all(found.passed[name] == options.times for name in found.ran) else 1


if __name__ == "__main__":
    sys.exit(main())
