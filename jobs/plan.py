"""`latentmill plan`: estimate what `encode` with the same settings would find, take and write. Nothing is written."""

import dataclasses
import random
from collections.abc import Sequence

from jobs import cache_spec
from jobs.common_options import parse_source_options, parse_storage_options
from jobs.encode import can_group_tars, inspect_sources, resolve_settings
from jobs.encode_spec import make_encode_spec
from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging, log_each, log_note, log_warning
from jobs.options import PlanOptions
from jobs.parsing import parse
from jobs.plan_summary import Estimate, describe, format_summary
from jobs.resources import count_auto_workers, count_local_resource, parse_worker_count, plan_resources
from pipeline.cache import plan
from pipeline.cache.identity import check_same_identity
from pipeline.errors import ShardError, UsageError
from pipeline.estimate.cache_bytes import LatentSize, count_parts, estimate_sizes, measure_overhead
from pipeline.estimate.images import count_by, open_all
from pipeline.estimate.sampling import count_all, draw, make_strata
from pipeline.estimate.speed import Rates, measure_encoding, measure_reading
from pipeline.flow import EncodeSpec
from pipeline.records import PreparedImage, Unit
from pipeline.sources.large_tars import leave_whole
from pipeline.sources.listing import Listing
from pipeline.sources.sidecars import match_sidecars
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from pipeline.weights import Vae
from pipeline.wording import to_flag

NO_CACHE = "memory://latentmill-plan-without-a-cache"  # nothing is written there
READ_SHARE, OPEN_SHARE = 0.5, 0.25  # of the seconds; encoding has the rest


def main(argv: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    options, given = parse(PlanOptions, "plan", argv)
    configure_logging(options.verbose)
    return run_job(options, given)


def run_job(options: PlanOptions, given: set[str]) -> int:
    """Run the whole job and return its exit code. given: the names of the options that the user set."""
    for name in ("seconds", "images_per_second", "price_per_hour"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise UsageError(f"{to_flag(name)} must be a number of 0 or more, not {getattr(options, name)}")
    place = connection.make_absolute(options.to) if options.to else NO_CACHE
    cache = Folder(place, parse_storage_options(options.storage_option))
    settings, existing, vae = resolve_settings(options, given, cache)
    inputs = inspect_sources(settings, cache, existing.identity.sources if existing else None)
    local = dataclasses.replace(settings, workers="0")  # it runs in this process, whatever the job will do
    with plan_resources(local, existing.compute.backend if existing else "torch") as resources:
        info = cache_spec.describe_cache(settings, vae, resources, existing, inputs.columns, inputs.classes)
        if existing:
            check_same_identity(cache.url, existing.identity, info.identity)
        size, form = cache_spec.inherit_compute(
            info.compute, resources.backend, resources.device, settings.batch_size, settings.encoder_form
        )
        compute = resources.compute(info.identity.precision, size, form)
    source_options = parse_source_options(settings)
    openers = settings.open_workers or settings.cpus_per_worker
    spec = make_encode_spec(cache, info, compute, settings.input_limit, openers, "plan", source_options)
    units = plan_units(cache, inputs.listing, spec, can_group_tars(info))
    estimate = make_estimate(options, units[: options.max_shards or None], inputs.listing, spec, vae)
    facts = describe(options, estimate, count_workers(options, compute.device))
    print_json(facts) if options.json else print(format_summary(facts), flush=True)
    return 0


def plan_units(cache: Folder, listing: Listing, spec: EncodeSpec, group_tars: bool) -> list[Unit]:
    """Return the units of a new cache. Large tars are left whole, because their ranges cost requests."""
    sidecars = dataclasses.replace(match_sidecars(listing.files, spec.layout.columns.texts), metadata=listing.metadata)
    units, _, notes = plan.compare_with_plan(
        cache, listing.files, sidecars, [], listing.sources, False, False, leave_whole, group_tars
    )
    log_each(notes, log_note)
    return units


def make_estimate(
    options: PlanOptions, units: Sequence[Unit], listing: Listing, spec: EncodeSpec, vae: Vae
) -> Estimate:
    """Draw a sample of the units, open and encode it, and estimate the rest."""
    rows = {file.path: file.manifest.rows for file in listing.files if file.manifest}
    strata, rng = make_strata(units, rows), random.Random(options.seed)
    drawn = draw(strata, spec, rng, READ_SHARE * options.seconds)
    errors = list[str]()
    counts = [count_all(stratum, items, spec, rng, errors) for stratum, items in zip(strata, drawn, strict=True)]
    errors += [item.error for items in drawn for item in items if item.error]
    if errors and not any(count.images for count in counts):
        raise ShardError(errors[0])
    errors = list(dict.fromkeys(errors))
    log_each(errors, log_warning)
    opening = open_all(drawn, counts, spec, OPEN_SHARE * options.seconds)
    rows_found = [(item.result.bucket, item.weight) for item in opening.all if isinstance(item.result, PreparedImage)]
    buckets = count_by(rows_found)
    latent = LatentSize(vae.config.latent_channels, vae.config.downscale)
    total = sum(count.images for count in counts)
    kept = sum(buckets.values()) / total if total else 0.0
    parts = count_parts(strata, [kept * count.images for count in counts], spec.rows_per_part)
    overhead = measure_overhead(opening, spec, latent)
    left = (1 - READ_SHARE - OPEN_SHARE) * options.seconds
    named, is_gpu = options.images_per_second, spec.compute.device == "cuda"
    rates = Rates(
        read=measure_reading(drawn),
        open=opening.count / opening.seconds if opening.seconds else None,
        encode=named or measure_encoding(vae, spec, opening, buckets, left),
        on_cores=spec.compute.device == "cpu" and not named,
        streams=spec.units_in_flight,
        device_share=min(1.0, options.gpus_per_worker) if is_gpu and not named else 1.0,
    )
    local_workers = max(1.0, count_local_resource("GPU") / options.gpus_per_worker) if is_gpu else 1.0
    sizes = estimate_sizes(opening, spec, latent, overhead, parts)
    return Estimate(strata, counts, len(errors), drawn, opening, rates, sizes, parts, spec, local_workers)


def count_workers(options: PlanOptions, device: str) -> int:
    """Return the number of workers of the job, at least 1; auto: as many as a local Ray starts on this machine."""
    workers = parse_worker_count(options.workers)
    if workers is None and device != "mps":  # which has one worker, in this process
        return count_auto_workers(options, device, count_local_resource)
    return workers or 1


if __name__ == "__main__":
    run_as_script(main)
