"""Follow the runs that work on a cache by a few requests: one for the record of each run, and seldom a listing."""

import datetime
import time
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.cache.commits import iterate_commits
from pipeline.cache.parts import is_retry_part
from pipeline.cache.runs import list_runs, read_named_runs
from pipeline.errors import REST_OF_SHARD
from pipeline.maintenance.status import describe_run, estimate_seconds_left
from pipeline.storage.folder import Folder

SECONDS_BETWEEN_LISTS = 60.0
SLOWDOWN = 20  # commits are listed again after this many times the time that it took


class RunWatch:
    """The runs of a cache that are alive, and those that ended since this watch began. If there is none, the last run.

    clock: returns monotonic seconds.
    """

    def __init__(self, cache: Folder, clock: Callable[[], float] = time.monotonic) -> None:
        self.cache, self.clock = cache, clock
        self._known: set[str] = set()
        self._followed: dict[str, dict[str, Any]] = {}  # records by name
        self._next_list = self._next_count = clock()
        self._done = 0  # units, by the list of the commits

    def refresh(self, now: datetime.datetime) -> dict[str, Any]:
        """Return the state of the runs. now: the current time, with a time zone, to compare heartbeats with.

        state: `running` if a run is alive, otherwise how the last one ended, as in `read_status`, or `none`.
        units: planned and done units of the cache. A run knows those that it did and that were done before it. If
        several runs are alive, the commits are listed as well. share: of the units, from 0 to 1, with the part of those
        under way that is done. Raises StorageError.
        """
        records = read_named_runs(self.cache, [name for name, run in self._followed.items() if run["ended"] is None])
        self._followed.update(records)
        if self.clock() >= self._next_list:
            self._find_runs(now)
        runs = [describe_progress(content, now) for _, content in sorted(self._followed.items())]
        alive = [run for run in runs if run["outcome"] == "running"]
        if len(alive) > 1 and self.clock() >= self._next_count:
            self._count_commits()
        planned = max((run["units"]["planned"] for run in runs), default=0)
        done = max((run["units"]["done"] for run in runs), default=0)
        return {
            "cache": self.cache.url,
            "state": "running" if alive else runs[-1]["outcome"] if runs else "none",
            "units": {"planned": planned, "done": min(max(done, self._done), planned)},
            "share": max((run["share"] for run in runs), default=0.0),
            "images_per_second": sum(run["images_per_second"] for run in alive) or None,
            "seconds_left": estimate_seconds_left(alive),
            "runs": runs,
        }

    def _find_runs(self, now: datetime.datetime) -> None:
        """Follow the runs that began since the last time; at first, those that are alive or else the last one."""
        names = [name for name in list_runs(self.cache) if name not in self._known]
        found = read_named_runs(self.cache, names)
        alive = {name: run for name, run in found.items() if describe_run(run, now)["outcome"] == "running"}
        is_first = not self._known
        self._known.update(names)
        self._followed |= alive or dict(list(found.items())[-1:]) if is_first else found
        self._next_list = self.clock() + (SECONDS_BETWEEN_LISTS if self._known else 0.0)

    def _count_commits(self) -> None:
        start = self.clock()
        self._done = sum(not is_retry_part(name) for name in iterate_commits(self.cache))
        self._next_count = self.clock() + max(SECONDS_BETWEEN_LISTS, SLOWDOWN * (self.clock() - start))


def describe_progress(content: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """Return what the record of a run tells about its progress. Fields that a record lacks are 0, empty or None.

    units: of the cache, planned and done; for `retry`, of this run. share: of the units, from 0 to 1, with the part of
    those under way that is done. rejected: by reason, in the units that the run has done. device_busy: from 0 to 1, in
    the last minute, or in the units of the whole run after its end.
    """
    counts, workers, tasks = (_get_counts(content, name) for name in ("counts", "workers", "tasks"))
    rejected = _get_counts(content, "rejects")
    planned = _get_number(content, "units")
    pending = min(_get_number(content, "pending"), planned) if "pending" in content else planned
    done = counts.get("units", 0)
    busy = content.get("device_busy_last_minute") if content["ended"] is None else content.get("device_busy")
    return {
        **describe_run(content, now),
        "units": {"planned": int(planned), "done": int(planned - pending) + done},
        "share": (planned - pending + pending * _get_number(content, "share")) / planned if planned else 0.0,
        "images": int(_get_number(content, "images")),
        "waiting_for": str(content.get("waiting_for") or ""),
        "workers": {name: workers.get(name, 0) for name in ("ready", "starting", "restarts")},
        "tasks": {name: tasks.get(name, 0) for name in ("waiting", "under_way", "failed")},
        "device_busy": busy if isinstance(busy, float) and (done or content["ended"] is None) else None,
        "bottleneck": str(content.get("bottleneck") or "") if done else "",
        "rejected": rejected,
        "damaged_shards": rejected.get(REST_OF_SHARD, 0),
    }


def _get_counts(content: Mapping[str, Any], name: str) -> dict[str, int]:
    """Return the whole numbers in an object of a record. A record only informs, so others are left out."""
    found = content.get(name)
    items = found.items() if isinstance(found, Mapping) else ()
    return {str(key): value for key, value in items if isinstance(value, int)}


def _get_number(content: Mapping[str, Any], name: str) -> float:
    value = content.get(name)
    return value if isinstance(value, int | float) else 0
