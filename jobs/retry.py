"""`latentmill retry`: the rejected samples of a cache once more, under other limits or with newer libraries."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import cache_spec
from jobs.entry import print_json, run_as_script
from jobs.logbook import RunRecorder
from jobs.messages import collect_secrets, configure_logging
from jobs.open_cache import finalize_cache, load_matching_vae, read_units
from jobs.options import RetryOptions, options_as_record, parse, parse_source_options, parse_storage_options
from jobs.progress import ProgressMeter, log_each, log_unit
from jobs.resources import plan_resources
from jobs.run_units import RunResult, Signals, run_tasks, run_with_signals
from pipeline.cache import stats
from pipeline.cache.identity import NAME
from pipeline.cache.parts import inspect_part
from pipeline.cache.reader import Cache
from pipeline.cache.runs import Run
from pipeline.errors import REST_OF_SHARD
from pipeline.formats.record import PartInfo
from pipeline.maintenance import retry
from pipeline.records import UnitReport
from pipeline.storage import connection
from pipeline.weights import Vae


def main(argv: Sequence[str]) -> int:
    """Run the job; the exit code."""
    options, _ = parse(RetryOptions, "retry", argv)
    configure_logging(options.verbose)
    told = "what succeeded is in the cache, the same command goes on"
    return run_with_signals(lambda signals: run_job(options, signals), told)


def run_job(options: RetryOptions, signals: Signals) -> int:
    """The whole job; its exit code. Raises Stopped where a signal ends it."""
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    parts = list(stats.read_parts(cache.folder, cache.content["identity_sha256"]))
    planned = read_units(options, cache, options.same_source).values()
    tasks = retry.make_tasks(planned, parts_with_rejects(cache, parts), started_inputs(parts))
    vae = load_matching_vae(options.vae, cache)
    single_writer, counts = not cache.folder.supports_conditional_create(), Counter[str]()
    cache = dataclasses.replace(cache, folder=dataclasses.replace(cache.folder, exclusive=not single_writer))
    run = Run(cache.folder, "retry", options_as_record(options))
    log = RunRecorder(run, signals, collect_secrets(cache.folder.options, parse_source_options(options)))
    with log.kept():
        log.begin(single_writer)
        log.tell(units=len(tasks))
        driven = run_retry(options, cache, vae, tasks, log, counts)  # its engine is closed by now
        log.tell(counts=dict(counts), images_per_second=0.0, seconds_left=None)
        log_each([f"failed: unit {failure.name}: {failure.error}" for failure in driven.failures], logging.ERROR)
        written = finalize_cache(cache.folder, cache.content, single_writer)
        code = 1 if driven.failures else 0
        log.ended("failed" if driven.failures else "done", code)
    print_summary(options, tasks, counts, written)
    return code


def print_summary(
    options: RetryOptions, tasks: Sequence[retry.RetryTask], counts: Counter[str], written: Mapping[str, Any]
) -> None:
    """The summary: what was tried, and what the cache holds now."""
    if options.json:
        content = {name: written[name] for name in ("rejected", "digest")}
        print_json({"cache": options.cache, "rows": counts["rows"], **content})
        return
    left = ", ".join(f"{count} {reason}" for reason, count in written["rejected"].items()) or "none"
    tried = Counter(reason == REST_OF_SHARD for task in tasks for _, reason in task.rejected - task.superseded)
    rests = f", and what follows the damage of {tried[True]:,} shards" if tried[True] else ""
    print(f"retried {tried[False]:,} rejected samples{rests}")
    print(f"  rows       {counts['rows']:,} more, {written['count']:,} in all")
    print(f"  rejected   {left}")
    print(f"  digest     {written['digest']}", flush=True)


def parts_with_rejects(cache: Cache, parts: Sequence[stats.Part]) -> list[PartInfo]:
    """Those parts of a cache that have rejects, or supersede some."""
    identity = cache.content["identity_sha256"]
    wanted = [part.file for part in parts if part.rejects or part.supersedes]
    found = (inspect_part(cache.folder, file, identity) for file in wanted)
    return [part for part in found if part is not None]


def started_inputs(parts: Sequence[stats.Part]) -> set[str]:
    """The paths of the inputs of which the encode command read anything before a damage."""
    first = (part for part in parts if not part.supersedes)
    return {part.source for part in first if part.rows or part.filtered or part.rejects.keys() - {REST_OF_SHARD}}


def run_retry(
    options: RetryOptions,
    cache: Cache,
    vae: Vae,
    tasks: Sequence[retry.RetryTask],
    log: RunRecorder,
    counts: Counter[str],
) -> RunResult:
    """Run the tasks on the replicas."""
    if not tasks:
        return RunResult()
    meter = ProgressMeter("encoded", len(tasks))

    def on_done(done: UnitReport) -> None:
        log_unit(done)
        counts.update({"units": 1, "rows": done.rows, "parts": done.parts, "bytes": done.bytes})
        meter.task_done(1, done.rows, 0)

    with plan_resources(options) as where:
        compute = where.compute(cache.content["identity"]["precision"])
        cache_spec.note_versions(cache.folder, log.run.name)
        limits, threads = options.input_limit, options.cpus_per_worker
        encoding = cache_spec.make_encode_spec(
            cache.folder, cache.content, compute, limits, threads, log.run.name, parse_source_options(options)
        )
        job = retry.RetrySpec(encoding)
        engine = where.start(job, vae, len(tasks), log.signals.stop)

        def on_tick() -> None:
            meter.tick(engine.images, engine.waiting_for)
            log.tell(counts=dict(counts), **meter.facts)

        def probe(task: retry.RetryTask) -> None:
            connection.check_reachable(cache.folder.at(NAME), cache.folder.options)
            connection.check_reachable(task.unit.url, parse_source_options(options))

        with meter.shown():
            return run_tasks(tasks, engine, log.signals, on_done, on_tick, probe, options.stall_timeout)


if __name__ == "__main__":
    run_as_script(main)
