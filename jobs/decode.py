"""`latentmill decode`: previews from a cache, beside the originals where these can be read."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging
from jobs.open_cache import files_with_rows, load_matching_vae, read_units
from jobs.options import DecodeOptions, parse, parse_limits, parse_source_options, parse_storage_options
from jobs.progress import ProgressMeter, log_each
from jobs.resources import plan_resources
from jobs.run_units import Signals, run_tasks, run_with_signals
from jobs.scheduler import Failure
from pipeline.cache import identity, parts
from pipeline.cache.reader import Cache
from pipeline.errors import CacheError, UsageError
from pipeline.formats.schema import PassthroughColumns
from pipeline.preview.render import Rendered, RenderReport, RenderSpec, RenderTask, choose_rows
from pipeline.sources.own_outputs import MADE_BY, REPORT
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.weights import Vae

NO_COLUMNS = PassthroughColumns(
    pa.schema([]), ()
)  # originals are drawn without them, whatever became of their captions


def main(argv: Sequence[str]) -> int:
    """Run the job; the exit code."""
    options, _ = parse(DecodeOptions, "decode", argv)
    configure_logging(options.verbose)
    return run_with_signals(lambda signals: run_job(options, signals), "the same command draws all of it again")


def run_job(options: DecodeOptions, signals: Signals) -> int:
    """The whole job; its exit code. Raises Stopped where a signal ends it."""
    if options.limit < 0:
        raise UsageError("--limit must not be negative")
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    vae = load_matching_vae(options.vae, cache)
    tasks = choose_rows(files_with_rows(cache, read_units(options, cache)), options.limit)
    if not tasks:
        raise CacheError(f"the cache {options.cache} has no rows yet")
    return run_render(options, cache, vae, tasks, signals)


def run_render(options: DecodeOptions, cache: Cache, vae: Vae, tasks: list[RenderTask], signals: Signals) -> int:
    """Draw the sheets on the replicas, then write the report and say what was drawn."""
    out = Folder(connection.absolute(options.to), cache.folder.options)
    begun = {"made_by": MADE_BY, "cache": options.cache, "finished": False}
    write_report(out, begun)  # marks what is drawn, also if this is cut short
    done: list[RenderReport] = []
    meter = ProgressMeter("decoded", sum(len(task.rows) for task in tasks))

    def on_done(sheet: RenderReport) -> None:
        done.append(sheet)
        meter.task_done(len(sheet.images), len(sheet.images), 0)

    drawn = {row.unit.name for task in tasks for row in task.rows}
    with plan_resources(options) as where:
        job = RenderSpec(
            cache=cache.folder,
            out=out,
            source_options=parse_source_options(options),
            transform=identity.parse_transform(cache.content["identity"]),
            layout=dataclasses.replace(cache.layout, columns=NO_COLUMNS),
            image_column=cache.content["identity"]["image_column"],
            key_column=cache.content["identity"]["key_column"],
            tile_above=cache.content["identity"]["tile_above"],
            limits=parse_limits(options.input_limit),
            compute=where.compute("fp32" if where.device != "cuda" else "bf16"),
            with_source=True,
            superseded=parts.superseded_by_retry(cache.folder, cache.content["identity_sha256"], drawn),
        )
        engine = where.start(job, vae, len(tasks), signals.stop)

        def on_tick() -> None:
            meter.tick(engine.images, engine.waiting_for)

        def probe(task: RenderTask) -> None:
            connection.check_reachable(cache.folder.at(identity.NAME), cache.folder.options)
            connection.check_reachable(out.url, out.options)

        with meter.shown():
            driven = run_tasks(tasks, engine, signals, on_done, on_tick, probe, options.stall_timeout)
    report = summary(options, sorted(done, key=lambda sheet: sheet.sheet), driven.failures)
    write_report(out, report)
    print_summary(options, out, report)
    return 1 if driven.failures else 0


def write_report(out: Folder, report: dict[str, Any]) -> None:
    """Write report.json. A source in which it lies is encoded without what was drawn."""
    out.replace(REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")


def summary(options: DecodeOptions, sheets: Sequence[RenderReport], failures: Sequence[Failure]) -> dict[str, Any]:
    """The content of report.json."""
    images: list[Rendered] = [image for sheet in sheets for image in sheet.images]
    measured = [image.psnr for image in images if image.psnr is not None]
    return {
        "made_by": MADE_BY,
        "cache": options.cache,
        "finished": True,
        "images": [dataclasses.asdict(image) for image in images],
        "sheets": [sheet.sheet for sheet in sheets],
        "psnr": spread_evenly(measured),
        "notes": sorted({note for sheet in sheets for note in sheet.notes}),
        "failed": [dataclasses.asdict(failure) for failure in failures],
    }


def spread_evenly(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, least and greatest; None of nothing."""
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None


def print_summary(options: DecodeOptions, out: Folder, report: dict[str, Any]) -> None:
    """The summary: where the sheets are, and how faithful the images."""
    if options.json:
        print_json(report)
        return
    print(f"decoded {len(report['images'])} images")
    for name in report["sheets"][:10]:
        print(f"  sheet      {out.at(name)}")
    if len(report["sheets"]) > 10:
        print(f"             and {len(report['sheets']) - 10} more")
    if report["psnr"]:
        print("  fidelity   PSNR {mean:.1f} dB on average, {min:.1f} to {max:.1f}".format(**report["psnr"]))
    print(f"  report     {out.at(REPORT)}", flush=True)
    log_each([f"note: {note}" for note in report["notes"]])
    log_each([f"failed: {failure['name']}: {failure['error']}" for failure in report["failed"]], logging.ERROR)


if __name__ == "__main__":
    run_as_script(main)
