"""`latentmill encode`: encode images into a cache of latents. Running the same command again resumes the job."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from jobs import cache_spec
from jobs.common_options import (
    describe_options,
    parse_columns,
    parse_limits,
    parse_source_options,
    parse_storage_options,
)
from jobs.encode_options import EncodeOptions
from jobs.encode_spec import make_encode_spec
from jobs.entry import run_as_script
from jobs.executor import TaskCounts
from jobs.finalize import finalize_cache
from jobs.left_out_tars import LeftOutPlanner
from jobs.messages import collect_secrets, configure_logging, log_each, log_info, log_note, log_warning
from jobs.outage import make_probe
from jobs.parsing import parse
from jobs.progress import ProgressMeter
from jobs.resources import ResourcePlan, plan_resources
from jobs.run_monitor import RunMonitor
from jobs.run_recorder import RunRecorder
from jobs.run_tasks import run_tasks
from jobs.scheduler import Failure
from jobs.signals import Signals, run_with_signals
from jobs.skipped_inputs import SkippedInputs
from jobs.totals import Outcome, RunTotals, describe_totals, explain_rejects, print_summary
from jobs.transform_options import refuse_fixed_options, resolve_recipe
from pipeline import tuning
from pipeline.cache import identity, plan, stats
from pipeline.cache.commit_log import LogWriter
from pipeline.cache.commit_scan import list_commit_names, remove_lost_commits, select_unfinished
from pipeline.cache.identity import CacheInfo, SourceRules
from pipeline.cache.left_out import plan_left_out, read_left_out
from pipeline.cache.part_info import UnitReport
from pipeline.cache.parts import find_unit_files, read_superseded
from pipeline.cache.runs import Run
from pipeline.errors import REST_OF_SHARD, JobError, SourceError, UsageError
from pipeline.flow import EncodeSpec
from pipeline.formats.schema import PassthroughColumns
from pipeline.readers import compression
from pipeline.records import ListedFile, Unit
from pipeline.sources import units as unit_files
from pipeline.sources.columns import find_columns
from pipeline.sources.labels import find_classes, make_label_schemas
from pipeline.sources.large_tars import Boundaries, divide_large_tars
from pipeline.sources.listing import Listing, abbreviate, list_sources
from pipeline.sources.manifest import find_manifests
from pipeline.sources.metadata import TableReader, find_tables
from pipeline.sources.planned_files import estimate_bytes_per_image, without_etags
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.text import printable, to_valid_text
from pipeline.weights import Vae, load_vae
from pipeline.wording import count_noun
from vae.load import is_single_file

CAPTIONS = {"caption", "captions", "tags", "cap"}  # extensions of captions that are not read by default


def main(argv: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    options, given = parse(EncodeOptions, "encode", argv)
    configure_logging(options.verbose)
    message = f"the cache is consistent; run the same command to resume: latentmill encode ... --to {options.to}"
    return run_with_signals(lambda signals: run_job(options, given, signals), message)


def run_job(options: EncodeOptions, given: set[str], signals: Signals) -> int:
    """Run the whole job and return its exit code. Raises Stopped if a signal ends it.

    given: the names of the options that the user set.
    """
    cache = Folder(connection.make_absolute(options.to), parse_storage_options(options.storage_option))
    options, existing, vae = resolve_settings(options, given, cache)
    inputs = inspect_sources(options, cache, existing.identity.sources if existing else None)
    with plan_resources(options, existing.compute.backend if existing else "torch") as resources:
        wanted = cache_spec.describe_cache(options, vae, resources, existing, inputs.columns, inputs.classes)
        info = identity.create_or_load(cache, wanted)
        outcome = run_encode(options, cache, info, vae, inputs.listing, resources, signals)
    print_summary(options, cache, info, outcome)
    return outcome.code


def resolve_settings(
    options: EncodeOptions, given: set[str], cache: Folder
) -> tuple[EncodeOptions, CacheInfo | None, Vae]:
    """Return the checked options, the cache.json of an existing cache, and the VAE. given: as of `run_job`."""
    if {"resolution", "buckets"} <= given:
        raise UsageError("--resolution is for squares and --buckets for many shapes: give only one of them")
    if "resolution" in given and options.resolution < 1:
        raise UsageError(f"--resolution {options.resolution} is not a size in pixels: give at least 1")
    existing = identity.read_cache_json(cache)
    if existing is not None:
        options = cache_spec.inherit_unset(options, given, existing.identity)
    refuse_fixed_options(options, given)
    options = resolve_recipe(options)
    if options.vae_config and not is_single_file(options.vae):
        raise UsageError(f"--vae-config is for single files, but {options.vae} has its own config.json; leave it out")
    vae = load_vae(options.vae, cache.options, options.vae_config or (existing.vae.config if existing else None))
    log_each(vae.notes, log_note)
    cache_spec.check_options(options, given, vae)
    return options, existing, vae


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """The files of the sources, and the columns that are copied from them. classes: of `--label-from-folder`."""

    listing: Listing
    columns: PassthroughColumns
    classes: tuple[str, ...] | None


def inspect_sources(options: EncodeOptions, cache: Folder, recorded: SourceRules | None) -> Inputs:
    """Return the inputs. recorded: the rules of the existing cache; None for a new one.

    Raises SourceError without inputs, and UsageError for a new cache if an option has no effect on these inputs.
    """
    source_options, rules = parse_source_options(options), cache_spec.make_source_rules(options)
    listing = list_sources(options.source, source_options, cache.url, rules.include, rules.exclude)
    limits = parse_limits(options.input_limit)
    images, keys = options.image_column or None, options.key_column or None
    reader = TableReader(source_options, limits, rules.text_encoding, images)
    metadata = find_tables(listing.files, reader)
    image_root = connection.make_absolute(options.image_root).rstrip("/") if options.image_root else ""
    manifests = find_manifests(metadata.files, reader, keys, image_root)
    listing = dataclasses.replace(listing, files=manifests.files, metadata=metadata.index)
    classes, notes = None, list[str]()
    if options.label_from_folder:
        classes, notes = find_classes(listing.files, recorded.classes if recorded else None, metadata)
    log_each([*listing.notes, *metadata.notes, *manifests.notes, *notes], log_note)
    shards = listing.files
    inputs = unit_files.group_inputs(shards)
    archives = compression.find_archives(shards)
    if not inputs:
        problem = f"there are no tars, zips, Parquet or Arrow files, or images in {' '.join(options.source)}"
        raise SourceError(f"{problem}: {archives}" if archives else problem)
    has_metadata = bool(metadata.index.for_images)
    cache_spec.check_input_options(options, inputs.keys(), has_metadata, is_new=recorded is None)
    if archives:
        log_note(archives)
    log_each(unit_files.describe_special_shards(shards), log_note)
    tables = [*metadata.schemas, *manifests.schemas, *make_label_schemas(classes)]
    wanted, captions = parse_columns(options.columns), rules.caption_extensions
    if others := unit_files.count_other_files(shards, (*captions, *(wanted or ()))):
        kinds = ((f".{name}" if name else "without an extension", count) for name, count in sorted(others.items()))
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
        hint = "; --caption-extensions turns text files into columns" if CAPTIONS & others.keys() else ""
        log_note(f"passed over files that are neither shards nor images: {counts}{hint}")
    columns = find_columns(shards, inputs, source_options, images, wanted, limits, keys, captions, tables)
    return Inputs(listing, columns, classes)


def run_encode(
    options: EncodeOptions,
    cache: Folder,
    info: CacheInfo,
    vae: Vae,
    listing: Listing,
    resources: ResourcePlan,
    signals: Signals,
) -> Outcome:
    """Encode the units that are missing in a cache."""
    single_writer, totals = not cache.supports_conditional_create(), RunTotals()
    cache = dataclasses.replace(cache, exclusive=not single_writer)  # the workers' copies have it as well
    secrets = collect_secrets(cache.options, parse_source_options(options))
    recorder = RunRecorder(Run(cache, "encode", describe_options(options)), signals, secrets)
    failures: Sequence[Failure] = ()
    with recorder.recording():
        recorder.begin(single_writer)
        units, noticed = plan_units(options, cache, info, listing)
        planned, units = len(units), units[: options.max_shards or None]
        committed = list_commit_names(cache)
        pending = select_unfinished(committed, units)
        if pending and not single_writer:
            remove_lost_commits(cache, committed)
        if options.same_source:  # ETags and times are ignored on the workers' disks as well
            pending = [without_etags(unit) for unit in pending]
        log_each(noticed, log_note)
        if unreadable := describe_unreadable(listing):
            log_each(unreadable, log_warning)
            recorder.note_error(unreadable[0])
        recorder.log_only(f"{count_noun(len(units), 'unit')} planned, {len(pending):,} not done")
        recorder.update(units=len(units), pending=len(pending), noticed=noticed, plan=plan.hash_plan_files(cache))
        done_before = len(units) - len(pending)
        if pending:
            failures = encode_pending(options, cache, info, vae, units, pending, resources, recorder, totals)
        resources.close()
        # encoding has ended, so there is no throughput any more
        recorder.update(**{**describe_totals(totals), "images_per_second": 0.0, "seconds_left": None})
        recorder.note_failures(failures)
        if not failures:
            check_commits(cache, pending)
        written = finalize_cache(cache, info, single_writer)
        code = 1 if listing.unreadable else choose_exit_code(failures, written, options.max_reject_rate)
        if code == 3:
            log_warning(explain_rejects(written, options.max_reject_rate, cache.url))
        recorder.update(**describe_totals(totals))
        recorder.end("failed" if code == 1 else "done", code)
    return Outcome(
        code=code,
        totals=totals,
        stats=written,
        failures=failures,
        unreadable=listing.unreadable,
        units=done_before + len(pending),
        units_done_before=done_before,
        left_out=planned - len(units),
    )


def plan_units(
    options: EncodeOptions, cache: Folder, info: CacheInfo, listing: Listing
) -> tuple[list[Unit], list[str]]:
    """Plan the inputs that are not planned yet. Returns all units, and notes. The list of files is emptied."""
    texts, is_new, is_same = identity.parse_schema(info).columns.texts, options.new_source, options.same_source
    divide, group_tars = partial(divide_tars, options), can_group_tars(info)
    units, noticed = plan.extend_plan(
        cache, listing.files, listing.sources, is_new, is_same, texts, listing.metadata, divide, group_tars
    )
    listing.files.clear()  # there may be millions, and the units have what is needed of them
    return units + plan_left_out(cache, units, read_left_out(cache, units)), noticed


def encode_pending(
    options: EncodeOptions,
    cache: Folder,
    info: CacheInfo,
    vae: Vae,
    units: Sequence[Unit],
    pending: list[Unit],
    resources: ResourcePlan,
    recorder: RunRecorder,
    totals: RunTotals,
) -> Sequence[Failure]:
    """Run the pending units on the workers. Returns the units that failed for good.

    units: all planned units. pending: receives the tars that groups leave out, which are then units of their own.
    """
    spec = describe_workers(options, cache, info, pending, resources, recorder.run.name)
    executor = resources.start_executor(spec, vae, len(pending), recorder.signals.stop)
    running = {unit.name: unit for unit in pending}
    meter = ProgressMeter("encoded", sum(unit.input_bytes for unit in pending), estimate_bytes_per_image(pending))
    metrics, started = resources.start_metrics("encode", cache.url, len(units) - len(pending)), time.perf_counter()
    monitor = RunMonitor(executor, meter, recorder, metrics, totals)
    skipped, left_out, log = SkippedInputs(), LeftOutPlanner(cache, units, options.same_source), LogWriter(cache)

    def on_done(done: UnitReport) -> None:
        log.add(done.summaries)
        skipped.add(done, running[done.unit].path)
        left_out.add(done)
        input_bytes = running[done.unit].input_bytes
        monitor.add(done, input_bytes, input_bytes)

    def on_tick(task_counts: TaskCounts) -> None:
        monitor.tick(task_counts)
        write_log(log)

    def find_more() -> list[Unit]:
        more = left_out.plan()
        running.update((unit.name, unit) for unit in more)
        pending.extend(more)
        return more

    probe = make_probe(cache, parse_source_options(options), lambda unit: unit.url)
    with meter.shown():
        try:
            result = run_tasks(
                pending, executor, recorder.signals, on_done, on_tick, probe, options.stall_timeout, find_more=find_more
            )
            totals.working = result.seconds
            return result.failures
        finally:
            totals.wall, totals.busy_last_minute = time.perf_counter() - started, None
            write_log(log, is_last=True)
            log_each(skipped.describe(), log_note)
            log_each(skipped.find_unused_tables(), log_warning)
            log_each(tuning.describe_choices(cache) if spec.candidates else (), log_info)


def can_group_tars(info: CacheInfo) -> bool:
    """Return whether small tars become units together: not if their columns come from files beside them.

    In a part of WebDataset, a key may occur only once, but two tars may have the same one.
    """
    return info.identity.container == "parquet" and not identity.parse_schema(info).columns.from_parquet.names


def describe_workers(
    options: EncodeOptions, cache: Folder, info: CacheInfo, pending: Sequence[Unit], resources: ResourcePlan, run: str
) -> EncodeSpec:
    """Return the specification of the workers that encode these units. run: the name of the run."""
    size, form = cache_spec.inherit_compute(
        info.compute, resources.backend, resources.device, options.batch_size, options.encoder_form
    )
    compute, candidates = resources.compute(info.identity.precision, size, form), resources.candidates(size, form)
    cache_spec.note_differences(info.compute, compute, candidates)
    cache_spec.note_versions(cache, run)
    openers, source_options = resources.count_openers(options.open_workers), parse_source_options(options)
    spec = make_encode_spec(cache, info, compute, options.input_limit, openers, run, source_options, candidates)
    spec = dataclasses.replace(spec, remote_openers=resources.plan_remote_openers(options.remote_openers))
    return add_existing_parts(spec, pending)


def write_log(log: LogWriter, is_last: bool = False) -> None:
    """Write the finished units into the commit log if that is due. An error is only shown: a scan adds them later."""
    error = log.write() if is_last or log.is_due else None
    if error is not None:
        log_info(f"{error}; the run goes on, and adds these units to the commit log at its end")


def divide_tars(options: EncodeOptions, files: Sequence[ListedFile]) -> Boundaries:
    """Return the boundaries of the large tars among the files that are to be planned."""
    boundaries = divide_large_tars(files, parse_source_options(options), parse_limits(options.input_limit))
    if boundaries:
        log_info(f"large tars, which are read in ranges: {len(boundaries):,} ({abbreviate(boundaries)})")
    return boundaries


def add_existing_parts(spec: EncodeSpec, pending: Sequence[Unit]) -> EncodeSpec:
    """Return the specification with what exists of the pending units. The files of the cache are listed once."""
    standing = find_unit_files(spec.cache, {unit.name for unit in pending})
    files = chain.from_iterable(standing.values())
    superseded = read_superseded(spec.cache, spec.identity_sha256, standing.keys(), files)
    return dataclasses.replace(spec, superseded=superseded, standing=standing)


def describe_unreadable(listing: Listing) -> list[str]:
    """Return a line for each folder of the sources that cannot be listed."""
    return [
        f"folder not readable, its images are not encoded: {printable(to_valid_text(folder))}"
        for folder in listing.unreadable
    ]


def check_commits(cache: Folder, units: Sequence[Unit]) -> None:
    """Raise JobError if a unit that this run completed is not in the cache: the workers see another storage."""
    if missing := select_unfinished(list_commit_names(cache), units) if units else ():
        raise JobError(
            f"{count_noun(len(missing), 'unit')} reported done, but missing from {cache.url}: the workers do not share "
            "this filesystem; use a shared disk or an object store"
        )


def choose_exit_code(failures: Sequence[Failure], written: Mapping[str, Any], max_reject_rate: float) -> int:
    """Return 0 if all is done, 1 if units failed, 3 if more is rejected than `--max-reject-rate` or is uncountable."""
    if failures:
        return 1
    if REST_OF_SHARD in written["rejected"]:
        return 3
    rejected, samples = stats.count_samples(written)
    return 3 if samples and rejected / samples > max_reject_rate else 0


if __name__ == "__main__":
    run_as_script(main)
