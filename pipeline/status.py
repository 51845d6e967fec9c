"""How far a cache is, from the cache alone: its plan, its commits and its runs. Any machine can ask."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import commit, plan, runs, stats
from pipeline.storage import Folder


def status(cache: Folder, now: datetime.datetime) -> dict[str, Any]:
    """What is done and what is left. now: an aware time, which signs of life are held against.

    state: `done`; `running`; `silent`, where a run that did not end gives no sign of life; else how the last run ended
    (`failed`, `stopped`), or `planned`. images_per_second and seconds_left are of the living runs, null without any.
    """
    units = {unit.name: unit.share for unit in plan.read(cache)}
    finished = commit.finished(cache)
    known = stats.committed(cache)
    told = [run_of(run, now) for run in runs.told(cache).values()]
    alive = [run for run in told if run["outcome"] == "running"]
    rows, filtered = (sum(getattr(part, name) for part in known.values()) for name in ("rows", "filtered"))
    rejected = stats.rejected(known.values())
    done_bytes = sum(units.get(unit, 0) for unit in finished)
    rate = sum(run["images_per_second"] for run in alive) or None
    left = None
    if rate and done_bytes:
        samples = rows + filtered + sum(rejected.values())
        left = round((sum(units.values()) - done_bytes) * samples / done_bytes / rate)
    return {
        "cache": cache.url,
        "state": _state(told, undone=len(units.keys() - finished)),
        "units": {"planned": len(units), "done": len(finished)},
        "bytes": {"planned": sum(units.values()), "done": done_bytes},
        "parts_of_units_under_way": len(set(commit.files(cache)) - known.keys()),
        "rows": rows,
        "rejected": rejected,
        "filtered": filtered,
        "images_per_second": rate,
        "seconds_left": left,
        "runs": told,
    }


def run_of(content: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """A run as its record tells it; one that did not end and is silent has the outcome `silent`."""
    lost = content["outcome"] == "running" and not runs.is_alive(content, now)
    return {
        **{name: content[name] for name in ("verb", "started", "alive", "ended", "exit_code")},
        "outcome": "silent" if lost else content["outcome"],
        "silent_seconds": runs.silence(content, now) if content["ended"] is None else 0,
        "images_per_second": content.get("images_per_second", 0.0),
    }


def _state(runs: Sequence[Mapping[str, Any]], undone: int) -> str:
    """runs: in the order of their starts."""
    outcomes = [run["outcome"] for run in runs]
    if "running" in outcomes:
        return "running"
    if not undone:
        return "done"
    return str(outcomes[-1]) if outcomes and outcomes[-1] != "done" else "planned"
