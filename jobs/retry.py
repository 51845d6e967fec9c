"""`latentmill retry`: the rejected samples of a cache once more, under other limits or with newer libraries."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import settings
from jobs.drive import Driven, Signals, drive, until_stopped
from jobs.entry import print_json, run_as_script
from jobs.logbook import Logbook
from jobs.options import RetryOptions, as_record, parse, source_options, storage_options
from jobs.place import place
from jobs.progress import Meter, say
from jobs.standing import finish, matching_vae, units
from pipeline import commit, retry, stats
from pipeline.cache import Cache
from pipeline.encode import Vae
from pipeline.records import Standing, UnitReport
from pipeline.runs import Run


def main(argv: Sequence[str]) -> int:
    """Run the job; the exit code."""
    options, _ = parse(RetryOptions, "retry", argv)
    told = "what succeeded is in the cache, the same command goes on"
    return until_stopped(lambda signals: run_job(options, signals), told)


def run_job(options: RetryOptions, signals: Signals) -> int:
    """The whole job; its exit code. Raises Stopped where a signal ends it."""
    cache = Cache.open(options.cache, storage_options(options.storage_option))
    tasks = retry.tasks(units(options, cache).values(), rejecting(cache))
    vae = matching_vae(options.vae, cache)
    weak, counts = not cache.folder.promises(), Counter[str]()
    cache = dataclasses.replace(cache, folder=dataclasses.replace(cache.folder, exclusive=not weak))
    log = Logbook(Run(cache.folder, "retry", as_record(options)), signals, lambda: {"counts": dict(counts)})
    with log.kept():
        log.begin(weak, units=len(tasks))
        driven = encode(options, cache, vae, tasks, log, counts)
        for failure in driven.failures:
            say(f"failed: unit {failure.name}: {failure.error}")
        written = finish(cache.folder, cache.content, weak, log.beat)
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
    print(f"retried {sum(len(p) for t in tasks for p in t.rejected.values()):,} rejected samples")
    print(f"  rows       {counts['rows']:,} more, {written['count']:,} in all")
    print(f"  rejected   {left}")
    print(f"  digest     {written['digest']}", flush=True)


def rejecting(cache: Cache) -> list[Standing]:
    """The parts of a cache that have rejects, and those that supersede some."""
    identity = cache.content["identity_sha256"]
    parts = [part for part in stats.parts(cache.folder, identity) if part.rejects]
    found = (commit.inspect(cache.folder, part.file, identity) for part in parts)
    return [part for part in found if part is not None] + commit.retried(cache.folder, identity)


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
        counts.update({"units": 1, "rows": done.rows, "parts": done.parts, "bytes": done.bytes})
        meter.task_done(1, done.rows, 0)

    with place(options) as where:
        compute = where.compute(cache.content["identity"]["precision"])
        limits, threads = options.input_limit, options.cpus_per_worker
        encoding = settings.encode_job(
            cache.folder, cache.content, compute, limits, threads, log.run.name, source_options(options)
        )
        job = retry.RetryJob(encoding)
        engine = where.start(job, vae, len(tasks), log.signals.stop)

        def on_tick() -> None:
            meter.tick(engine.pictures, engine.waiting_for)
            log.beat()

        with meter.shown():
            return drive(tasks, engine, log.signals, on_done, on_tick)


if __name__ == "__main__":
    run_as_script(main)
