"""`latentmill retry`: retry the rejected samples of a cache, under other limits or with newer libraries."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import cache_spec
from jobs.cache_inputs import load_matching_vae, read_units
from jobs.common_options import describe_options, parse_source_options, parse_storage_options
from jobs.encode_spec import make_encode_spec
from jobs.entry import print_json, run_as_script
from jobs.finalize import finalize_cache
from jobs.messages import collect_secrets, configure_logging
from jobs.options import RetryOptions
from jobs.outage import make_probe
from jobs.parsing import parse
from jobs.progress import ProgressMeter
from jobs.resources import plan_resources
from jobs.run_monitor import RunMonitor
from jobs.run_recorder import RunRecorder
from jobs.run_tasks import RunResult, run_tasks
from jobs.signals import Signals, run_with_signals
from jobs.totals import RunTotals, describe_totals
from pipeline.cache.commit_scan import list_commit_names, read_summaries, remove_lost_commits
from pipeline.cache.part_info import UnitReport
from pipeline.cache.parts import read_part_record
from pipeline.cache.reader import Cache
from pipeline.cache.runs import Run
from pipeline.errors import REST_OF_SHARD
from pipeline.formats.part_record import PartRecord
from pipeline.maintenance import retry
from pipeline.weights import Vae
from pipeline.wording import count_noun, format_counts


def main(argv: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    options, _ = parse(RetryOptions, "retry", argv)
    configure_logging(options.verbose)
    message = "samples that succeeded are in the cache; run the same command to resume"
    return run_with_signals(lambda signals: run_job(options, signals), message)


def run_job(options: RetryOptions, signals: Signals) -> int:
    """Run the whole job and return its exit code. Raises Stopped if a signal ends it."""
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option), columns_version=0)
    started, wanted = find_started_inputs(cache)
    planned = read_units(options, cache, options.same_source).values()
    tasks = retry.make_tasks(planned, read_records(cache, wanted), started)
    vae = load_matching_vae(options.vae, cache)
    single_writer, totals = not cache.folder.supports_conditional_create(), RunTotals()
    cache = dataclasses.replace(cache, folder=dataclasses.replace(cache.folder, exclusive=not single_writer))
    run = Run(cache.folder, "retry", describe_options(options))
    recorder = RunRecorder(run, signals, collect_secrets(cache.folder.options, parse_source_options(options)))
    with recorder.recording():
        recorder.begin(single_writer)
        if tasks and not single_writer:
            remove_lost_commits(cache.folder, list_commit_names(cache.folder))
        recorder.update(units=len(tasks))
        result = run_retry(options, cache, vae, tasks, recorder, totals)  # the executor is closed when it returns
        recorder.update(**{**describe_totals(totals), "images_per_second": 0.0, "seconds_left": None})
        recorder.note_failures(result.failures)
        written = finalize_cache(cache.folder, cache.info, single_writer)
        code = 1 if result.failures else 0
        recorder.update(images_per_second=totals.rate)
        recorder.end("failed" if result.failures else "done", code)
    print_summary(options, tasks, totals.counts, written)
    return code


def print_summary(
    options: RetryOptions, tasks: Sequence[retry.RetryTask], counts: Counter[str], written: Mapping[str, Any]
) -> None:
    """Print the summary: the samples that were retried, and the content of the cache."""
    if options.json:
        content = {name: written[name] for name in ("rejected", "filtered", "digest")}
        print_json({"cache": options.cache, "rows": counts["rows"], **content})
        return
    retried = Counter(reason == REST_OF_SHARD for task in tasks for _, reason in task.rejected - task.superseded)
    damaged = f", and the rest of {count_noun(retried[True], 'damaged shard')}" if retried[True] else ""
    print(f"retried {count_noun(retried[False], 'rejected sample')}{damaged}")
    print(f"  rows       {counts['rows']:,} more, {written['count']:,} in all")
    print(f"  rejected   {format_counts(written['rejected'])}")
    print(f"  filtered   {format_counts(written['filtered'])}")
    print(f"  digest     {written['digest']}", flush=True)


def find_started_inputs(cache: Cache) -> tuple[set[str], list[str]]:
    """Return the paths of the inputs from which the encode command read anything before the damaged bytes.

    Also returns the files of the parts that have rejects, or supersede some.
    """
    started, wanted = set[str](), list[str]()
    for part in read_summaries(cache.folder, cache.info.identity_sha256):
        if part.reject_counts or part.supersedes:
            wanted.append(part.file)
        if not part.supersedes and (part.rows or part.filtered or part.reject_counts.keys() - {REST_OF_SHARD}):
            started.add(part.source)
    return started, sorted(wanted)


def read_records(cache: Cache, files: Sequence[str]) -> list[PartRecord]:
    """Read the records of the parts with these file names, as far as they exist."""
    records = (read_part_record(cache.folder, file, cache.info.identity_sha256) for file in files)
    return [record for record in records if record is not None]


def run_retry(
    options: RetryOptions,
    cache: Cache,
    vae: Vae,
    tasks: Sequence[retry.RetryTask],
    recorder: RunRecorder,
    totals: RunTotals,
) -> RunResult:
    """Run the tasks on the workers."""
    if not tasks:
        return RunResult()
    sizes = {task.name: len(task.rejected - task.superseded) for task in tasks}
    inputs = {task.name: task.unit.input_bytes for task in tasks}
    meter = ProgressMeter("encoded", sum(sizes.values()), size_per_image=1.0)

    with plan_resources(options, cache.info.compute.backend) as resources:
        size, form = cache_spec.inherit_compute(cache.info.compute, resources.backend, resources.device)
        compute = resources.compute(cache.info.identity.precision, size, form)
        cache_spec.note_versions(cache.folder, recorder.run.name)
        source_options = parse_source_options(options)
        openers = 1  # images are decoded one after the other, in a separate process
        encode_spec = make_encode_spec(
            cache.folder,
            cache.info,
            compute,
            options.input_limit,
            openers,
            recorder.run.name,
            source_options,
            resources.candidates(size, form),
        )
        spec = retry.RetrySpec(encode_spec)
        executor = resources.start_executor(spec, vae, len(tasks), recorder.signals.stop)
        metrics = resources.start_metrics("retry", cache.folder.url)
        monitor = RunMonitor(executor, meter, recorder, metrics, totals)

        def on_done(done: UnitReport) -> None:
            monitor.add(done, sizes[done.unit], inputs[done.unit])

        probe = make_probe(cache.folder, source_options, lambda task: task.unit.url)
        with meter.shown():
            result = run_tasks(tasks, executor, recorder.signals, on_done, monitor.tick, probe, options.stall_timeout)
            totals.working, totals.busy_last_minute = result.seconds, None
            return result


if __name__ == "__main__":
    run_as_script(main)
