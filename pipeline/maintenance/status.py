"""How far a cache is, from the cache alone: its plan, its commits and its runs. Any machine can ask."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cache import parts, plan, stats
from pipeline.cache import runs as runs_module
from pipeline.cache.commits import commit_names
from pipeline.cache.runs import is_alive, seconds_since_heartbeat
from pipeline.storage.folder import Folder


def read_status(cache: Folder, now: datetime.datetime) -> dict[str, Any]:
    """What is done and what is left. now: an aware time, which signs of life are held against.

    state: `done`; `running`; `silent`, where a run that did not end gives no sign of life; else how the last run ended
    (`failed`, `stopped`), or `planned`. images_per_second (over the last minute) and seconds_left are what the living
    runs say, null without any.
    """
    units = {unit.name: unit.share for unit in plan.read_plan(cache)}
    commits = commit_names(cache)
    finished = {name for name in commits if not parts.is_retry_part(name)}
    sums, known = stats.RunningStats(), set[str]()
    for part in stats.committed_parts(cache, sorted(commits)):
        sums.count(part)
        known.add(part.file)
    told = [describe_run(run, now) for run in runs_module.read_runs(cache).values()]
    alive = [run for run in told if run["outcome"] == "running"]
    done_bytes = sum(units.get(unit, 0) for unit in finished)
    rate = sum(run["images_per_second"] for run in alive) or None
    return {
        "cache": cache.url,
        "state": _state(told, undone=len(units.keys() - finished)),
        "units": {"planned": len(units), "done": len(finished)},
        "bytes": {"planned": sum(units.values()), "done": done_bytes},
        "parts_of_units_under_way": len(set(parts.list_part_files(cache)) - known),
        "rows": sums.rows,
        "rejected": sums.rejected,
        "filtered": sums.filtered,
        "images_per_second": rate,
        "seconds_left": seconds_left(alive),
        "runs": told,
    }


def describe_run(content: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """A run as its record tells it; one that did not end and is silent has the outcome `silent`."""
    lost = content["outcome"] == "running" and not is_alive(content, now)
    return {
        **{name: content[name] for name in ("verb", "started", "alive", "ended", "exit_code")},
        "outcome": "silent" if lost else content["outcome"],
        "silent_seconds": seconds_since_heartbeat(content, now) if content["ended"] is None else 0,
        "images_per_second": content.get("images_per_second") or 0.0,
        "seconds_left": content.get("seconds_left"),
    }


def seconds_left(alive: Sequence[Mapping[str, Any]]) -> int | None:
    """How long the living runs take together: each says how long it takes alone. None where none can say."""
    paced = [run for run in alive if run["images_per_second"] and run["seconds_left"] is not None]
    if not paced:
        return None
    images: float = max(run["seconds_left"] * run["images_per_second"] for run in paced)
    rate: float = sum(run["images_per_second"] for run in paced)
    return round(images / rate)


def _state(runs: Sequence[Mapping[str, Any]], undone: int) -> str:
    """runs: in the order of their starts."""
    outcomes = [run["outcome"] for run in runs]
    if "running" in outcomes:
        return "running"
    if not undone:
        return "done"
    return str(outcomes[-1]) if outcomes and outcomes[-1] != "done" else "planned"
