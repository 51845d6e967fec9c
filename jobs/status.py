"""`latentmill status`: show the progress of a cache. It reads only the cache, so it runs on any machine."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.common_options import parse_storage_options
from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging
from jobs.options import StatusOptions
from jobs.parsing import parse
from jobs.progress import format_duration
from jobs.watch import watch_cache
from pipeline.cache.identity import describe_settings
from pipeline.cache.reader import Cache
from pipeline.maintenance.status import read_status
from pipeline.text import printable
from pipeline.wording import count_noun, format_counts

SETTINGS = ("transform", "size", "exif", "alpha", "color", "flip", "store", "dtype")  # that are shown


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options, _ = parse(StatusOptions, "status", argv)
    configure_logging(options.verbose)
    storage_options = parse_storage_options(options.storage_option)
    if options.watch:
        return watch_cache(lambda: Cache.open(options.cache, storage_options).folder, options.json)
    cache = Cache.open(options.cache, storage_options)
    settings = describe_settings(cache.info.identity)
    content = {
        **read_status(cache.folder, datetime.datetime.now(datetime.UTC)),
        "settings": {name: settings[name] for name in SETTINGS if name in settings},
        "columns": cache.overlays.to_dict(),
    }
    if options.json:
        print_json(content)
    else:
        lines = format_status(content)
        if cache.overlays.number:
            lines.append(f"  columns    {cache.overlays.summary}")
        print("\n".join(lines), flush=True)
    return 0


def format_status(content: Mapping[str, Any]) -> list[str]:
    """Return the lines of the report. content: of `pipeline.maintenance.status.read_status`, and the `settings`."""
    units, share = content["units"], content["share"]
    lines = [
        f"{content['cache']}: {content['state']}",
        f"  settings   {' '.join(content['settings'].values())}",
        f"  units      {units['done']:,} of {units['planned']:,} done, {share:.0%} of the bytes",
        f"  rows       {content['rows']:,}",
        f"  rejected   {format_counts(content['rejected'])}",
        f"  filtered   {format_counts(content['filtered'])}",
    ]
    if content["parts_of_units_under_way"]:
        files = count_noun(content["parts_of_units_under_way"], "file")
        lines.append(f"  partial    {files} of units that are not done")
    if content["images_per_second"]:
        seconds = content["seconds_left"]
        eta = "" if seconds is None else f", about {format_duration(seconds)} left"
        lines.append(f"  throughput {content['images_per_second']:.1f} images per second{eta}")
    if content["state"] in ("failed", "stopped") and (error := content["runs"][-1]["error"]):
        lines.append(f"  {content['state']:<10} {printable(error)}")
    for run in content["runs"]:
        if run["outcome"] == "silent":
            lines.append(f"  no heartbeat since {run['alive']} from the run that started {run['started']};")
            lines.append("  run the same command again to resume")
    return lines


if __name__ == "__main__":
    run_as_script(main)
