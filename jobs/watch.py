"""`latentmill status --watch`: show the runs of a cache until they end. It reads only the cache, from any machine."""

import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.messages import log_info, log_note
from jobs.progress import format_duration
from pipeline.errors import NoCacheError, StorageError
from pipeline.maintenance.watch import RunWatch
from pipeline.storage.folder import Folder
from pipeline.text import printable
from pipeline.wording import count_noun, format_counts

REFRESH_SECONDS = 5.0
NO_RUN = "no job has written to this cache yet"

Content = Mapping[str, Any]  # of `RunWatch.refresh`
Show = Callable[[Content], None]


def watch_cache(open_cache: Callable[[], Folder], as_json: bool, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show the runs of a cache until they end, and return the exit code: 0, or 130 after Ctrl-C.

    open_cache: returns the cache, or raises NoCacheError. Then a job may create it soon.
    Standard output is a live view at a terminal, and otherwise a line for each heartbeat. as_json: it is a JSON object.
    """
    try:
        cache, has_waited = await_cache(open_cache, sleep)
        with open_view(as_json) as show:
            follow(RunWatch(cache), show, sleep, awaits_run=has_waited)
    except KeyboardInterrupt:
        log_info("no longer watching; the job goes on")
        return 130
    return 0


def await_cache(open_cache: Callable[[], Folder], sleep: Callable[[float], None]) -> tuple[Folder, bool]:
    """Return a cache once it exists, and whether it did not exist at first."""
    has_waited = False
    while True:
        try:
            return open_cache(), has_waited
        except NoCacheError as error:
            if not has_waited:
                log_note(f"{error}; waiting for a job to create it (Ctrl-C ends this)")
        has_waited = True
        sleep(REFRESH_SECONDS)


def follow(
    watch: RunWatch,
    show: Show,
    sleep: Callable[[float], None],
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    awaits_run: bool = False,
) -> None:
    """Show the state of the runs every few seconds until none is alive.

    awaits_run: if there is no run yet, wait for one.
    If the storage does not answer, the next attempt follows. Raises StorageError if that would be in vain.
    """
    content: Content = watch.refresh(now())
    show(content)
    while content["state"] == "running" or (awaits_run and content["state"] == "none"):
        sleep(REFRESH_SECONDS)
        try:
            content = watch.refresh(now())
        except StorageError as error:
            if not error.may_pass:
                raise
            log_note(f"{error}; trying again in {REFRESH_SECONDS:g} s")
            continue
        show(content)


@contextmanager
def open_view(as_json: bool) -> Iterator[Show]:
    """Return a function that shows the state of the runs on standard output."""
    console = Console()
    if console.is_terminal and not as_json:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda content: live.update(render(content), refresh=True)
        return
    shown: list[Any] = []

    def print_line(content: Content) -> None:
        heartbeats = [content["state"], *(run["alive"] for run in content["runs"])]
        if shown != heartbeats:
            shown[:] = heartbeats
            line = json.dumps(content, ensure_ascii=False, allow_nan=False) if as_json else format_line(content)
            print(line, flush=True)
            if content["state"] != "running" and not as_json:
                print("\n".join(map(format_state, content["runs"])) or NO_RUN, flush=True)

    yield print_line


def render(content: Content) -> Table:
    """Return the live view: a bar for the cache, and lines for each run."""
    bar = ProgressBar(total=1.0, completed=content["share"], width=60)
    view = Table.grid()  # a bar does not end its line by itself
    view.add_row(bar)
    view.add_row(Text("\n".join(format_view(content))))
    return view


def format_view(content: Content) -> list[str]:
    """Return the lines of the live view."""
    units = content["units"]
    lines = [
        f"{content['cache']}: {content['state']}",
        f"  units      {units['done']:,} of {units['planned']:,} done, {content['share']:.0%} of the work"
        f"{format_speed(content)}",
    ]
    for run in content["runs"]:
        lines += format_run(run)
    return lines if content["runs"] else [*lines, f"  {NO_RUN}"]


def format_run(run: Content) -> list[str]:
    """Return the lines about a run."""
    workers, tasks, busy = run["workers"], run["tasks"], run["device_busy"]
    lines = [
        f"  {format_state(run)}",
        f"    images     {run['images']:,} encoded, {run['images_per_second']:.1f} per second in the last minute",
        f"    tasks      {tasks['under_way']:,} under way, {tasks['waiting']:,} waiting, {tasks['failed']:,} failed",
        f"    workers    {workers['ready']:,} ready, {workers['starting']:,} starting, "
        f"{count_noun(workers['restarts'], 'restart')}",
    ]
    if busy is not None:
        bottleneck = f"; the bottleneck is {run['bottleneck']}" if run["bottleneck"] else ""
        lines.append(f"    device     busy for {busy:.0%} of the time{bottleneck}")
    lines.append(f"    rejected   {format_counts(run['rejected'])}")
    if run["damaged_shards"]:
        lines.append(f"    damaged    {count_noun(run['damaged_shards'], 'shard')}")
    return lines


def format_state(run: Content) -> str:
    """Return what a run does, or how it ended and what to do."""
    name = f"{run['verb']} since {run['started']}"
    if run["outcome"] == "running":
        doing = describe_wait(run)
        return f"{name}: heartbeat {run['silent_seconds']} s ago{f'; {doing}' if doing else ''}"
    if run["outcome"] == "silent":
        return f"{name}: no heartbeat since {run['alive']}; run the same command again to resume"
    error = f": {printable(run['error'])}" if run["error"] else ""
    return f"{name}: {run['outcome']} at {run['ended']}, exit code {run['exit_code']}{error}"


def describe_wait(run: Content) -> str:
    """Return what a run does before it encodes; empty from then on."""
    if run["outcome"] == "running" and not run["units"]["planned"]:
        return "listing and planning"
    return str(run["waiting_for"])


def format_speed(content: Content) -> str:
    """Return the throughput of all runs and the ETA, as they follow the number of units; empty if unknown."""
    if not content["images_per_second"]:
        return ""
    seconds = content["seconds_left"]
    left = "" if seconds is None else f", about {format_duration(seconds)} left"
    return f", {content['images_per_second']:.1f} images per second{left}"


def format_line(content: Content) -> str:
    """Return the state of all runs in one line."""
    units, runs = content["units"], content["runs"]
    waiting = [describe_wait(run) for run in runs if describe_wait(run)]
    busy = [run["device_busy"] for run in runs if run["device_busy"] is not None]
    ready, restarts = (sum(run["workers"][name] for run in runs) for name in ("ready", "restarts"))
    parts = [
        f"{content['state']}: {units['done']:,} of {units['planned']:,} units",
        f"{content['share']:.0%}{format_speed(content)}",
        *waiting,
        f"{count_noun(ready, 'worker')}, {count_noun(restarts, 'restart')}",
        *(f"device busy {share:.0%}" for share in busy),
        f"{sum(sum(run['rejected'].values()) for run in runs):,} rejected",
        count_noun(sum(run["damaged_shards"] for run in runs), "damaged shard"),
    ]
    return ", ".join(parts)
