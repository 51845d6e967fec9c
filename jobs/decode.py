"""`latentmill decode`: render previews from a cache, beside the originals if these can be read."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from jobs.cache_inputs import list_files_with_rows, load_matching_vae, read_units
from jobs.common_options import parse_limits, parse_source_options, parse_storage_options
from jobs.entry import print_json, run_as_script
from jobs.executor import TaskCounts
from jobs.messages import configure_logging, log_each, log_error, log_note
from jobs.options import DecodeOptions
from jobs.parsing import parse
from jobs.progress import ProgressMeter
from jobs.resources import check_jax_settings, plan_resources
from jobs.run_tasks import run_tasks
from jobs.scheduler import Failure
from jobs.signals import Signals, run_with_signals
from pipeline.cache import identity, parts
from pipeline.cache.preprocessing import parse_transform
from pipeline.cache.reader import Cache
from pipeline.cache.rows import choose_rows
from pipeline.errors import CacheError, UsageError
from pipeline.formats.schema import PassthroughColumns
from pipeline.preview.render import Rendered, RenderReport, RenderSpec, RenderTask, make_tasks
from pipeline.sources.own_outputs import MADE_BY, REPORT
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.weights import Vae
from pipeline.wording import count_noun

# Originals are drawn without columns, so that captions that have changed since do not matter.
NO_COLUMNS = PassthroughColumns(pa.schema([]), ())


def main(argv: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    options, _ = parse(DecodeOptions, "decode", argv)
    configure_logging(options.verbose)
    return run_with_signals(
        lambda signals: run_job(options, signals), "run the same command to render all previews again"
    )


def run_job(options: DecodeOptions, signals: Signals) -> int:
    """Run the whole job and return its exit code. Raises Stopped if a signal ends it."""
    if options.limit < 0:
        raise UsageError("--limit must not be negative")
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option), columns_version=0)
    vae = load_matching_vae(options.vae, cache)
    tasks = make_tasks(choose_rows(list_files_with_rows(cache, read_units(options, cache)), options.limit))
    if not tasks:
        raise CacheError(f"the cache {options.cache} has no rows yet; encode images into it first")
    return run_render(options, cache, vae, tasks, signals)


def run_render(options: DecodeOptions, cache: Cache, vae: Vae, tasks: list[RenderTask], signals: Signals) -> int:
    """Render the sheets on the workers, write the report and print the summary."""
    out = Folder(connection.make_absolute(options.to), cache.folder.options)
    unfinished = {"made_by": MADE_BY, "cache": options.cache, "finished": False}
    write_report(out, unfinished)  # the report marks the folder as rendered, even if the job is interrupted
    done: list[RenderReport] = []
    meter = ProgressMeter("decoded", sum(len(task.rows) for task in tasks), size_per_image=1.0)

    def on_done(sheet: RenderReport) -> None:
        done.append(sheet)
        meter.task_done(len(sheet.images), len(sheet.images), 0)

    units = {row.unit.name for task in tasks for row in task.rows}
    with plan_resources(options) as resources:
        precision = "bf16" if resources.device == "cuda" else "fp32"
        if resources.backend == "jax":
            check_jax_settings(precision, tile_above=cache.info.identity.tile_above)
        spec = RenderSpec(
            cache=cache.folder,
            out=out,
            source_options=parse_source_options(options),
            transform=parse_transform(cache.info.identity),
            layout=dataclasses.replace(cache.layout, columns=NO_COLUMNS),
            image_column=cache.info.identity.image_column,
            key_column=cache.info.identity.key_column,
            tile_above=cache.info.identity.tile_above,
            limits=parse_limits(options.input_limit),
            compute=resources.compute(precision),
            with_source=True,
            source_rules=cache.info.identity.sources,
            superseded=parts.read_superseded(cache.folder, cache.info.identity_sha256, units),
        )
        executor = resources.start_executor(spec, vae, len(tasks), signals.stop)

        def on_tick(task_counts: TaskCounts) -> None:
            meter.tick(executor.images, executor.waiting_for)

        def probe(task: RenderTask) -> None:
            connection.check_reachable(cache.folder.url_of(identity.NAME), cache.folder.options)
            connection.check_reachable(out.url, out.options)

        with meter.shown():
            result = run_tasks(tasks, executor, signals, on_done, on_tick, probe, options.stall_timeout)
    report = make_report(options, sorted(done, key=lambda sheet: sheet.sheet), result.failures)
    write_report(out, report)
    print_summary(options, out, report)
    return 1 if result.failures else 0


def write_report(out: Folder, report: dict[str, Any]) -> None:
    """Write report.json. If its folder is used as a source, the rendered images are not encoded."""
    out.replace(REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")


def make_report(options: DecodeOptions, sheets: Sequence[RenderReport], failures: Sequence[Failure]) -> dict[str, Any]:
    """Return the content of report.json."""
    images: list[Rendered] = [image for sheet in sheets for image in sheet.images]
    measured = [image.psnr for image in images if image.psnr is not None]
    return {
        "made_by": MADE_BY,
        "cache": options.cache,
        "finished": True,
        "images": [dataclasses.asdict(image) for image in images],
        "sheets": [sheet.sheet for sheet in sheets],
        "psnr": describe_spread(measured),
        "notes": sorted({note for sheet in sheets for note in sheet.notes}),
        "failed": [dataclasses.asdict(failure) for failure in failures],
    }


def describe_spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return the mean, the least and the greatest of these values; None without values."""
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None


def print_summary(options: DecodeOptions, out: Folder, report: dict[str, Any]) -> None:
    """Print the summary: the sheets and the fidelity of the images."""
    if options.json:
        print_json(report)
        return
    print(f"decoded {count_noun(len(report['images']), 'image')}")
    for name in report["sheets"][:10]:
        print(f"  sheet      {out.url_of(name)}")
    if len(report["sheets"]) > 10:
        print(f"             and {len(report['sheets']) - 10} more")
    if report["psnr"]:
        print("  fidelity   PSNR {mean:.1f} dB on average, {min:.1f} to {max:.1f}".format(**report["psnr"]))
    print(f"  report     {out.url_of(REPORT)}", flush=True)
    if notes := report["notes"]:
        more = f" ({count_noun(len(notes) - 1, 'more such line')} in {REPORT})" if len(notes) > 1 else ""
        log_note(f"{notes[0]}{more}")
    log_each([f"failed: {failure['name']}: {failure['error']}" for failure in report["failed"]], log_error)


if __name__ == "__main__":
    run_as_script(main)
