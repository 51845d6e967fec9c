"""`_runs/`: a record of each run, from its start to its end, and the run's log.

The cache alone shows how each run ended. A cluster's job service reduces exit codes to success or failure and deletes
old jobs; these records stay.
"""

import contextlib
import datetime
import hashlib
import json
import platform
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from latentmill import __version__
from pipeline.canonical_json import indented_json, with_checksum
from pipeline.storage.folder import Folder

FOLDER = "_runs"
DEAD_AFTER = 120  # seconds without a heartbeat; a run writes one every 30 seconds
PLUGINS = ("pi-heif", "pillow-heif", "pillow-jxl-plugin")  # of Pillow


def utc_now() -> str:
    """Return the current time in UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def get_library_versions() -> dict[str, str]:
    """Return the versions of the libraries on which a cache's bytes depend. Plugins of Pillow may be missing."""
    plugins: dict[str, str] = {}
    for name in PLUGINS:
        with contextlib.suppress(PackageNotFoundError):
            plugins[name] = version(name)
    return {
        "latentmill": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "pyarrow": version("pyarrow"),
        "pillow": version("pillow"),
        "simplejpeg": version("simplejpeg"),
        **plugins,
    }


def seconds_since_heartbeat(content: Mapping[str, Any], at: datetime.datetime) -> int:
    """Return the seconds from the last heartbeat in a run's record to the time `at`, which has a time zone."""
    return max(0, round((at - datetime.datetime.fromisoformat(content["alive"])).total_seconds()))


def is_alive(content: Mapping[str, Any], at: datetime.datetime) -> bool:
    """Return whether a run has not ended, and wrote a heartbeat in the last `DEAD_AFTER` seconds."""
    return content["outcome"] == "running" and seconds_since_heartbeat(content, at) <= DEAD_AFTER


def find_alive(cache: Folder, exclude: str) -> list[str]:
    """Return the start times of the runs that are alive now. exclude: the name of a run to leave out."""
    at = datetime.datetime.now(datetime.UTC)
    return [run["started"] for name, run in read_runs(cache).items() if name != exclude and is_alive(run, at)]


def read_runs(cache: Folder) -> dict[str, dict[str, Any]]:
    """Return the records of all runs by name, in the order of their start.

    Damaged records are skipped, because records only inform.
    """
    return read_named_runs(cache, list_runs(cache))


def list_runs(cache: Folder) -> list[str]:
    """Return the names of all runs, in the order of their start. This is one request per 1,000 files."""
    return [name.removesuffix(".json") for name in cache.list_files(FOLDER) if name.endswith(".json")]


def read_named_runs(cache: Folder, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the records of these runs by name, without damaged ones."""
    contents = {}
    for name, data in cache.read_each(FOLDER, [f"{name}.json" for name in names]):
        if (content := _parse_run(data)) is not None:
            contents[name.removesuffix(".json")] = content
    return contents


def _parse_run(data: bytes) -> dict[str, Any] | None:
    """Return the content of a run's record; None if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        content: dict[str, Any] = json.loads(data)
        seconds_since_heartbeat(content, datetime.datetime.now(datetime.UTC))
        numbers = [content.get(name) for name in ("images_per_second", "seconds_left")]
        are_valid = all(value is None or isinstance(value, int | float) for value in numbers)
        if are_valid and {"verb", "started", "alive", "ended", "outcome", "exit_code"} <= content.keys():
            return content
    return None


def encode_run(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a run's record with this content, and with its checksum."""
    return indented_json(with_checksum(content))


class Run:
    """The record of one run.

    cache: the cache that the run works on. verb: the command. options: the run's options, without secrets.
    """

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
            "versions": get_library_versions(),
            "log": None,
        }

    def write(self, **facts: Any) -> None:
        """Update the record with these facts, and write it with the current time as its heartbeat."""
        self.content.update(facts, alive=utc_now())
        self.cache.replace(f"{FOLDER}/{self.name}.json", encode_run(self.content))

    def write_log(self, content: bytes) -> None:
        """Write the run's messages so far. From then on, the record holds the log's sha256."""
        self.content["log"] = None  # if the write fails, the old or the new log may exist
        self.cache.replace(f"{FOLDER}/{self.name}.log", content)
        self.content["log"] = hashlib.sha256(content).hexdigest()

    def end(self, outcome: str, exit_code: int, **facts: Any) -> None:
        """Write how the run ended. outcome: done, failed or stopped."""
        self.write(ended=utc_now(), outcome=outcome, exit_code=exit_code, **facts)
