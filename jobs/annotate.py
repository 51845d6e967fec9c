"""`latentmill annotate`: add columns to a cache that exists, without encoding anything again."""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.cache_state import check_has_rows
from jobs.common_options import parse_columns, parse_limits, parse_source_options, parse_storage_options
from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging, log_info, log_note
from jobs.options import AnnotateOptions
from jobs.parsing import parse
from jobs.progress import ProgressMeter
from jobs.signals import run_with_signals
from latentmill import __version__
from latentmill.overlays import Overlays
from pipeline.annotation.current import list_current_inputs, select_refreshed
from pipeline.annotation.join import KEY, SHARD, ColumnJoin
from pipeline.annotation.part_rows import is_exact_in_tars, read_part_rows
from pipeline.annotation.publish import check_types, check_values, publish_overlays, publish_version
from pipeline.annotation.sources import SourceSpec, read_columns
from pipeline.cache.reader import Cache
from pipeline.errors import SourceError, UsageError
from pipeline.formats.schema import RESERVED_NAMES
from pipeline.prefetch import map_in_order
from pipeline.readers.column_table import TABLE_EXTENSIONS, ColumnTable
from pipeline.records import ListedFile, extension, path_below_root, source_name
from pipeline.sources.listing import abbreviate, list_sources
from pipeline.text import printable
from pipeline.wording import count_noun


def main(argv: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    options, _ = parse(AnnotateOptions, "annotate", argv)
    configure_logging(options.verbose)
    if bool(options.from_) == options.refresh_columns:
        raise UsageError("annotate needs either --from TABLE or --refresh-columns")
    if options.from_ and options.source:
        raise UsageError("--source has no effect with --from; leave it out")
    if options.refresh_columns and options.unmatched != "keep":
        raise UsageError("--unmatched has no effect with --refresh-columns, which keeps the columns of missing samples")
    return run_with_signals(lambda signals: run_job(options), "run the same command to add the columns")


def run_job(options: AnnotateOptions) -> int:
    """Run the whole job and return its exit code. Raises Stopped if a signal ends it."""
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    exclusive = cache.folder.supports_conditional_create()
    cache = dataclasses.replace(cache, folder=dataclasses.replace(cache.folder, exclusive=exclusive))
    files = cache.files()
    check_has_rows(options.cache, files)
    with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
        if options.refresh_columns:
            return refresh(options, cache, files, Path(folder))
        return annotate(options, cache, files, Path(folder))


def annotate(options: AnnotateOptions, cache: Cache, files: Sequence[str], folder: Path) -> int:
    """Add the columns of a table. folder: for temporary files."""
    table = open_table(options, cache)
    path = table.files[0].path  # the name of a folder does not depend on where it lies
    name = printable(path_below_root(path) if len(table.files) == 1 else source_name(path))
    join = ColumnJoin(name, folder, table.convert)
    for rows in table.read():
        check_names(rows.schema.names, name)
        check_values(rows, name)
        join.add_table(rows)
    join.close_table()
    check_columns(options, join.schema, name)
    check_types(join.schema)
    current = cache.overlays.add_to(cache.layout.columns.schema)
    kept = [item for item in current if item.name in join.schema.names]
    if options.unmatched != "keep":
        kept = []
    if lost := [item.name for item in kept if not is_exact_in_tars(item.type, item.name, cache)]:
        raise UsageError(
            f"rows without a row in {name} cannot keep their values of {', '.join(lost)}, because tars do not have "
            f"them exactly: add --unmatched null"
        )
    add_parts(join, cache, files, pa.schema(kept))
    join.join()
    check_matches(options, join)
    overlays, created = publish(cache, join, join.schema, name, len(files))
    print_summary(options, join, join.schema, overlays, created, {})
    return 0


def refresh(options: AnnotateOptions, cache: Cache, files: Sequence[str], folder: Path) -> int:
    """Publish the columns of the sources that have changed. folder: for temporary files."""
    columns, left = select_refreshed(cache, parse_columns(options.columns))
    for reason, names in left.items():
        log_note(f"not refreshed, because {reason}: {', '.join(names)}")
    if not columns.schema.names:
        raise UsageError(f"the cache {options.cache} has no columns to refresh")
    inputs, missing = list_current_inputs(cache, options.source, parse_source_options(options))
    described = cache.info.identity
    spec = SourceSpec(
        source_options=parse_source_options(options),
        layout=dataclasses.replace(cache.layout, columns=columns),
        image_column=described.image_column,
        key_column=described.key_column,
        source_rules=described.sources,
        limits=parse_limits(options.input_limit),
    )
    join = ColumnJoin("the source", folder)
    if described.key_column is None and any(unit.kind in ("parquet", "arrow") for unit in inputs):
        log_note("keys of tables are numbers of rows, so rows must be where they were when they were encoded")
    meter = ProgressMeter("read", len(inputs))

    def on_input(samples: int) -> None:
        meter.task_done(1, samples, 0)
        meter.tick(meter.finished_images, "")

    with meter.shown():
        rejected, damaged = read_columns(inputs, spec, join.add_table, on_input)
    join.close_table()
    for message in damaged:
        log_note(f"damaged: {message}; the samples after that keep their columns")
    add_parts(join, cache, files, columns.schema)
    join.join()
    changed = pa.schema([item for item in join.schema if join.counts.changed[item.name]])
    overlays, created = cache.overlays, False
    if changed.names:
        overlays, created = publish(cache, join, changed, "", len(files))
    if missing:
        log_note(f"planned inputs that do not exist any more: {len(missing):,} ({abbreviate(missing)})")
    print_summary(options, join, changed, overlays, created, rejected)
    return 0


def open_table(options: AnnotateOptions, cache: Cache) -> ColumnTable:
    """Return the table of `--from`. Raises UsageError or SourceError if it has another format, or does not exist."""
    storage = parse_source_options(options)
    listed = list_sources((options.from_,), storage, excluded=cache.folder.url).files
    is_single = len(listed) == 1 and listed[0].is_named
    files: list[ListedFile] = [file for file in listed if is_single or extension(file.path) == "parquet"]
    if not files:
        raise SourceError(f"there is no Parquet file in {options.from_}")
    if is_single and extension(files[0].path) not in TABLE_EXTENSIONS:
        known = ", ".join(f".{name}" for name in TABLE_EXTENSIONS)
        raise UsageError(f"--from {options.from_}: a table is a file with one of the extensions {known}")
    wanted = parse_columns(options.columns)
    names = None if wanted is None else {KEY, SHARD, *wanted}
    return ColumnTable(files, storage, parse_limits(options.input_limit), names)


def check_names(names: Iterable[str], table: str) -> None:
    """Raise UsageError for a column that has the name of one that `encode` writes."""
    if taken := sorted((RESERVED_NAMES - {KEY, SHARD}) & set(names)):
        text = f"{table} has the column {taken[0]}, whose values are those of the image and its latent"
        raise UsageError(f"{text}; rename it, or leave it out with --columns")


def check_columns(options: AnnotateOptions, schema: pa.Schema, table: str) -> None:
    """Raise UsageError unless the table has every column of `--columns`, and at least one besides `key` and `shard`."""
    wanted = parse_columns(options.columns) or ()
    if lacking := [name for name in wanted if name not in (*schema.names, KEY, SHARD)]:
        raise UsageError(f"--columns: {table} has no column {', '.join(lacking)}")
    if not schema.names:
        raise UsageError(f"{table} has no column besides {KEY} and {SHARD}")


def add_parts(join: ColumnJoin, cache: Cache, files: Sequence[str], current: pa.Schema) -> None:
    """Add the rows of all parts to a join, with the values that the columns `current` have now."""
    meter = ProgressMeter("joined", len(files))
    with meter.shown(), ThreadPoolExecutor(4, thread_name_prefix="part") as pool:
        for part in map_in_order(pool, lambda file: read_part_rows(cache, file, current), files, window=4):
            join.add_part(part)
            meter.task_done(1, len(part.rows), 0)
            meter.tick(meter.finished_images, "")


def check_matches(options: AnnotateOptions, join: ColumnJoin) -> None:
    """Note the rows of either side without a match. Raises UsageError for `--unmatched error`, or if none matches."""
    counts, name = join.counts, join.name
    problems = []
    if unused := counts.table_rows - counts.used:
        rows, verb = count_noun(unused, "row"), "matches" if unused == 1 else "match"
        problems.append(f"{rows} of {name} {verb} no row of the cache, such as {describe_row(counts.unused)}")
    if unmatched := counts.rows - counts.matched:
        rows = f"{count_noun(unmatched, 'row')} of the cache {'has' if unmatched == 1 else 'have'} no row in {name}"
        then = {"keep": "; values are kept, and new columns are null", "null": "; the columns are null there"}
        problems.append(f"{rows}, such as {describe_row(counts.unmatched)}{then.get(options.unmatched, '')}")
    if not counts.matched:
        raise UsageError(f"no row of the cache has a row in {name}: {'; '.join(problems)}")
    if problems and options.unmatched == "error":
        raise UsageError("; ".join(problems))
    for problem in problems:
        log_note(problem)


def describe_row(row: Sequence[str]) -> str:
    """Return a shard and a key, or a key alone, for a message."""
    *shard, key = map(printable, row)
    return f"the key {key}" + (f" of {shard[0]}" if shard else "")


def publish(cache: Cache, join: ColumnJoin, schema: pa.Schema, table: str, count: int) -> tuple[Overlays, bool]:
    """Publish the joined columns. count: of the parts. Returns the newest columns, and whether a version is new."""
    meter = ProgressMeter("written", count)

    def parts() -> Iterable[Any]:
        for part in join.read_parts():
            meter.task_done(1, len(part.table), 0)
            meter.tick(meter.finished_images, "")
            yield part

    with meter.shown():
        published = publish_overlays(cache.folder, parts(), schema)
    return publish_version(cache.folder, published, schema, table, __version__)


def print_summary(
    options: AnnotateOptions,
    join: ColumnJoin,
    schema: pa.Schema,
    overlays: Overlays,
    created: bool,
    rejected: Counter[str] | dict[str, int],
) -> None:
    """Print the counts, the version and the columns digest."""
    counts = join.counts
    facts: dict[str, Any] = {"rows": counts.rows, "matched": counts.matched}
    if options.refresh_columns:
        changed = {name: count for name, count in sorted(counts.changed.items()) if count}
        facts |= {"changed": counts.changed_rows, "changed_columns": changed, "rejected": dict(rejected)}
    else:
        facts |= {"table_rows": counts.table_rows, "unused": counts.table_rows - counts.used}
    if options.json:
        columns = {item.name: str(item.type) for item in schema}
        version = {"version": overlays.number, "created": created, "digest": overlays.digest, "columns": columns}
        print_json({"cache": options.cache, **facts, **version})
        return
    if options.refresh_columns:
        print(f"refreshed the columns of {count_noun(counts.matched, 'row')}, of which {counts.changed_rows:,} changed")
        missing = counts.rows - counts.matched
        if missing:
            example = describe_row(counts.unmatched)
            print(
                f"  missing    {count_noun(missing, 'row')} at the source, such as {example}; they keep their columns"
            )
        if rejected:
            print(f"  rejected   {', '.join(f'{count:,} {reason}' for reason, count in sorted(rejected.items()))}")
    else:
        print(f"annotated {count_noun(counts.matched, 'row')} of {counts.rows:,}")
    if schema.names:
        names = (f"{item.name} ({counts.changed[item.name]:,})" for item in schema)
        print(f"  columns    {', '.join(names if options.refresh_columns else schema.names)}")
    if not created:
        log_info("these columns are in the cache already")
    if overlays.number:
        print(f"  version    {overlays.number}")
        print(f"  digest     {overlays.digest}", flush=True)


if __name__ == "__main__":
    run_as_script(main)
