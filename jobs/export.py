"""`latentmill export`: write the latents of a cache as the files of a trainer."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jobs.cache_state import check_has_rows
from jobs.common_options import parse_storage_options
from jobs.cores import count_cores
from jobs.entry import print_json, run_as_script
from jobs.executor import Executor
from jobs.local_executor import LocalExecutor
from jobs.messages import configure_logging, log_each, log_error, log_note, log_warning
from jobs.options import ExportOptions
from jobs.outage import make_probe
from jobs.parsing import parse
from jobs.process_executor import ProcessExecutor
from jobs.progress import ProgressMeter
from jobs.resources import parse_worker_count
from jobs.run_tasks import run_tasks
from jobs.scheduler import Failure
from jobs.signals import Signals, run_with_signals
from latentmill.cache_files import check_digest, read_stats
from pipeline.cache import parts, plan
from pipeline.cache.commit_scan import read_summaries
from pipeline.cache.reader import Cache
from pipeline.errors import CacheError, UsageError
from pipeline.exports.checks import check_folder, check_overlays, list_settings, make_job, parse_sizes
from pipeline.exports.exporter import (
    ExportReport,
    ExportSpec,
    ExportTask,
    ExportWorker,
    PartNames,
    find_equal,
)
from pipeline.exports.formats import FORMATS
from pipeline.exports.manifest import (
    ExportedPart,
    ExportManifest,
    name_manifest,
    open_manifest,
    read_done,
    read_records,
    write_manifest,
)
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.wording import count_noun

ROWS_PER_PROCESS = 4096  # a process takes seconds to start, in which this one exports thousands of rows
REJECTED = 3  # the exit code of a job that left rows out


def main(argv: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    options, _ = parse(ExportOptions, "export", argv)
    configure_logging(options.verbose)
    return run_with_signals(lambda signals: run_job(options, signals), "run the same command to export the rest")


def run_job(options: ExportOptions, signals: Signals) -> int:
    """Run the whole job and return its exit code. Raises Stopped if a signal ends it."""
    storage = parse_storage_options(options.storage_option)
    cache = Cache.open(options.cache, storage)
    check_digest(cache.folder, None, verify=False)  # a job that still runs would add parts to the cache
    summaries = sorted(read_summaries(cache.folder, cache.info.identity_sha256), key=lambda part: part.file)
    summaries = [part for part in summaries if part.file.startswith(f"{parts.DATA}/")]
    check_has_rows(options.cache, summaries)
    sizes = parse_sizes(name for part in summaries for name in part.tally)
    job = make_job(cache, options.format, sizes, options.caption_column, options.label_column, options.with_shard)
    out = Folder(connection.make_absolute(options.to), storage)
    if f"{out.url.rstrip('/')}/".startswith(f"{cache.folder.url.rstrip('/')}/"):
        raise UsageError("--to is in the cache itself; export to another folder")
    columns = cache.overlays.schema.names if FORMATS[options.format].all_columns else job.columns
    check_folder(out, options.format)
    check_overlays(cache, columns, [part.file for part in summaries])
    names = ("caption_column", "label_column", "with_shard")
    wanted = ExportManifest(
        format=options.format,
        options={**{name: getattr(job, name) for name in names}, "columns_digest": cache.overlays.digest_of(columns)},
        cache=options.cache,
        identity=cache.info.identity_sha256,
        parts=tuple(ExportedPart(part.file, part.sha256, part.rows) for part in summaries),
    )
    images = list_images(cache) if FORMATS[options.format].prepared else {}
    manifest = open_manifest(out, wanted)
    spec = ExportSpec(
        job=job,
        format=options.format,
        out=out,
        ignores_case=out.read_if_exists(name_manifest(options.format).upper()) is not None,
    )
    export = Export(options, spec, manifest, images, signals)
    failures = export.run()
    return finish(export, failures, list_settings(cache, options.format, sizes))


class Export:
    """A running export.

    images: the paths of the image files of each unit, for a format that needs them. done: the records of the parts that
    were exported before, by number. reports: of the parts that this run exports.
    """

    def __init__(
        self,
        options: ExportOptions,
        spec: ExportSpec,
        manifest: ExportManifest,
        images: Mapping[str, tuple[str, ...]],
        signals: Signals,
    ) -> None:
        self.options, self.spec, self.manifest, self.images, self.signals = options, spec, manifest, images, signals
        self.done = read_done(spec.out, manifest)
        self.reports: list[ExportReport] = []

    def run(self) -> Sequence[Failure]:
        """Export the parts that are left, and return those that failed."""
        tasks = [
            ExportTask(number, part.file, part.rows, images=self.images.get(parts.parse_unit_name(part.file), ()))
            for number, part in enumerate(self.manifest.parts)
            if number not in self.done
        ]
        if not tasks:
            return ()
        with self.start_executor(len(tasks)) as executor:
            if FORMATS[self.spec.format].per_row:
                self.check_names(executor)
            self.write_manifest(state="started")
            meter = ProgressMeter("exported", sum(self.manifest.parts[task.part].rows for task in tasks), 1.0)

            def on_done(report: ExportReport) -> None:
                self.reports.append(report)
                rows = report.written + report.existing
                meter.task_done(rows + report.refused, rows, report.refused)

            with meter.shown():
                return self.run_tasks(tasks, executor, on_done, lambda counts: meter.tick(executor.images, ""))

    def write_manifest(self, **changes: Any) -> None:
        """Write the manifest with these changes."""
        self.manifest = dataclasses.replace(self.manifest, **changes)
        write_manifest(self.spec.out, self.manifest)

    def run_tasks(
        self, tasks: Sequence[ExportTask], executor: Executor, on_done: Any, on_tick: Any
    ) -> Sequence[Failure]:
        """Run tasks on the executor, and return those that failed."""
        probe = make_probe(self.spec.job.cache.folder, self.spec.out.options, lambda task: self.spec.out.url)
        return run_tasks(tasks, executor, self.signals, on_done, on_tick, probe).failures

    @contextmanager
    def start_executor(self, tasks: int) -> Iterator[Executor]:
        """Start the executor of `--workers`; auto: a process per core, as far as there is work for them."""
        workers = parse_worker_count(self.options.workers)
        if workers is None:
            workers = min(count_cores(), tasks, sum(part.rows for part in self.manifest.parts) // ROWS_PER_PROCESS)
            workers = workers if workers > 1 else 0
        stop = self.signals.stop
        if workers and connection.is_memory(connection.get_filesystem(self.spec.out.url, self.spec.out.options)[0]):
            raise UsageError("memory:// works with --workers 0 only")
        executor: Executor = (
            ProcessExecutor(self.spec, workers, stop) if workers else LocalExecutor(self.spec.build(stop), 1, stop)
        )
        try:
            yield executor
        finally:
            executor.close()

    def check_names(self, executor: Executor) -> None:
        """Raise UsageError if two rows would have the same files."""
        found: list[PartNames] = []
        tasks = [
            ExportTask(number, part.file, part.rows, names_only=True) for number, part in enumerate(self.manifest.parts)
        ]
        if failures := self.run_tasks(tasks, executor, found.append, lambda counts: None):
            raise CacheError(f"cannot read {failures[0].name}: {failures[0].error}")
        worker = ExportWorker(self.spec, self.signals.stop)
        for one, other in find_equal(sorted(found, key=lambda part: part.part)):
            rows = [self.find_row(worker, *place) for place in (one, other)]
            if rows[0][2] == rows[1][2]:
                (shard, key, name), (other_shard, other_key, _) = rows
                raise UsageError(
                    f"two rows would have the files of one image, {name}: {key} of {shard}, and {other_key} of "
                    f"{other_shard}; "
                    + (
                        "encode them into separate caches, and export each to its own folder"
                        if self.options.with_shard
                        else "use --with-shard, or encode them into separate caches"
                    )
                )

    def find_row(self, worker: ExportWorker, part: int, index: int) -> tuple[str, str, str]:
        """Return shard, key and the name of the image of a row."""
        file = self.manifest.parts[part]
        task = ExportTask(part, file.file, file.rows, names_only=True)
        return next(row for place, row in enumerate(worker.name_rows(task)) if place == index)


def list_images(cache: Cache) -> dict[str, tuple[str, ...]]:
    """Return the paths of the image files of each unit. Raises UsageError if the cache is not of folders of images."""
    units = plan.read_plan(cache.folder)
    if others := [unit.path for unit in units if unit.kind != "folder"]:
        raise UsageError(
            f"the format is for folders of images, but the cache {cache.folder.url} is of {others[0]}; unpack the "
            "images, and encode their folder into a new cache"
        )
    return {unit.name: unit.paths for unit in units}


def finish(export: Export, failures: Sequence[Failure], settings: dict[str, object]) -> int:
    """Write the files of the whole export, print the summary, and return the exit code."""
    out, form = export.spec.out, FORMATS[export.spec.format]
    numbers = [report.part for report in export.reports]
    new = zip(numbers, read_records(out, export.spec.format, numbers), strict=True)
    records = [record for _, record in sorted({**export.done, **dict(new)}.items())]
    if not failures:
        entries = [entry for record in records for entry in record.entries]
        for name, data in form.finish(export.spec.job, entries):
            out.replace(name, data)
        digest = (read_stats(export.spec.job.cache.folder) or {}).get("digest")
        export.write_manifest(state="finished", digest=digest)
    earlier = sum(record.rows for record in export.done.values())
    refused = [row for record in records for row in record.refused]
    summary = {
        "format": export.spec.format,
        "to": export.options.to,
        "exported": sum(report.written for report in export.reports),
        "skipped": earlier + sum(report.existing for report in export.reports),
        "refused": len(refused),
        "kept_captions": sum(report.kept for report in export.reports),
        "refusals": [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in refused],
        "settings": settings,
        "failed": [dataclasses.asdict(failure) for failure in failures],
    }
    print_summary(export, summary)
    log_each([f"refused: {key} of {shard}: {reason}" for shard, key, reason in refused], log_warning)
    log_each([f"failed: {failure.name}: {failure.error}" for failure in failures], log_error)
    return 1 if failures else REJECTED if refused else 0


def print_summary(export: Export, summary: dict[str, Any]) -> None:
    """Print the counts, and the settings with which the trainer finds the files."""
    if export.options.json:
        print_json(summary)
        return
    counts = f"exported {count_noun(summary['exported'], 'row')} for {FORMATS[export.spec.format].program}"
    print(f"{counts} ({summary['skipped']:,} were there already, {summary['refused']:,} refused)")
    print(f"  files      {export.spec.out.url}")
    if summary["settings"]:
        print("  settings   " + ", ".join(f"{name} = {show(value)}" for name, value in summary["settings"].items()))
    if summary["kept_captions"]:
        log_note(f"{count_noun(summary['kept_captions'], 'caption file')} existed already and were left as they are")


def show(value: object) -> str:
    """Return a value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    run_as_script(main)
