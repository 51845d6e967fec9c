"""`latentmill encode`: images in, a cache of latents out. The same command again does only what is missing."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import cache_spec
from jobs.entry import print_json, run_as_script
from jobs.logbook import RunRecorder
from jobs.messages import collect_secrets, configure_logging
from jobs.open_cache import finalize_cache
from jobs.options import (
    EncodeOptions,
    options_as_record,
    parse,
    parse_limits,
    parse_source_options,
    parse_storage_options,
)
from jobs.pace import WorkerTime
from jobs.passed_over import SkippedInputs
from jobs.progress import ProgressMeter, log_each, log_info, log_unit
from jobs.resources import ResourcePlan, plan_resources
from jobs.run_units import Signals, run_tasks, run_with_signals
from jobs.scheduler import Failure
from pipeline.cache import commits, identity, plan, stats
from pipeline.cache.parts import superseded_by_retry
from pipeline.cache.runs import Run
from pipeline.errors import REST_OF_SHARD, JobError, SourceError, UsageError
from pipeline.formats.schema import PassthroughColumns
from pipeline.readers import compression
from pipeline.records import Seconds, Unit, UnitReport
from pipeline.sources import changes
from pipeline.sources import units as unit_files
from pipeline.sources.columns import find_columns
from pipeline.sources.listing import Listing, list_sources
from pipeline.sources.units import is_table_log, make_units
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.weights import Vae, load_vae
from vae.load import is_single_file


@dataclass(kw_only=True)
class RunTotals:
    """What the run has done so far."""

    seconds: Seconds = field(default_factory=Seconds)
    counts: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    wall: float = 0.0  # seconds from the start of the replicas to the end of the last unit
    working: float = 0.0  # the same from the moment the first replica was ready
    worker_seconds: float = 0.0  # for which replicas were ready, summed over the replicas

    def add(self, done: UnitReport) -> None:
        self.seconds = self.seconds + done.seconds
        self.rejects.update(done.rejects)
        self.texts.update(done.texts)
        names = ("samples", "rows", "filtered", "enlarged", "parts", "adopted", "encoded", "fp32_fallbacks", "bytes")
        self.counts.update({"units": 1, **{name: getattr(done, name) for name in names}})

    @property
    def rate(self) -> float:
        """Images encoded per second over the whole run, once replicas were ready; 0 until it ends."""
        working = self.working or self.wall
        return self.counts["encoded"] / working if working else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Where the time of the units' own threads went. They open no images: they wait for those that do."""
        spent = self.seconds
        parts = {
            "reading": spent.read,
            "opening": spent.starved,
            "encoding": spent.queue + spent.encode,
            "writing": spent.write,
        }
        whole = sum(parts.values())
        return {name: seconds / whole for name, seconds in parts.items()} if whole else {}

    @property
    def without(self) -> str:
        """How many of the encoded images have no text of a kind that others have; empty where that is none."""
        encoded = self.counts["encoded"]
        lacking = {name: encoded - count for name, count in self.texts.items() if count < encoded}
        return ", ".join(f"{count:,} of {encoded:,} images have no {name}" for name, count in lacking.items())

    @property
    def bottleneck(self) -> str:
        """What most of that time went to."""
        shares = self.shares
        return max(shares, key=lambda name: shares[name]) if shares else "nothing"

    @property
    def device_busy(self) -> float | None:
        """The share of the replicas' time in which their models ran, for the units that ended; None without any."""
        return min(self.seconds.encode / self.worker_seconds, 1.0) if self.worker_seconds else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run. written: stats.json. units: of the cache, in all."""

    code: int
    totals: RunTotals
    written: Mapping[str, Any]
    failures: Sequence[Failure] = ()
    units: int = 0
    already: int = 0


def main(argv: Sequence[str]) -> int:
    """Run the job; the exit code."""
    options, given = parse(EncodeOptions, "encode", argv)
    configure_logging(options.verbose)
    told = f"the cache is whole, the same command goes on: latentmill encode ... --to {options.to}"
    return run_with_signals(lambda signals: run_job(options, given, signals), told)


def run_job(options: EncodeOptions, given: set[str], signals: Signals) -> int:
    """The whole job; its exit code. Raises Stopped where a signal ends it."""
    if {"resolution", "buckets"} <= given:
        raise UsageError("--resolution is for squares and --buckets for many shapes: give one of them")
    cache = Folder(connection.absolute(options.to), parse_storage_options(options.storage_option))
    standing = identity.read_cache_json(cache)
    if standing is not None:
        options = cache_spec.inherit_unset(options, given, standing["identity"])
    if options.vae_config and not is_single_file(options.vae):
        raise UsageError(f"--vae-config is for single files: {options.vae} has a config.json of its own")
    vae = load_vae(options.vae, cache.options, options.vae_config or (standing and standing["vae"]["config"]))
    cache_spec.check_options(options, vae)
    listing, columns = look_at_sources(options, cache)
    with plan_resources(options) as where:
        content = identity.create_or_load(cache, cache_spec.describe_cache(options, vae, where, standing, columns))
        outcome = run_encode(options, cache, content, vae, listing, where, signals)
    print_summary(options, cache, outcome)
    return outcome.code


def look_at_sources(options: EncodeOptions, cache: Folder) -> tuple[Listing, PassthroughColumns]:
    """The files of the sources, and the columns that come along."""
    where = parse_source_options(options)
    listing = list_sources(options.source, where, cache.url)
    log_each([f"note: {line}" for line in listing.notes])
    shards = listing.shards
    units = make_units(shards)
    archives = compression.find_archives(shards)
    if not units:
        nothing = f"there are no tar shards, Parquet files or images in {' '.join(options.source)}"
        raise SourceError(f"{nothing}: {archives}" if archives else nothing)
    if archives:
        log_info(f"note: {archives}")
    if count := sum(map(is_table_log, shards)):
        log_info(f"note: passed over {count} Parquet files of Delta Lake's and Spark's own, in _delta_log and the like")
    wanted = cache_spec.wanted_columns(options)
    if others := unit_files.count_other_files(shards, wanted or ()):
        counts = ", ".join(f"{count} .{name}" for name, count in sorted(others.items()))
        log_info(f"note: passed over files that are neither shards nor images: {counts}")
    return listing, find_columns(
        shards, units, where, options.image_column or None, wanted, parse_limits(options.input_limit)
    )


def run_encode(
    options: EncodeOptions,
    cache: Folder,
    content: Mapping[str, Any],
    vae: Vae,
    listing: Listing,
    where: ResourcePlan,
    signals: Signals,
) -> Outcome:
    """Do what is missing in a cache."""
    single_writer, totals = not cache.supports_conditional_create(), RunTotals()
    cache = dataclasses.replace(cache, exclusive=not single_writer)  # on the workers' machines, too
    secrets = collect_secrets(cache.options, parse_source_options(options))
    log = RunRecorder(Run(cache, "encode", options_as_record(options)), signals, secrets)
    failures: Sequence[Failure] = ()
    with log.kept():
        log.begin(single_writer)
        units, noticed = plan.extend_plan(
            cache,
            listing.shards,
            listing.sources,
            options.new_source,
            options.same_source,
            texts=identity.parse_schema(content).columns.texts,
        )
        units = units[: options.max_shards or None]
        finished = commits.finished_units(cache)
        pending = [unit for unit in units if unit.name not in finished]
        if options.same_source:  # whatever ETags or times say, on the workers' disks as well
            pending = [changes.without_etags(unit) for unit in pending]
        log_each([f"note: {line}" for line in noticed])
        log.keep(f"{len(units)} units are planned, {len(pending)} of them are not done")
        log.tell(units=len(units), pending=len(pending), noticed=noticed, plan=plan.hash_plan_files(cache))
        if pending:
            failures = encode_pending(options, cache, content, vae, pending, where, log, totals)
        where.close()
        log.tell(
            **{**describe_totals(totals), "images_per_second": 0.0, "seconds_left": None}
        )  # nothing is encoded any more
        log_each([f"failed: unit {failure.name}: {failure.error}" for failure in failures], logging.ERROR)
        if not failures:
            check_commits(cache, units)
        written = finalize_cache(cache, content, single_writer)
        code = exit_code(failures, written, options.max_reject_rate)
        log.tell(**describe_totals(totals))
        log.ended("failed" if failures else "done", code)
    return Outcome(
        code=code,
        totals=totals,
        written=written,
        failures=failures,
        units=len(units),
        already=len(units) - len(pending),
    )


def encode_pending(
    options: EncodeOptions,
    cache: Folder,
    content: Mapping[str, Any],
    vae: Vae,
    pending: list[Unit],
    where: ResourcePlan,
    log: RunRecorder,
    totals: RunTotals,
) -> Sequence[Failure]:
    """Run the pending units on the replicas. Returns those that failed for good."""
    compute = where.compute(content["identity"]["precision"], options.slice_size, options.batch_size, options.compile)
    cache_spec.note_differences(content["compute"], dataclasses.asdict(compute))
    cache_spec.note_versions(cache, log.run.name)
    limits, threads = options.input_limit, options.cpus_per_worker
    job = cache_spec.make_encode_spec(
        cache, content, compute, limits, threads, log.run.name, parse_source_options(options)
    )
    retried = superseded_by_retry(cache, content["identity_sha256"], {unit.name for unit in pending})
    job = dataclasses.replace(job, superseded=retried)
    engine = where.start(job, vae, len(pending), log.signals.stop)
    sizes = {unit.name: unit.share for unit in pending}
    meter = ProgressMeter("encoded", sum(sizes.values()))
    workers = WorkerTime(len(engine.workers))
    started = time.perf_counter()
    passed_over, paths = SkippedInputs(), {unit.name: unit.path for unit in pending}

    def on_done(done: UnitReport) -> None:
        totals.add(done)
        passed_over.add(done, paths[done.unit])
        log_unit(done)
        meter.task_done(sizes[done.unit], done.encoded, sum(done.rejects.values()))

    def on_tick() -> None:
        meter.tick(engine.images, engine.waiting_for)
        workers.note(len(engine.workers))
        totals.worker_seconds = workers.seconds
        log.tell(**{**describe_totals(totals), **meter.facts})

    def probe(unit: Unit) -> None:
        connection.check_reachable(cache.at(identity.NAME), cache.options)
        connection.check_reachable(unit.url, parse_source_options(options))

    with meter.shown():
        try:
            driven = run_tasks(pending, engine, log.signals, on_done, on_tick, probe, options.stall_timeout)
            totals.working = driven.seconds
            return driven.failures
        finally:
            totals.wall = time.perf_counter() - started
            for line in passed_over.lines():
                log_info(f"note: {line}")


def check_commits(cache: Folder, units: Sequence[Unit]) -> None:
    """Raise JobError where a unit that is done is not in the cache: the workers do not see the same storage as we."""
    missing = {unit.name for unit in units} - commits.finished_units(cache)
    if missing:
        raise JobError(
            f"{len(missing)} units were done, but are not in {cache.url}: the workers run on machines that see another "
            f"disk there; use a shared disk, or an object store"
        )


def exit_code(failures: Sequence[Failure], written: Mapping[str, Any], max_reject_rate: float) -> int:
    """0 done, 1 work left undone, 3 more rejected than `--max-reject-rate`, or what cannot be counted."""
    if failures:
        return 1
    if REST_OF_SHARD in written["rejected"]:
        return 3
    rejected = sum(written["rejected"].values())
    samples = written["count"] + written["filtered"] + rejected
    return 3 if samples and rejected / samples > max_reject_rate else 0


def describe_totals(totals: RunTotals) -> dict[str, Any]:
    """What a run's record keeps of its work."""
    return {
        "counts": dict(totals.counts),
        "rejects": dict(totals.rejects),
        "texts": dict(totals.texts),
        "seconds": dataclasses.asdict(totals.seconds),
        "bottleneck": totals.bottleneck,
        "device_busy": totals.device_busy,
        "images_per_second": totals.rate,
    }


def print_summary(options: EncodeOptions, cache: Folder, outcome: Outcome) -> None:
    """The summary: what was done, what the cache holds now, and what is left undone."""
    totals, failures, units, written = outcome.totals, outcome.failures, outcome.units, outcome.written
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
                "stats": {name: written[name] for name in ("count", "rejected", "filtered", "enlarged", "digest")},
                "doubts": stats.find_implausible(written),
            }
        )
        return
    before = f" ({outcome.already} of {units} units were done before)" if outcome.already else ""
    lines = [f"encoded {counts['encoded']:,} images in {totals.wall:.1f} s, {totals.rate:.1f} a second{before}"]
    lines.append(f"  cache      {cache.url}: {written['count']:,} rows")
    reasons = ", ".join(f"{count} {reason}" for reason, count in written["rejected"].items())
    lines.append(f"  rejected   {sum(written['rejected'].values()):,}" + (f": {reasons}" if reasons else ""))
    lines.append(f"  filtered   {written['filtered']:,}    enlarged {written['enlarged']:,}")
    if totals.without:
        lines.append(f"  texts      {totals.without}")
    if counts["fp32_fallbacks"]:
        lines.append(f"  overflowed {counts['fp32_fallbacks']:,} in half precision, and were encoded again in fp32")
    if totals.shares:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in totals.shares.items())
        busy = "" if totals.device_busy is None else f"; the device was busy for {totals.device_busy:.0%} of the time"
        lines.append(f"  bottleneck {totals.bottleneck} ({shares}){busy}")
    lines.append(f"  digest     {written['digest']}")
    print("\n".join(lines), flush=True)
    for doubt in stats.find_implausible(written):
        log_info(f"warning: {doubt}", logging.WARNING)
    if outcome.code == 3 and REST_OF_SHARD not in written["rejected"]:
        log_info(
            f"warning: more than {options.max_reject_rate:.3g} of all samples are rejected (--max-reject-rate)",
            logging.WARNING,
        )
    if failures:
        log_info(
            f"{len(failures)} of {units} units are not in the cache; the same command tries them again", logging.ERROR
        )


if __name__ == "__main__":
    run_as_script(main)
