"""The throughput of the workers over time, from the record of a run, and workers that are slow."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.findings import MAX_EXAMPLES, Example, Finding
from pipeline.wording import count_noun

SLOW = 0.5  # of the median images per second
MAX_INTERVALS = 1000  # far more than a run records
MIN_WORKERS, MIN_INTERVALS, MIN_SECONDS, MIN_IMAGES = 4, 5, 60.0, 50  # of workers that are compared


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WorkerRates:
    """The throughput of W workers in T intervals of a run.

    started: of the run. names: of the workers. counts: images [W, T], NaN where a worker did not run. seconds: of each
    interval [T]; only the last one may be shorter than the others. busy: seconds for which each model ran [W].
    """

    started: str
    names: Sequence[str]
    counts: NDArray[np.float64]
    seconds: NDArray[np.float64]
    busy: NDArray[np.float64]

    @property
    def images(self) -> NDArray[np.float64]:
        """The number of images of each worker [W]."""
        return np.asarray(np.nansum(self.counts, axis=1))

    @property
    def alive(self) -> NDArray[np.float64]:
        """Seconds for which each worker ran [W]."""
        return np.asarray(~np.isnan(self.counts) @ self.seconds)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The images per second of each worker while it ran [W]."""
        return np.asarray(self.images / self.alive)


def read_worker_rates(runs: Iterable[Mapping[str, Any]]) -> WorkerRates | None:
    """Return the rates of the run with the most images; None if no run has recorded them. Damaged ones are skipped."""
    found = []
    for run in runs:
        with suppress(KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            found.append(_parse_rates(run["throughput"]))
    found = [rates for rates in found if rates.images.sum() > 0]
    return max(found, key=lambda rates: rates.images.sum(), default=None)


def _parse_rates(throughput: Mapping[str, Any]) -> WorkerRates:
    workers, seconds, elapsed = throughput["workers"], float(throughput["seconds"]), float(throughput["elapsed"])
    intervals = int(elapsed // seconds) + 1
    if intervals > MAX_INTERVALS:
        raise ValueError("a run records fewer intervals")
    counts = np.full((len(workers), intervals), np.nan)
    for row, each in zip(counts, workers.values(), strict=True):
        if each["first"] < 0:
            raise ValueError("a worker begins after its run")
        row[each["first"] : each["first"] + len(each["images"])] = each["images"]
    return WorkerRates(
        started=str(throughput["started"]),
        names=[str(name) for name in workers],
        counts=counts,
        seconds=np.array([seconds] * (intervals - 1) + [max(elapsed - (intervals - 1) * seconds, 1e-3)]),
        busy=np.array([float(each["busy_seconds"]) for each in workers.values()]),
    )


def find_slow_workers(rates: WorkerRates | None) -> list[Finding]:
    """Return a finding of workers that encode far fewer images per second than the others."""
    if rates is None:
        return []
    kept = np.flatnonzero(rates.alive >= max(MIN_SECONDS, MIN_INTERVALS * rates.seconds[0]))
    if len(kept) < MIN_WORKERS:
        return []
    mean = rates.mean[kept]
    median = float(np.median(mean))
    slow = [int(number) for number in np.argsort(mean, kind="stable") if mean[number] < SLOW * median]
    if not slow or len(slow) > len(kept) / 3 or np.median(rates.images[kept]) < MIN_IMAGES:
        return []
    examples = tuple(
        Example(
            key=rates.names[kept[number]],
            remark=f"{mean[number]:.2g} images/s; its model ran for "
            f"{min(1.0, rates.busy[kept[number]] / rates.alive[kept[number]]):.0%} of the time",
        )
        for number in slow[:MAX_EXAMPLES]
    )
    sentence = (
        f"{len(slow):,} of {count_noun(len(kept), 'worker')} encoded less than half as many images per second as "
        f"others ({median:.2g} images/s). If its model ran for most of the time, the device is slow; otherwise its "
        "storage, network or cores are."
    )
    return [
        Finding(
            code="slow-workers",
            severity="warning",
            sentence=sentence,
            examples=examples,
            command="latentmill status {cache} --json",
        )
    ]
