"""`latentmill stats`: show the statistics of a cache, next to the constants of the VAE that made it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.cache_state import read_required_stats
from jobs.common_options import parse_storage_options
from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging
from jobs.options import StatsOptions
from jobs.parsing import parse
from latentmill.cache_info import VaeInfo
from pipeline.cache.reader import Cache
from pipeline.report.constants import pool_patches
from pipeline.report.findings import find_in_records, format_finding
from pipeline.wording import count_noun, format_counts


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options, _ = parse(StatsOptions, "stats", argv)
    configure_logging(options.verbose)
    cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    content = read_required_stats(cache, options.cache)
    vae = cache.info.vae
    findings = [finding.for_cache(options.cache) for finding in find_in_records(content, vae)]
    if options.json:
        columns, found = cache.overlays.to_dict(), [dataclasses.asdict(finding) for finding in findings]
        print_json(
            {**content, "vae": {"reference": vae.reference, **vae.constants}, "columns": columns, "findings": found}
        )
    else:
        lines = format_table(content, vae, len(cache.layout.latent_names))
        if cache.overlays.number:
            lines.append(f"columns      {cache.overlays.summary}, columns digest {cache.overlays.digest}")
        lines += [f"finding      {format_finding(finding)}" for finding in findings]
        print("\n".join(lines), flush=True)
    return 0


def format_table(content: Mapping[str, Any], vae: VaeInfo, latents_per_row: int) -> list[str]:
    """Return the lines of the report. content: stats.json. vae: the VAE's entry in cache.json."""
    images = f" of {count_noun(content['count'], 'image')} and their mirror images" if latents_per_row > 1 else ""
    lines = [f"{count_noun(latents_per_row * content['count'], 'latent')}{images}, raw, made by {vae.reference}"]
    if content["count"]:
        lines += ["", *format_channels(content, vae), "", *format_constants(content["suggested"], vae)]
        lines += ["", "bucket       latents"]
        lines += [f"{name:<12} {latents_per_row * bucket['count']:,}" for name, bucket in content["buckets"].items()]
    lines += ["", f"rejected     {format_counts(content['rejected'])}"]
    lines += [f"filtered     {format_counts(content['filtered'])}", f"enlarged     {content['enlarged']:,}"]
    lines += [f"digest       {content['digest']}"]
    return lines


def format_channels(content: Mapping[str, Any], vae: VaeInfo) -> list[str]:
    """Return a line per channel: the measured values, and the constants of the model's configuration if it has any."""
    means, stds = pool_patches(vae)
    head = f"{'channel':>7} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}"
    lines = [head + (f"   {'model mean':>10} {'model std':>10}" if means and stds else "")]
    for channel in range(len(content["mean"])):
        measured = (content[name][channel] for name in ("mean", "std", "min", "max"))
        line = f"{channel:>7} " + " ".join(f"{value:>10.4f}" for value in measured)
        if means and stds:
            line += f"   {means[channel]:>10.4f} {stds[channel]:>10.4f}"
        lines.append(line)
    return lines


def format_constants(suggested: Mapping[str, Any], vae: VaeInfo) -> list[str]:
    """Return the scaling and shift over all channels: suggested by these latents, and in the model's configuration."""
    lines = [f"{'':<16} {'suggested':>10} {'model':>10}"]
    for name in ("scaling_factor", "shift_factor"):
        suggestion, configured = (f"{v:.5f}" if v is not None else "-" for v in (suggested[name], vae.constants[name]))
        lines.append(f"{name:<16} {suggestion:>10} {configured:>10}")
    return lines


if __name__ == "__main__":
    run_as_script(main)
