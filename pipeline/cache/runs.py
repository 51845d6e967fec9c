"""`_runs/`: a record of each run, from its start to its end, so that anybody can see from the cache what became of it.

Beside it stands the run's log: what it said.

A cluster's job service flattens exit codes and forgets; this does not.
"""

import contextlib
import datetime
import hashlib
import json
import platform
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pipeline import __version__
from pipeline.canonical_json import with_checksum
from pipeline.storage.folder import Folder

FOLDER = "_runs"
DEAD_AFTER = 120  # seconds; a run gives a sign of life every 30


def utc_now() -> str:
    """The time, as ISO 8601 in UTC to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """The versions that decide a cache's bytes."""
    return {
        "latentmill": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "pyarrow": version("pyarrow"),
        "pillow": version("pillow"),
    }


def seconds_since_heartbeat(content: Mapping[str, Any], at: datetime.datetime) -> int:
    """Seconds since the last sign of life of a run's record. at: an aware time."""
    return max(0, round((at - datetime.datetime.fromisoformat(content["alive"])).total_seconds()))


def is_alive(content: Mapping[str, Any], at: datetime.datetime) -> bool:
    """Whether a run has not ended, and gave a sign of life lately."""
    return content["outcome"] == "running" and seconds_since_heartbeat(content, at) <= DEAD_AFTER


def find_alive(cache: Folder, but: str) -> list[str]:
    """When the runs started that are at work on a cache now. but: the name of the one that asks."""
    at = datetime.datetime.now(datetime.UTC)
    return [run["started"] for name, run in read_runs(cache).items() if name != but and is_alive(run, at)]


def read_runs(cache: Folder) -> dict[str, dict[str, Any]]:
    """The runs by name, as their records tell them, in the order of their starts.

    Damaged records are passed over: they only inform.
    """
    found = {}
    names = [name for name in cache.names(FOLDER) if name.endswith(".json")]
    for name, data in cache.read_each(FOLDER, names):
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            content = json.loads(data)
            seconds_since_heartbeat(content, datetime.datetime.now(datetime.UTC))
            paces = [content.get(name) for name in ("images_per_second", "seconds_left")]
            is_paced = all(value is None or isinstance(value, int | float) for value in paces)
            if is_paced and {"verb", "started", "alive", "ended", "outcome", "exit_code"} <= content.keys():
                found[name.removesuffix(".json")] = content
    return found


def encode_json(content: Mapping[str, Any]) -> bytes:
    """A run's file with this content."""
    return json.dumps(with_checksum(content), indent=1).encode()


class Run:
    """The record of one run. options: without secrets."""

    def __init__(self, cache: Folder, verb: str, options: Mapping[str, Any]) -> None:
        self.cache = cache
        started = utc_now()
        self.name = f"{started.replace(':', '').replace('-', '')[:15]}Z-{uuid.uuid4().hex[:8]}"
        self.content: dict[str, Any] = {
            "verb": verb,
            "options": dict(options),
            "started": started,
            "alive": started,
            "ended": None,
            "outcome": "running",
            "exit_code": None,
            "versions": library_versions(),
            "log": None,
        }

    def write(self, **facts: Any) -> None:
        """Write the record as it stands, with these facts and the time as its last sign of life."""
        self.content.update(facts, alive=utc_now())
        self.cache.replace(f"{FOLDER}/{self.name}.json", encode_json(self.content))

    def write_log(self, content: bytes) -> None:
        """Write what the run has said so far; from then on the record has the log's sha256."""
        self.content["log"] = None  # where this fails, nobody knows which of the two stands
        self.cache.replace(f"{FOLDER}/{self.name}.log", content)
        self.content["log"] = hashlib.sha256(content).hexdigest()

    def end(self, outcome: str, exit_code: int, **facts: Any) -> None:
        """Write how the run ended: done, failed or stopped."""
        self.write(ended=utc_now(), outcome=outcome, exit_code=exit_code, **facts)
