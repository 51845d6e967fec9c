"""`latentmill report`: write one HTML page that shows a cache, and what looks wrong in it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jobs.cache_inputs import list_files_with_rows, load_matching_vae, read_units
from jobs.cache_state import read_required_stats
from jobs.common_options import parse_source_options, parse_storage_options
from jobs.encode_spec import make_encode_spec
from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging
from jobs.options import ReportOptions
from jobs.parsing import parse
from jobs.resources import choose_device
from pipeline.cache.identity import describe_settings
from pipeline.cache.reader import Cache
from pipeline.cache.rows import RowRef, choose_rows
from pipeline.cache.runs import read_runs, utc_now
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import LatentmillError, UsageError
from pipeline.report import plots, records
from pipeline.report.constants import expect_channels
from pipeline.report.equal_rows import find_equal_rows
from pipeline.report.findings import Finding, find_in_records, sort_findings
from pipeline.report.page import MAX_BUCKETS, Page, Section, check_packages, render_page
from pipeline.report.recheck import Compared, compare_rows, decode_pairs, find_in_compared
from pipeline.report.sample import Sample, read_sample
from pipeline.report.sample_findings import find_in_sample
from pipeline.report.workers import WorkerRates, find_slow_workers, read_worker_rates
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.text import printable_lines
from pipeline.wording import count_noun


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code. What looks wrong does not change it."""
    options, _ = parse(ReportOptions, "report", argv)
    configure_logging(options.verbose)
    if min(options.sample, options.images) < 0:
        raise UsageError("--sample and --images must not be negative")
    check_packages()
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    content = read_required_stats(cache, options.cache)
    page = make_page(options, cache, content)
    html = render_page(page).encode()
    folder, _, name = connection.make_absolute(options.to).rpartition("/")
    Folder(folder, cache.folder.options).replace(name, html)
    if options.json:
        print_json(
            {
                "cache": options.cache,
                "report": options.to,
                "bytes": len(html),
                "findings": [dataclasses.asdict(finding) for finding in page.findings],
            }
        )
    else:
        lines = [f"{finding.severity:<8} {finding.sentence}" for finding in page.findings]
        print(printable_lines("\n".join([*(lines or ["nothing looks wrong"]), f"report   {options.to}"])), flush=True)
    return 0


def make_page(options: ReportOptions, cache: Cache, content: Mapping[str, Any]) -> Page:
    """Read the records, a sample and some images, and return what the page shows. content: of stats.json."""
    means, stds = expect_channels(cache.info.vae, len(content.get("mean", ())))
    sample = read_sample(cache, means, stds, options.sample) if content["count"] else None
    encoder, compared, why = compare_images(options, cache) if content["count"] and options.images else (None, [], "")
    found = find_in_compared(compared) + find_in_records(content, cache.info.vae)
    found += records.find_unusual_parts(records.read_parts(cache))
    if sample is not None:
        found += [*find_in_sample(sample), *(find_equal_rows(cache) if len(sample) < sample.total else [])]
    runs = read_runs(cache.folder).values()
    rates = read_worker_rates(runs)
    found += find_slow_workers(rates)
    findings = [finding.for_cache(options.cache) for finding in records.name_hosts(cache, sort_findings(found))]
    return Page(
        cache=options.cache,
        made=f"{cache.info.vae.reference}, {count_noun(content['count'], 'row')}; report of {utc_now()}",
        tiles=describe_tiles(content, compared, findings),
        findings=findings,
        facts=describe_facts(cache, content, runs),
        compared=compared,
        pairs={finding.code: decode_pairs(cache, finding, encoder) for finding in findings} if encoder else {},
        why_no_images=why,
        plots=draw_plots(content, sample, means, stds, runs, rates),
        agreement=describe_agreement(findings, cache, content),
        buckets=describe_buckets(content),
        runs=[describe_run(run) for run in runs],
        rejected=content["rejected"],
        reject_examples=records.read_reject_examples(cache) if content["rejected"] else {},
        sampled=describe_sample(sample, compared),
    )


def compare_images(options: ReportOptions, cache: Cache) -> tuple[LatentEncoder | None, list[Compared], str]:
    """Return the model, some rows, decoded and beside their originals, and why these are missing."""
    try:
        vae = load_matching_vae(options.vae, cache)
        units = read_units(options, cache)
        refs: list[RowRef] = choose_rows(list_files_with_rows(cache, units), options.images)
    except LatentmillError as error:
        return None, [], f"No images are shown: {error}"
    compute = ComputeConfig(
        device=choose_device(),
        precision=cache.info.identity.precision,
        batch_size=1,
        threads=max(cache.info.compute.threads, torch.get_num_threads()),
    )
    spec = make_encode_spec(
        cache.folder, cache.info, compute, options.input_limit, 1, "", parse_source_options(options)
    )
    encoder = LatentEncoder(vae, compute, spec.dtype, spec.layout.store, spec.seed, spec.tile_above)
    notes: list[str] = []
    compared = compare_rows(cache, refs, encoder, spec, notes)
    missing = sum(row.original is None for row in compared)
    texts = [f"{count_noun(missing, 'original')} cannot be read"] if missing else []
    return encoder, compared, ": ".join([*texts, *notes[:1]])


def describe_tiles(
    content: Mapping[str, Any], compared: Sequence[Compared], findings: Sequence[Finding]
) -> list[tuple[str, str]]:
    """Return the most important numbers of the cache."""
    measured = [row.psnr for row in compared if row.psnr is not None]
    alike = [row.ssim for row in compared if row.ssim is not None]
    return [
        ("rows", f"{content['count']:,}"),
        ("findings", str(len(findings))),
        ("rejected", f"{sum(content['rejected'].values()):,}"),
        ("files", f"{content['files']:,}"),
        *([("mean PSNR", f"{sum(measured) / len(measured):.1f} dB")] if measured else []),
        *([("mean SSIM", f"{sum(alike) / len(alike):.3f}")] if alike else []),
    ]


def describe_facts(cache: Cache, content: Mapping[str, Any], runs: Any) -> list[Section]:
    """Return how the cache was made."""
    identity, compute = cache.info.identity, cache.info.compute
    settings = describe_settings(identity)
    shown = [(name, text) for name, text in settings.items() if not name.startswith("config.") and name != "weights"]
    error, devices = records.read_precision(cache)
    last = list(runs)[-1] if runs else {}
    measured = "not measured: computed in float32 on a CPU" if error is None else f"{error:.2%} of the latents' size"
    return [
        Section(
            title="Identity",
            rows=[
                ("VAE", cache.info.vae.reference),
                ("weights", identity.weights),
                ("digest", content["digest"]),
                ("identity", cache.info.identity_sha256),
                ("numerical error", measured),
                ("computed by", ", ".join(devices) or compute.device),
                *((name, str(version)) for name, version in last.get("versions", {}).items()),
            ],
        ),
        Section(title="Settings", rows=shown),
    ]


def describe_agreement(findings: Sequence[Finding], cache: Cache, content: Mapping[str, Any]) -> str:
    """Return a sentence on whether the channels agree with the constants of the model."""
    codes = ("wrong-scaling", "wrong-range", "swapped-channels", "other-vae")
    disagreeing = [finding.sentence for finding in findings if finding.code in codes]
    if disagreeing:
        return " ".join(disagreeing)
    if not content["count"]:
        return "There are no rows."
    few = " (few rows: they need not agree)" if content["count"] < 100 else ""
    return f"The mean and the deviation of the channels agree with the constants of {cache.info.vae.reference}{few}."


def describe_buckets(content: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Return the largest buckets: name, rows, and rows relative to the largest bucket."""
    counts = sorted(((bucket["count"], name) for name, bucket in content["buckets"].items()), reverse=True)
    return [(name, count, count / counts[0][0]) for count, name in counts[:MAX_BUCKETS]]


def describe_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run for the page."""
    busy, counts = run.get("device_busy"), run.get("counts")
    images = counts.get("encoded") if isinstance(counts, Mapping) else None
    return {
        **{name: run[name] for name in ("started", "verb", "outcome")},
        "images": "" if images is None else f"{images:,}",
        "rate": f"{run.get('images_per_second') or 0:.1f}",
        "bottleneck": run.get("bottleneck") or "",
        "busy": "" if busy is None else f"{busy:.0%}",
    }


def describe_sample(sample: Sample | None, compared: Sequence[Compared]) -> str:
    """Return what the findings are based on."""
    if sample is None:
        return "The cache has no rows."
    checked = sum(row.cause is not None for row in compared)
    rows = f"all {len(sample):,}" if len(sample) == sample.total else f"a sample of {len(sample):,} of {sample.total:,}"
    again = f"; {count_noun(checked, 'image')} encoded again" if checked else "; no image was encoded again"
    more = (
        ""
        if len(sample) == sample.total
        else " Of a cache of more than 4 GiB, duplicates outside the sample are not found."
    )
    return f"From the records, {rows} rows{again}.{more}"


def draw_plots(
    content: Mapping[str, Any],
    sample: Sample | None,
    means: Sequence[float],
    stds: Sequence[float],
    runs: Any,
    rates: WorkerRates | None,
) -> dict[str, str]:
    """Return the plots of the page."""
    drawn: dict[str, str] = {}
    if sample is not None:
        drawn["moments"] = plots.draw_moments(content, means, stds)
        drawn["histograms"] = plots.draw_histograms(sample, means, stds)
        drawn["sizes"] = plots.draw_sizes(sample)
    rated = [run for run in runs if run.get("images_per_second")]
    if len(rated) > 1:
        drawn["throughput"] = plots.draw_throughput(
            [run["started"] for run in rated], [run["images_per_second"] for run in rated]
        )
    if rates is not None:
        drawn["workers"] = plots.draw_workers(rates)
    return drawn


if __name__ == "__main__":
    run_as_script(main)
