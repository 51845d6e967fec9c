"""The runs of `bench.scale`: jobs of each size, jobs on a store with latency, and jobs with paced workers."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.scale_runs import Measured, RunPlan, measure
from bench.scale_store import CACHES

SCENARIOS = ("fresh", "resume", "again", "status")
OPTIONS = {"shards": ("--resolution", "64"), "buckets": ("--buckets", "256", "--multiple-of", "16")}
INSTANT_WORKERS = 100
SCALE = 50  # how much smaller pages and log files are in the runs with latency
REAL = (20, 28)  # units of the two runs with a real worker; a job inspects up to 16 tars before it starts


@dataclass(frozen=True, slots=True)
class Scenarios:
    """The folder of all runs. Each kind of source (`shards`, `buckets`) needs a template first."""

    folder: Path

    def plan(self, scenario: str, kind: str, units: int, store: str, **more: Any) -> RunPlan:
        """Return the plan of a command: one of SCENARIOS, or `all`, which encodes all units.

        store: the name of its store. more: fields of the plan.
        """
        cache = f"s3://{CACHES}/cache"
        trial = ("--max-shards", str(units * 9 // 10)) if scenario == "fresh" else ()
        # every tar has an image that cannot be opened
        options = ("--vae", "demo", "--workers", "0", "--max-reject-rate", "1", *OPTIONS[kind], *trial)
        encode = ("encode", f"s3://{kind}-{units}/shards", *options, "--to", cache)
        argv = ("status", cache) if scenario == "status" else encode
        template = f"{self.folder}/{kind}.template"
        return RunPlan(argv=argv, store=f"{self.folder}/{store}.sqlite", template=template, **more)

    def run_real_worker(self, kind: str, units: int) -> Measured:
        """Encode units by a real worker, and write the template."""
        name = f"real-{kind}-{units}"
        return measure(self.plan("all", kind, units, name), self.folder, name)

    def run_job(self, kind: str, units: int, name: str, **more: Any) -> dict[str, Measured]:
        """Run the commands of SCENARIOS one after the other. The store has this name, and is removed."""
        more = {"workers": INSTANT_WORKERS, **more}
        runs = {
            scenario: measure(self.plan(scenario, kind, units, name, **more), self.folder, f"{name}-{scenario}")
            for scenario in SCENARIOS
        }
        for file in self.folder.glob(f"{name}.sqlite*"):
            file.unlink()
        return runs

    def run_with_latencies(self, latencies: Sequence[float], units: int) -> dict[float, Mapping[str, Measured]]:
        """Run jobs at the same time, each on a store with one of these latencies in seconds."""

        def run(latency: float) -> Mapping[str, Measured]:
            return self.run_job("shards", units, f"latency-{latency:g}", latency=latency, scale=SCALE)

        with ThreadPoolExecutor(len(latencies)) as pool:
            return dict(zip(latencies, pool.map(run, latencies), strict=True))

    def run_paced(self, workers: Sequence[int], seconds: float, window: float) -> dict[int, Measured]:
        """Run jobs of so many paced workers at the same time. Each is stopped after its window."""

        def run(count: int) -> Measured:
            units = int(count * (3 + window / seconds)) + 100
            plan = self.plan("all", "shards", units, f"paced-{count}", workers=count, seconds=seconds, window=window)
            return measure(plan, self.folder, f"paced-{count}", code=143)

        with ThreadPoolExecutor(len(workers)) as pool:
            return dict(zip(workers, pool.map(run, workers), strict=True))


def predict_wall(run: Measured, latency: float, small: Measured) -> float:
    """Return the seconds of a run on a store with this latency, by the rule in `bench.scale`.

    run: measured without latency. small: a run of the same command that was measured with it.
    """
    under_way = {name: small.requests[name] * latency / busy for name, busy in small.busy.items() if busy}
    return run.wall + sum(
        number * latency / max(1.0, under_way.get(name, 1.0)) for name, number in run.requests.items()
    )
