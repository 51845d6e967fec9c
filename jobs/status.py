"""`latentmill status`: how far a cache is, read from the cache alone, on any machine."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging
from jobs.options import StatusOptions, parse, parse_storage_options
from jobs.progress import format_duration
from pipeline.cache.reader import Cache
from pipeline.maintenance.status import read_status


def main(argv: Sequence[str]) -> int:
    """Run the job; the exit code."""
    options, _ = parse(StatusOptions, "status", argv)
    configure_logging(options.verbose)
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    content = read_status(cache.folder, datetime.datetime.now(datetime.UTC))
    if options.json:
        print_json(content)
    else:
        print("\n".join(format_status(content)), flush=True)
    return 0


def format_status(content: Mapping[str, Any]) -> list[str]:
    """What a person reads. content: as `pipeline.maintenance.status` gives it."""
    units, size = content["units"], content["bytes"]
    share = size["done"] / size["planned"] if size["planned"] else 0.0
    rejected = ", ".join(f"{count} {reason}" for reason, count in content["rejected"].items()) or "none"
    found = [
        f"{content['cache']}: {content['state']}",
        f"  units      {units['done']:,} of {units['planned']:,} done, {share:.0%} of the bytes",
        f"  rows       {content['rows']:,}",
        f"  rejected   {rejected}",
        f"  filtered   {content['filtered']:,}",
    ]
    if content["parts_of_units_under_way"]:
        found.append(f"  under way  {content['parts_of_units_under_way']:,} files of units that are not done")
    if content["images_per_second"]:
        left = content["seconds_left"]
        about = "" if left is None else f", about {format_duration(left)} left"
        found.append(f"  pace       {content['images_per_second']:.1f} a second{about}")
    for run in content["runs"]:
        if run["outcome"] == "silent":
            found.append(f"  no sign of life since {run['alive']} of the run begun {run['started']}: the same command")
            found.append("  again goes on")
    return found


if __name__ == "__main__":
    run_as_script(main)
