"""The progress of a cache, from its plan, commits and runs alone. So any machine can read it."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cache.commit_scan import CacheScan, drop_twins
from pipeline.cache.name_array import CHUNK, find_names
from pipeline.cache.part_counts import PartCounts
from pipeline.cache.plan_files import read_unit_sizes
from pipeline.cache.runs import is_alive, read_runs, seconds_since_heartbeat
from pipeline.storage.folder import Folder


def read_status(cache: Folder, now: datetime.datetime) -> dict[str, Any]:
    """Return the progress of a cache. now: the current time, with a time zone, to compare heartbeats with.

    state: `running`; `done`; `silent` if the last run neither ended nor writes heartbeats; `failed` or `stopped` if the
    last run ended so; otherwise `planned`. share: from 0 to 1, of the bytes; the images of units under way are
    estimated. images_per_second (over the last minute) and seconds_left come from the runs
    that are alive, and are None if there is none.
    """
    planned = read_unit_sizes(cache)
    scan, counts = CacheScan(cache), PartCounts()
    is_done = np.zeros(len(planned.names), bool)
    for start in range(0, len(is_done), CHUNK):
        chunk = slice(start, start + CHUNK)
        is_done[chunk] = find_names(scan.commits, planned.names[chunk].to_pylist()) >= 0
    done, sizes = int(is_done.sum()), planned.bytes.to_numpy()
    files_left = len(scan.files)
    for table in scan.read_tables():
        counts.add(drop_twins(table.rows, scan.twins))
        files_left -= len(table.files)
    runs = [describe_run(run, now) for run in read_runs(cache).values()]
    alive = [run for run in runs if run["outcome"] == "running"]
    done_bytes, all_bytes = int(sizes[is_done].sum()), int(sizes.sum())
    samples = counts.rows + counts.filtered.total() + sum(counts.rejected.values())
    size = done_bytes / samples if samples else planned.image_bytes / max(planned.images, 1)
    bytes_under_way = sum(run["images_under_way"] for run in alive) * size
    rate = sum(run["images_per_second"] for run in alive) or None
    return {
        "cache": cache.url,
        "state": _determine_state(runs, undone=len(is_done) - done),
        "units": {"planned": len(is_done), "done": done},
        "bytes": {"planned": all_bytes, "done": done_bytes},
        "share": min((done_bytes + bytes_under_way) / all_bytes, 1.0) if all_bytes else 0.0,
        "parts_of_units_under_way": files_left,
        "rows": counts.rows,
        "rejected": counts.rejected,
        "filtered": dict(sorted(counts.filtered.items())),
        "images_per_second": rate,
        "seconds_left": estimate_seconds_left(alive),
        "runs": runs,
    }


def describe_run(content: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """Summarize the record of a run. If the run did not end and writes no heartbeats, its outcome is `silent`."""
    is_silent = content["outcome"] == "running" and not is_alive(content, now)
    counts = content.get("counts")
    images, finished = content.get("images"), counts.get("encoded", 0) if isinstance(counts, Mapping) else None
    under_way = 0
    if content["verb"] == "encode" and isinstance(images, int) and isinstance(finished, int):
        under_way = max(images - finished, 0)
    return {
        **{name: content[name] for name in ("verb", "started", "alive", "ended", "exit_code")},
        "outcome": "silent" if is_silent else content["outcome"],
        "silent_seconds": seconds_since_heartbeat(content, now) if content["ended"] is None else 0,
        "images_per_second": content.get("images_per_second") or 0.0,
        "seconds_left": content.get("seconds_left"),
        "images_under_way": under_way,
        "error": error if isinstance(error := content.get("error"), str) else None,
    }


def estimate_seconds_left(alive: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the seconds until the runs finish together, or None if no run has an estimate.

    alive: the runs that are alive. Each of them records how long it would take alone.
    """
    estimates = [run for run in alive if run["images_per_second"] and run["seconds_left"] is not None]
    if not estimates:
        return None
    images: float = max(run["seconds_left"] * run["images_per_second"] for run in estimates)
    rate: float = sum(run["images_per_second"] for run in estimates)
    return round(images / rate)


def _determine_state(runs: Sequence[Mapping[str, Any]], undone: int) -> str:
    """Return the state of a cache. runs: in the order of their start. undone: the number of units that are not done."""
    outcomes = [run["outcome"] for run in runs]
    if "running" in outcomes:
        return "running"
    if not undone:
        return "done"
    return str(outcomes[-1]) if outcomes and outcomes[-1] != "done" else "planned"
