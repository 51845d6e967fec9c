"""The figures of `bench.scale` from before, measured by it on one machine with two shared cores."""

BEFORE_COMMIT = "01e13a1 (2026-11-27)"
# By kind, scenario and units: CPU seconds of the driver, MB at the peak, requests.
BEFORE: dict[tuple[str, str, int], tuple[float, float, float]] = {}
# By the number of workers that take 30 s a task: the share of a core.
BEFORE_SHARES: dict[int, float] = {}
