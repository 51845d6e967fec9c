"""`latentmill retry`: the rejected samples of a cache once more, under other limits or with newer libraries."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import cache_spec
from jobs.entry import print_json, run_as_script
from jobs.logbook import Logbook
from jobs.messages import secrets_in, show
from jobs.open_cache import finish, matching_vae, units
from jobs.options import RetryOptions, as_record, parse, source_options, storage_options
from jobs.progress import Meter, say_each, say_unit
from jobs.resources import place
from jobs.run_units import Driven, Signals, drive, until_stopped
from pipeline.cache import stats
from pipeline.cache.identity import NAME
from pipeline.cache.parts import inspect
from pipeline.cache.reader import Cache
from pipeline.cache.runs import Run
from pipeline.errors import REST
from pipeline.formats.record import Standing
from pipeline.maintenance import retry
from pipeline.records import UnitReport
from pipeline.storage import store
from pipeline.weights import Vae


def main(argv: Sequence[str]) -> int:
    """Run the job; the exit code."""
    options, _ = parse(RetryOptions, "retry", argv)
    show(options.verbose)
    told = "what succeeded is in the cache, the same command goes on"
    return until_stopped(lambda signals: run_job(options, signals), told)


def run_job(options: RetryOptions, signals: Signals) -> int:
    """The whole job; its exit code. Raises Stopped where a signal ends it."""
    cache = Cache.open(options.cache, storage_options(options.storage_option))
    parts = list(stats.parts(cache.folder, cache.content["identity_sha256"]))
    planned = units(options, cache, options.same_source).values()
    tasks = retry.tasks(planned, rejecting(cache, parts), begun(parts))
    vae = matching_vae(options.vae, cache)
    weak, counts = not cache.folder.promises(), Counter[str]()
    cache = dataclasses.replace(cache, folder=dataclasses.replace(cache.folder, exclusive=not weak))
    run = Run(cache.folder, "retry", as_record(options))
    log = Logbook(run, signals, secrets_in(cache.folder.options, source_options(options)))
    with log.kept():
        log.begin(weak)
        log.tell(units=len(tasks))
        driven = encode(options, cache, vae, tasks, log, counts)  # its engine is closed by now
        log.tell(counts=dict(counts), images_per_second=0.0, seconds_left=None)
        say_each([f"failed: unit {failure.name}: {failure.error}" for failure in driven.failures], logging.ERROR)
        written = finish(cache.folder, cache.content, weak)
        code = 1 if driven.failures else 0
        log.ended("failed" if driven.failures else "done", code)
    tell(options, tasks, counts, written)
    return code


def tell(
    options: RetryOptions, tasks: Sequence[retry.RetryTask], counts: Counter[str], written: Mapping[str, Any]
) -> None:
    """The summary: what was tried, and what the cache holds now."""
    if options.json:
        content = {name: written[name] for name in ("rejected", "digest")}
        print_json({"cache": options.cache, "rows": counts["rows"], **content})
        return
    left = ", ".join(f"{count} {reason}" for reason, count in written["rejected"].items()) or "none"
    tried = Counter(reason == REST for task in tasks for _, reason in task.rejected - task.superseded)
    rests = f", and what follows the damage of {tried[True]:,} shards" if tried[True] else ""
    print(f"retried {tried[False]:,} rejected samples{rests}")
    print(f"  rows       {counts['rows']:,} more, {written['count']:,} in all")
    print(f"  rejected   {left}")
    print(f"  digest     {written['digest']}", flush=True)


def rejecting(cache: Cache, parts: Sequence[stats.Part]) -> list[Standing]:
    """Those parts of a cache that have rejects, or supersede some."""
    identity = cache.content["identity_sha256"]
    wanted = [part.file for part in parts if part.rejects or part.supersedes]
    found = (inspect(cache.folder, file, identity) for file in wanted)
    return [part for part in found if part is not None]


def begun(parts: Sequence[stats.Part]) -> set[str]:
    """The paths of the inputs of which the encode command read anything before a damage."""
    first = (part for part in parts if not part.supersedes)
    return {part.source for part in first if part.rows or part.filtered or part.rejects.keys() - {REST}}


def encode(
    options: RetryOptions,
    cache: Cache,
    vae: Vae,
    tasks: Sequence[retry.RetryTask],
    log: Logbook,
    counts: Counter[str],
) -> Driven:
    """Run the tasks on the replicas."""
    if not tasks:
        return Driven()
    meter = Meter("encoded", len(tasks))

    def on_done(done: UnitReport) -> None:
        say_unit(done)
        counts.update({"units": 1, "rows": done.rows, "parts": done.parts, "bytes": done.bytes})
        meter.task_done(1, done.rows, 0)

    with place(options) as where:
        compute = where.compute(cache.content["identity"]["precision"])
        cache_spec.note_versions(cache.folder, log.run.name)
        limits, threads = options.input_limit, options.cpus_per_worker
        encoding = cache_spec.encode_job(
            cache.folder, cache.content, compute, limits, threads, log.run.name, source_options(options)
        )
        job = retry.RetryJob(encoding)
        engine = where.start(job, vae, len(tasks), log.signals.stop)

        def on_tick() -> None:
            meter.tick(engine.pictures, engine.waiting_for)
            log.tell(counts=dict(counts), **meter.facts)

        def probe(task: retry.RetryTask) -> None:
            store.check_answers(cache.folder.at(NAME), cache.folder.options)
            store.check_answers(task.unit.url, source_options(options))

        with meter.shown():
            return drive(tasks, engine, log.signals, on_done, on_tick, probe, options.patience)


if __name__ == "__main__":
    run_as_script(main)
