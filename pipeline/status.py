"""How far a cache is, from the cache alone: its plan, its commits and its runs. Any machine can ask."""

import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import commit, plan, runs
from pipeline.storage import Folder


def status(cache: Folder, identity: str, now: datetime.datetime) -> dict[str, Any]:
    """What is done and what is left.

    identity: sha256 of the cache's. now: an aware time, which signs of life are held against.

    state: `done`; `running`; `silent`, where a run that did not end gives no sign of life; else how the last run ended
    (`failed`, `stopped`), or `planned`. images_per_second and seconds_left are of the living runs, null without any.
    """
    units = {unit.name: unit.share for unit in plan.read(cache)}
    commits = [json.loads(data) for data in cache.read_all(commit.COMMITS)]
    parts = [part for unit in commits for part in unit["parts"]]
    told = [run_of(json.loads(data), now) for data in cache.read_all(runs.FOLDER)]
    alive = [run for run in told if run["outcome"] == "running"]
    samples = sum(part["samples"] for part in parts)
    retried = commit.retried(cache, identity)
    counts = sum((Counter(part["rejects"]) for part in parts), Counter[str]())
    counts.subtract(reason for part in retried for _, reason in part.record.supersedes)
    rejected = {reason: counts[reason] for reason in sorted(+counts)}
    standing = len(cache.names(commit.DATA)) + len(cache.names(commit.EMPTY))
    done_bytes = sum(units.get(unit["unit"], 0) for unit in commits)
    rate = sum(run["images_per_second"] for run in alive) or None
    left = None
    if rate and done_bytes:
        left = round((sum(units.values()) - done_bytes) * samples / done_bytes / rate)
    return {
        "cache": cache.url,
        "state": _state(told, undone=len(units.keys() - {unit["unit"] for unit in commits})),
        "units": {"planned": len(units), "done": len(commits)},
        "bytes": {"planned": sum(units.values()), "done": done_bytes},
        "parts_of_units_under_way": standing - len(parts) - len(retried),
        "rows": sum(part["rows"] for part in parts) + sum(part.record.rows for part in retried),
        "rejected": rejected,
        "filtered": sum(part["filtered"] for part in parts),
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
