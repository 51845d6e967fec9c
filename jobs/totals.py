"""The totals of an encode run, for its record and its summary."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jobs.encode_options import EncodeOptions
from jobs.entry import print_json
from jobs.messages import log_each, log_error, log_warning
from jobs.scheduler import Failure
from latentmill.cache_info import VaeInfo
from pipeline.cache import commits, stats
from pipeline.cache.identity import CacheInfo, parse_schema
from pipeline.cache.part_info import UnitReport
from pipeline.errors import REST_OF_SHARD, LatentmillError
from pipeline.formats.schema import PassthroughColumns
from pipeline.readers.image_column import is_text
from pipeline.readers.labels import LABEL_COLUMNS
from pipeline.records import Seconds
from pipeline.report.findings import Finding, find_in_records, format_finding
from pipeline.storage.folder import Folder
from pipeline.text import printable, to_valid_text
from pipeline.wording import count_noun, format_counts

MAX_NAMES = 3  # of rejects in the summary
COUNTS = ("samples", "rows", "enlarged", "parts", "adopted", "encoded", "fp32_fallbacks", "bytes")  # of a unit


@dataclass(kw_only=True)
class RunTotals:
    """The totals of a run so far.

    precision_error: the largest error of a worker's self-check, relative to the size of the latents.
    wall: seconds from the start of the workers to the end of the last unit.
    working: seconds from the first ready worker to the end of the last unit.
    worker_seconds: seconds for which workers were ready, summed over the workers.
    busy_last_minute: the share of the workers' time over the last minute in which models ran; None after the run.
    """

    seconds: Seconds = field(default_factory=Seconds)
    counts: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    precision_error: float = 0.0
    wall: float = 0.0
    working: float = 0.0
    worker_seconds: float = 0.0
    busy_last_minute: float | None = None

    def add(self, done: UnitReport) -> None:
        """Add a unit that succeeded."""
        self.seconds = self.seconds + done.seconds
        self.rejects.update(done.rejects)
        self.filtered.update(done.filtered)
        self.texts.update(done.texts)
        self.precision_error = max(self.precision_error, done.precision_error)
        self.counts["units"] += 1
        for name in COUNTS:
            self.counts[name] += getattr(done, name)

    @property
    def rate(self) -> float:
        """Images encoded per second from the first ready worker to the end of the run; 0 until the run ends."""
        working = self.working or self.wall
        return self.counts["encoded"] / working if working else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the devices' time by the stage that it went to, summing to 1; empty without units.

        A device encodes, or it has no images: then it waits for another stage.
        """
        spent = self.seconds
        stages = {
            "reading": spent.idle_reading,
            "opening": spent.idle_opening,
            "encoding": spent.encode,
            "writing": spent.idle_writing,
        }
        total = sum(stages.values())
        return {name: seconds / total for name, seconds in stages.items()} if total else {}

    def describe_missing_texts(self, columns: PassthroughColumns) -> str:
        """Return how many encoded images lack each kind of text; empty if none does, or if there are no such columns.

        It is also empty if no image has such a text, but `columns` has texts of tables: captions may be there.
        """
        encoded = self.counts["encoded"]
        if encoded and self.texts and not self.texts.total():
            of_tables = [field for field in columns.from_parquet if field.name not in LABEL_COLUMNS.names]
            if any(is_text(field.type) for field in of_tables):
                return ""
            return f"none of {count_noun(encoded, 'image')} has a text ({', '.join(self.texts)})"
        missing = {name: encoded - count for name, count in self.texts.items() if count < encoded}
        return ", ".join(f"{count:,} of {encoded:,} images have no {name}" for name, count in missing.items())

    @property
    def bottleneck(self) -> str:
        """The stage with the largest share of the time."""
        shares = self.shares
        return max(shares, key=lambda name: shares[name]) if shares else "nothing"

    @property
    def device_busy(self) -> float | None:
        """The share of the workers' time in which their models ran, from 0 to 1, for the units that ended.

        None if no worker was ready.
        """
        return min(self.seconds.encode / self.worker_seconds, 1.0) if self.worker_seconds else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run.

    code: the exit code.
    stats: the content of stats.json.
    unreadable: the folders of the sources that could not be listed.
    units: the number of planned units.
    units_done_before: the number of units that were done before this run.
    left_out: the number of planned units that `--max-shards` leaves out.
    """

    code: int
    totals: RunTotals
    stats: Mapping[str, Any]
    failures: Sequence[Failure] = ()
    unreadable: Sequence[str] = ()
    units: int = 0
    units_done_before: int = 0
    left_out: int = 0


def describe_totals(totals: RunTotals) -> dict[str, Any]:
    """Return the totals as they are stored in the record of a run."""
    return {
        "counts": dict(totals.counts),
        "rejects": dict(totals.rejects),
        "filtered": dict(totals.filtered),
        "texts": dict(totals.texts),
        "seconds": dataclasses.asdict(totals.seconds),
        "bottleneck": totals.bottleneck,
        "device_busy": totals.device_busy,
        "device_busy_last_minute": totals.busy_last_minute,
        "images_per_second": totals.rate,
        "precision_error": totals.precision_error,
    }


def find_doubts(cache: Folder, vae: VaeInfo, written: Mapping[str, Any]) -> list[Finding]:
    """Return the findings of a cache's statistics that no line of the summary has. written: of stats.json."""
    found = (finding.for_cache(cache.url) for finding in find_in_records(written, vae))
    return [finding for finding in found if finding.code not in ("rejects", "enlarged")]


def print_summary(options: EncodeOptions, cache: Folder, info: CacheInfo, outcome: Outcome) -> None:
    """Print the summary of a run: its work, the content of the cache, and the units that are left.

    info: the content of cache.json.
    """
    totals, failures, units, written = outcome.totals, outcome.failures, outcome.units, outcome.stats
    counts = totals.counts
    if options.json:
        print_json(
            {
                "cache": cache.url,
                "run": {
                    **describe_totals(totals),
                    "wall_seconds": totals.wall,
                    "working_seconds": totals.working,
                },
                "units": units,
                "failed": [dataclasses.asdict(failure) for failure in failures],
                "unreadable": [to_valid_text(folder) for folder in outcome.unreadable],
                "stats": {name: written[name] for name in ("count", "rejected", "filtered", "enlarged", "digest")},
                "findings": [dataclasses.asdict(finding) for finding in find_doubts(cache, info.vae, written)],
            }
        )
        return
    lines = [describe_work(outcome)]
    lines.append(f"  cache      {cache.url}: {count_noun(written['count'], 'row')}")
    lines.append(f"  rejected   {format_counts(written['rejected'])}")
    lines += [f"             {line}" for line in name_rejects(cache)] if written["rejected"] else []
    lines += [f"  filtered   {format_counts(written['filtered'])}", f"  enlarged   {written['enlarged']:,}"]
    if missing_texts := totals.describe_missing_texts(parse_schema(info).columns):
        lines.append(f"  texts      {missing_texts}")
    if counts["fp32_fallbacks"]:
        lines.append(f"  overflowed {counts['fp32_fallbacks']:,} in half precision, and were encoded again in fp32")
    if totals.precision_error:
        lines.append(f"  precision  the latents of a self-check differ from float32 by {totals.precision_error:.2%}")
    if totals.shares:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in totals.shares.items())
        busy = "" if totals.device_busy is None else f"; the device was busy for {totals.device_busy:.0%} of the time"
        lines.append(f"  bottleneck {totals.bottleneck} ({shares}){busy}")
    lines.append(f"  digest     {written['digest']}")
    if outcome.left_out:
        done = f"{units - len(failures):,} of {units + outcome.left_out:,} done"
        lines.append(f"  units      {done}; run the same command without --max-shards for the rest")
    print("\n".join(lines), flush=True)
    log_each([format_finding(finding) for finding in find_doubts(cache, info.vae, written)], log_warning)
    if outcome.unreadable:
        folders = count_noun(len(outcome.unreadable), "folder")
        log_error(f"{folders} of the sources cannot be read: give read permission, and run the same command again")
    if failures:
        units_left = f"{len(failures):,} of {count_noun(units, 'unit')}"
        log_error(f"{units_left} failed and left images out of the cache; run the same command to retry")


def describe_work(outcome: Outcome) -> str:
    """Return the first line of the summary: the images that this run encoded, its time, and the units before it."""
    totals, images = outcome.totals, outcome.totals.counts["encoded"]
    speed = f" ({totals.rate:.1f} per second while encoding)" if images else ""
    line = f"encoded {count_noun(images, 'image')} in {totals.wall:.1f} s{speed}"
    if outcome.units_done_before:
        were = "was" if outcome.units_done_before == 1 else "were"
        line += f"; {outcome.units_done_before:,} of {count_noun(outcome.units, 'unit')} {were} done before"
    return line


def name_rejects(cache: Folder) -> list[str]:
    """Return a line with the names of the first rejects of a cache; none if they cannot be read."""
    with suppress(LatentmillError):
        rejects = list(islice(commits.read_rejects(cache), MAX_NAMES))
        names = [f"{reject['key']} in {reject['shard']}" if reject["key"] else reject["shard"] for reject in rejects]
        named = [f"{printable(name)} ({reject['reason']})" for name, reject in zip(names, rejects, strict=True)]
        return [f"{', '.join(named)}; all are in {cache.url_of(commits.REJECTS)}/"] if named else []
    return []


def explain_rejects(written: Mapping[str, Any], max_reject_rate: float, cache: str) -> str:
    """Return why the rejects of a run lead to exit code 3. written: the content of stats.json."""
    advice = f"After a repair, run `latentmill retry {cache}`"
    if damaged := written["rejected"].get(REST_OF_SHARD):
        rests = count_noun(damaged, "damaged shard")
        return f"the rest of {rests} is not encoded and cannot be counted: exit code 3. {advice}"
    rejected, samples = stats.count_samples(written)
    return (
        f"{rejected:,} of {count_noun(samples, 'sample')} ({rejected / samples:.1%}) rejected, the limit is "
        f"{100 * max_reject_rate:.3g}% (--max-reject-rate): exit code 3; the other images are in the cache. {advice}"
    )
