"""`latentmill decode`: decode images of a cache, beside the originals if these can be read.

choose rows -> tasks -> workers: files and a table per part -> contact sheets, report
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.cache_inputs import list_files_with_rows, load_matching_vae, read_units
from jobs.cache_state import check_has_rows
from jobs.common_options import parse_limits, parse_source_options, parse_storage_options
from jobs.entry import print_json, run_as_script
from jobs.executor import TaskCounts
from jobs.messages import configure_logging, log_each, log_error, log_note
from jobs.options import DecodeOptions
from jobs.outage import make_probe
from jobs.parsing import parse
from jobs.progress import ProgressMeter
from jobs.resources import ResourcePlan, check_jax_settings, plan_resources
from jobs.run_tasks import run_tasks
from jobs.scheduler import Failure
from jobs.signals import Signals, run_with_signals
from pipeline.cache import parts
from pipeline.cache.preprocessing import parse_transform
from pipeline.cache.reader import Cache
from pipeline.errors import IdentityError, UsageError
from pipeline.formats.schema import PassthroughColumns
from pipeline.preview import contact_sheet
from pipeline.preview.fidelity_table import FOLDER, Summary, list_done, read_tables
from pipeline.preview.render import RenderReport, RenderSpec
from pipeline.preview.selection import (
    IMAGES_PER_SHEET,
    RenderTask,
    choose_positions,
    hash_selection,
    make_tasks,
    parse_cell,
)
from pipeline.sources.own_outputs import MADE_BY, REPORT, is_report
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
    return run_with_signals(lambda signals: run_job(options, signals), "run the same command to decode the rest")


def run_job(options: DecodeOptions, signals: Signals) -> int:
    """Run the whole job and return its exit code. Raises Stopped if a signal ends it."""
    check_options(options)
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option), columns_version=0)
    vae = load_matching_vae(options.vae, cache)
    files = list_files_with_rows(cache, read_units(options, cache))
    positions = choose_positions(sum(file.rows for file in files), options.limit, options.sample, options.seed)
    tasks = make_tasks(files, positions)
    check_has_rows(options.cache, tasks)
    out = Folder(connection.make_absolute(options.to), cache.folder.options)
    settings = [options.format, options.limit, options.sample, options.seed]
    start_report(out, options, hash_selection(cache.info.identity_sha256, settings, files))
    done = find_done(out, options, len(tasks))
    missing = [task for task in tasks if task.number not in done]
    failures = render(options, cache, vae, out, missing, signals) if missing else ()
    return finish(options, out, tasks, done, failures)


def check_options(options: DecodeOptions) -> None:
    """Raise UsageError for numbers that have no meaning."""
    if options.limit < 0:
        raise UsageError("--limit must not be negative")
    if options.sample < 0:
        raise UsageError("--sample must not be negative")
    if options.seed and not options.sample:
        raise UsageError("--seed is the seed of --sample; give both")


def start_report(out: Folder, options: DecodeOptions, selection: str) -> None:
    """Write the report of a job that has not ended. It marks the folder as decoded, even if the job is interrupted.

    selection: a hash of what decides the output. Raises IdentityError if the folder has another output.
    """
    data = out.read_if_exists(REPORT)
    if data is None:
        write_report(out, {"made_by": MADE_BY, "cache": options.cache, "selection": selection, "finished": False})
    elif not is_report(data) or json.loads(data).get("selection") != selection:
        raise IdentityError(
            f"{out.url_of(REPORT)} is of other images: of another cache, of this one before it changed, or with "
            "another --format, --limit, --sample or --seed; decode into another folder"
        )


def write_report(out: Folder, report: Mapping[str, Any]) -> None:
    """Write report.json. If its folder is used as a source, the decoded images are not encoded."""
    out.replace(REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")


def find_done(out: Folder, options: DecodeOptions, tasks: int) -> set[int]:
    """Return the numbers of the parts that need not be decoded.

    With `--source`, single files without originals are decoded again. Other files keep the order in which the originals
    were read, and so might not replace those that exist.
    """
    done = list_done(out, tasks)
    if not options.source or options.format != "files":
        return set(done)
    return {part for part, images, _ in read_tables(out, done) if all(image.psnr is not None for image in images)}


def make_spec(
    options: DecodeOptions, cache: Cache, out: Folder, tasks: Sequence[RenderTask], resources: ResourcePlan
) -> RenderSpec:
    """Return the settings of the workers."""
    units = {run.unit.name for task in tasks for run in task.runs}
    precision = "bf16" if resources.device == "cuda" else "fp32"
    if resources.backend == "jax":
        check_jax_settings(precision, tile_above=cache.info.identity.tile_above)
    return RenderSpec(
        cache=cache.folder,
        out=out,
        format=options.format,
        source_options=parse_source_options(options),
        transform=parse_transform(cache.info.identity),
        layout=dataclasses.replace(cache.layout, columns=NO_COLUMNS),
        image_column=cache.info.identity.image_column,
        key_column=cache.info.identity.key_column,
        tile_above=cache.info.identity.tile_above,
        limits=parse_limits(options.input_limit),
        compute=resources.compute(precision),
        source_rules=cache.info.identity.sources,
        superseded=parts.read_superseded(cache.folder, cache.info.identity_sha256, units),
    )


def render(
    options: DecodeOptions,
    cache: Cache,
    vae: Vae,
    out: Folder,
    tasks: Sequence[RenderTask],
    signals: Signals,
) -> Sequence[Failure]:
    """Decode these parts on the workers, and return those that failed."""
    meter = ProgressMeter("decoded", sum(task.rows for task in tasks), size_per_image=1.0)

    def on_done(report: RenderReport) -> None:
        meter.task_done(report.images, report.images, 0)

    probe = make_probe(cache.folder, out.options, lambda task: out.url)
    with plan_resources(options) as resources:
        spec = make_spec(options, cache, out, tasks, resources)
        executor = resources.start_executor(spec, vae, len(tasks), signals.stop)

        def on_tick(task_counts: TaskCounts) -> None:
            meter.tick(executor.images, executor.waiting_for)

        with meter.shown():
            return run_tasks(tasks, executor, signals, on_done, on_tick, probe, options.stall_timeout).failures


def finish(
    options: DecodeOptions, out: Folder, tasks: Sequence[RenderTask], earlier: set[int], failures: Sequence[Failure]
) -> int:
    """Draw the contact sheets, write the report, print the summary, and return the exit code."""
    summary, existing = Summary(), 0
    for part, images, notes in read_tables(out, list_done(out, len(tasks))):
        summary.add(images, notes)
        existing += len(images) if part in earlier else 0
    report = {
        "made_by": MADE_BY,
        "cache": options.cache,
        "selection": json.loads(out.read(REPORT))["selection"],
        "finished": True,
        "decoded": summary.rows,
        "existing": existing,
        "images": [dataclasses.asdict(image) for image in summary.listed],
        "sheets": draw_sheets(out, tasks),
        "psnr": summary.psnr.to_dict(),
        "ssim": summary.ssim.to_dict(),
        "worst": [dataclasses.asdict(image) for image in summary.worst],
        "without_original": summary.without_original,
        "notes": sorted(summary.notes),
        "failed": [dataclasses.asdict(failure) for failure in failures],
    }
    write_report(out, report)
    print_summary(options, out, report)
    return 1 if failures else 0


def draw_sheets(out: Folder, tasks: Sequence[RenderTask]) -> list[str]:
    """Draw the contact sheets of each bucket from the cells that the workers have drawn. Returns their names."""
    names = defaultdict[str, list[str]](list)
    for cell in sorted(name for task in tasks for name in task.cells.values()):
        names[parse_cell(cell)].append(cell)
    sheets = []
    for bucket in sorted(names):
        for number, start in enumerate(range(0, len(names[bucket]), IMAGES_PER_SHEET)):
            found = map(out.read_if_exists, names[bucket][start : start + IMAGES_PER_SHEET])
            cells = [contact_sheet.decode_png(data) for data in found if data is not None]  # a failed part has none
            if cells:
                heading = f"{count_noun(len(cells), 'image')} of {bucket}: {contact_sheet.describe(cells)}"
                name = f"{number:05d}.png" if len(names) == 1 else f"{bucket}-{number:05d}.png"
                sheets.append(f"sheets/{name}")
                out.replace(sheets[-1], contact_sheet.draw_contact_sheet(cells, heading))
    return sheets


def print_summary(options: DecodeOptions, out: Folder, report: Mapping[str, Any]) -> None:
    """Print the summary: the sheets and the fidelity of the images."""
    if options.json:
        print_json(report)
        return
    existing = f" ({report['existing']:,} were there already)" if report["existing"] else ""
    print(f"decoded {count_noun(report['decoded'] - report['existing'], 'image')}{existing}")
    for name in report["sheets"][:10]:
        print(f"  sheet      {out.url_of(name)}")
    if len(report["sheets"]) > 10:
        print(f"             and {len(report['sheets']) - 10} more")
    if report["psnr"]:
        print("  fidelity   PSNR {mean:.1f} dB on average, {min:.1f} to {max:.1f}".format(**report["psnr"]))
    if report["ssim"]:
        print("             SSIM {mean:.3f} on average, {min:.3f} to {max:.3f}".format(**report["ssim"]))
    if worst := report["worst"]:
        print("  lowest     " + ", ".join(f"{image['key']} ({image['psnr']:.1f} dB)" for image in worst))
    if report["without_original"]:
        print(f"  originals  {report['without_original']:,} of {report['decoded']:,} could not be read")
    print(f"  table      {out.url_of(FOLDER)}")
    print(f"  report     {out.url_of(REPORT)}", flush=True)
    if notes := report["notes"]:
        more = f" ({count_noun(len(notes) - 1, 'more such line')} in {REPORT})" if len(notes) > 1 else ""
        log_note(f"originals not shown: {notes[0]}{more}")
    log_each([f"failed: {failure['name']}: {failure['error']}" for failure in report["failed"]], log_error)


if __name__ == "__main__":
    run_as_script(main)
