"""How the costs of a job grow with its units and its workers: CPU time, memory, requests, dollars and time.

    python -m bench.scale [--full] [--sizes 10000,100000] [--workers 100,300,1000] [--keep DIRECTORY] [--json]

It takes some minutes, and with --full, which adds a million units, about half an hour. The commands of latentmill run
in processes of their own, on a simulated S3 (`bench.scale_filesystem`): all of the product and of s3fs runs, and each
request is counted. The workers are simulated in another process. They write what a real worker left behind for one
unit, at once or after 30 s. Ray is not part of this.

Per size, four commands run one after the other: `fresh` encodes 90% of the units into a new cache, `resume` the rest,
`again` finds nothing to do, and `status` shows the progress. `buckets` is the same with images of 31 shapes.

CPU seconds and memory are those of the driver's process, without the simulated store. Those a unit are counted from the
first request on, without imports. Dollars are those of the driver's requests.

Times with `~` are not measured, but predicted: the time without latency, plus, for each kind of request, its number
times the latency, divided by the number of requests of this kind that were under way at once. That number was measured
with this latency in jobs of 1,000 units, with pages and log files that were 50 times smaller, and so as many as 50,000
units have. The lines `rule` compare predicted and measured times of these jobs.

The exit code is 1 if a target is missed.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.scale_before import BEFORE, BEFORE_COMMIT, BEFORE_SHARES
from bench.scale_filesystem import price
from bench.scale_runs import Measured
from bench.scale_scenarios import REAL, Scenarios, predict_wall
from bench.scale_store import Template
from bench.scale_xml import measure_list_answer

SIZES, MILLION, BUCKETED, SMALL = (10_000, 100_000), 1_000_000, 10_000, 1000
WORKERS, TASK_SECONDS, WINDOW = (100, 300, 1000), 30.0, 60.0
LATENCIES = (0.02, 0.1)
UNIT_MS, SHARE = 0.3, 0.1  # targets: CPU milliseconds a unit, and share of a core with 1,000 workers
# Targets at a million units: CPU seconds, MB, requests.
AGAIN = (60.0, 1500.0, 50_000.0)
LIMITS: dict[str, tuple[float, ...]] = {"again": AGAIN, "resume": AGAIN, "status": (20.0, 1000.0)}


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one command. walls: predicted seconds, by latency."""

    kind: str
    scenario: str
    units: int
    run: Measured
    walls: Mapping[float, float]

    @property
    def unit_ms(self) -> float:
        """CPU milliseconds per encoded unit, without imports; 0 for other commands than `fresh`."""
        return 1000 * (self.run.cpu - self.run.start_cpu) / self.run.tasks if self.scenario == "fresh" else 0.0

    @property
    def costs(self) -> tuple[float, float, int]:
        """CPU seconds, MB, and the number of requests."""
        return self.run.cpu, self.run.peak, sum(self.run.requests.values())


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that must be below a limit."""

    name: str
    value: float
    limit: float


@dataclass(frozen=True, slots=True)
class Figures:
    """All that was measured.

    real: by a real worker, the runs of REAL. small: by latency, the runs with latency. commit_bytes: of a commit of
    `buckets`. list_answer: CPU seconds of `measure_list_answer`. load: average of the machine at the start.
    """

    rows: Sequence[Row]
    paced: Mapping[int, Measured]
    real: Sequence[Measured]
    small: Mapping[float, Mapping[str, Measured]]
    commit_bytes: int
    list_answer: float
    load: float

    @property
    def targets(self) -> list[Target]:
        """The targets for what was run."""
        targets = []
        for row in self.rows:
            name = f"{row.scenario} of {row.units:,}"
            if (row.kind, row.scenario) == ("shards", "fresh"):
                targets.append(Target(f"{name}: CPU ms a unit", row.unit_ms, UNIT_MS))
            if (row.kind, row.units) == ("shards", MILLION):
                limits = zip(("CPU s", "MB", "requests"), row.costs, LIMITS.get(row.scenario, ()), strict=False)
                targets += [Target(f"{name}: {what}", value, limit) for what, value, limit in limits]
        if run := self.paced.get(max(WORKERS)):
            targets.append(Target(f"{max(WORKERS):,} workers: share of a core", run.share, SHARE))
        return targets


def measure_all(options: argparse.Namespace, folder: Path) -> Figures:
    """Run all commands."""
    scenarios, load = Scenarios(folder), os.getloadavg()[0]
    real = [scenarios.run_real_worker("shards", units) for units in REAL]
    scenarios.run_real_worker("buckets", 1)
    objects = dict(Template.load(folder / "buckets.template").objects)
    small = scenarios.run_with_latencies((0.0, *LATENCIES), options.small)
    jobs = [("shards", units) for units in options.sizes] + [("buckets", options.bucketed)]
    rows = []
    for kind, units in jobs:
        for name, run in scenarios.run_job(kind, units, f"{kind}-{units}").items():
            walls = {latency: predict_wall(run, latency, small[latency][name]) for latency in LATENCIES}
            rows.append(Row(kind, name, units, run, walls))
    paced = scenarios.run_paced(options.workers, options.task_seconds, options.window)
    commit = next(len(data) for key, data in objects.items() if key.startswith("_commits/"))
    return Figures(rows, paced, real, small, commit, measure_list_answer(), load)


def format_rows(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table."""
    walls = "".join(f"{f'~{1000 * latency:.0f} ms':>9}" for latency in LATENCIES)
    titles = ("CPU s", "before", "ms/unit", "MB", "before", "requests", "before", "$", "wall s")
    widths = (8, 8, 9, 7, 8, 10, 11, 8, 8)
    yield " " * 25 + "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)) + walls
    for row in rows:
        line = f"{row.kind:<8}{row.scenario:<7}{row.units:>10,}"
        before = BEFORE.get((row.kind, row.scenario, row.units), (None, None, None))
        for value, earlier, width, digits in zip(row.costs, before, (8, 7, 10), (1, 0, 0), strict=True):
            line += f"{value:>{width},.{digits}f}"
            line += f"{'' if earlier is None else f'{earlier:,.{digits}f}':>{max(8, width + 1)}}"
            if digits:
                line += f"{f'{row.unit_ms:.3f}' if row.unit_ms else '':>9}"
        line += f"{price(row.run.requests):>8.3f}{row.run.wall:>8,.1f}"
        yield line + "".join(f"{seconds:>9,.0f}" for seconds in row.walls.values())


def format_real(runs: Sequence[Measured]) -> Iterator[str]:
    """Yield the lines about the requests of a real worker: the difference of the two runs, a unit.

    The rejects that the driver reads for its summary, in advance and not always as many, are left out.
    """
    units = REAL[1] - REAL[0]
    extra = {name: round((count - runs[0].requests.get(name, 0)) / units) for name, count in runs[1].requests.items()}
    extra.pop("GET _rejects", None)
    listed = ", ".join(f"{count} {name}" for name, count in sorted(extra.items()) if count)
    yield f"a unit of one part costs a real worker {sum(extra.values())} requests: {listed};"
    yield f"~${1e6 * price(extra):.2f} for a million such units, whose tars are read by one GET of up to 8 MiB"


def format_rules(small: Mapping[float, Mapping[str, Measured]]) -> Iterator[str]:
    """Yield lines that compare predicted with measured times."""
    for latency in LATENCIES:
        pairs = [(predict_wall(small[0.0][name], latency, run), run.wall) for name, run in small[latency].items()]
        listed = ", ".join(f"{predicted:.1f} / {measured:.1f}" for predicted, measured in pairs)
        yield f"rule at {1000 * latency:.0f} ms, predicted / measured seconds: {listed}"


def format_figures(figures: Figures, task_seconds: float) -> Iterator[str]:
    """Yield all lines of the output."""
    yield from format_rows(figures.rows)
    yield f"before: {BEFORE_COMMIT}"
    imports = sum(row.run.start_cpu for row in figures.rows) / len(figures.rows)
    yield f"imports: {imports:.1f} of the CPU s of each command; load average at the start: {figures.load:.1f}"
    yield f"a commit of `buckets` has {figures.commit_bytes / 1000:.1f} kB\n"
    for workers, run in figures.paced.items():
        before = f", before {BEFORE_SHARES[workers]:.1%}" if workers in BEFORE_SHARES else ""
        yield f"{workers:>6,} workers, tasks of {task_seconds:g} s: {run.share:.1%} of a core{before}"
    yield from format_real(figures.real)
    yield from format_rules(figures.small)
    yield f"not included: botocore parses 1,000 names of a LIST in {1000 * figures.list_answer:.0f} ms of CPU\n"
    for target in figures.targets:
        verdict = "PASS" if target.value < target.limit else "FAIL"
        yield f"{target.name:<40}{target.value:>12,.2f}   target below {target.limit:>8,g}   {verdict}"


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parse numbers with commas between them."""
    return tuple(int(number) for number in text.split(","))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=parse_numbers, default=SIZES, help="units of the jobs (default: 10000,100000)")
    parser.add_argument("--full", action="store_true", help="run a job of a million units as well")
    parser.add_argument("--bucketed", type=int, default=BUCKETED, help="units of the job with many buckets")
    parser.add_argument("--small", type=int, default=SMALL, help="units of the jobs with latency")
    parser.add_argument("--workers", type=parse_numbers, default=WORKERS, help="numbers of paced workers")
    parser.add_argument("--task-seconds", type=float, default=TASK_SECONDS, help="of a task of a paced worker")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds in which paced workers are measured")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep plans, results and messages here")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark. Returns the exit code."""
    options = parse_arguments()
    options.sizes += (MILLION,) if options.full else ()
    with tempfile.TemporaryDirectory(prefix="latentmill-scale-") as temporary:
        folder: Path = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure_all(options, folder.resolve())
    if options.json:
        content: dict[str, Any] = {
            **dataclasses.asdict(figures),
            "targets": list(map(dataclasses.asdict, figures.targets)),
        }
        print(json.dumps(content, indent=1))
    else:
        print("\n".join(format_figures(figures, options.task_seconds)))
    return int(any(target.value >= target.limit for target in figures.targets))


if __name__ == "__main__":
    sys.exit(main())
