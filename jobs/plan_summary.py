"""The result of `latentmill plan`: as one object, and as lines of text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.cores import count_cores
from jobs.options import PlanOptions
from jobs.progress import format_duration
from pipeline.cache.tally import format_bucket
from pipeline.estimate.images import SIDES, Opened, Opening, count_by, name_side
from pipeline.estimate.ratio import Count
from pipeline.estimate.sampling import Drawn, Stratum
from pipeline.estimate.speed import Rates
from pipeline.flow import EncodeSpec
from pipeline.records import Filtered, PreparedImage, Reject
from pipeline.text import printable_lines
from pipeline.wording import count_noun

BAR = 24  # characters of the longest bar of the histogram
BLOCK = 8 << 20  # bytes of a request for a tar that is read from start to end


@dataclass(frozen=True, slots=True)
class Estimate:
    """All that was found. counts: the images of each kind of inputs. damaged: inputs that were not read to their
    end because of damage. sizes: bytes of data by store and dtype.

    local_workers: how many workers share the cores of this machine; 1 if the device is a CPU.
    """

    strata: Sequence[Stratum]
    counts: Sequence[Count]
    damaged: int
    drawn: Sequence[Sequence[Drawn]]
    opening: Opening
    rates: Rates
    sizes: dict[str, dict[str, int]]
    parts: int
    spec: EncodeSpec
    local_workers: float


def describe(options: PlanOptions, estimate: Estimate, workers: int) -> dict[str, Any]:
    """Return the estimate as plain values. workers: of the job."""
    items = estimate.opening.all
    total = sum(estimate.counts, Count(0.0))
    images = {"count": round(total.images), "error": None if total.error is None else math.ceil(total.error)}
    rejected = count_by((item.result.reason, item.weight) for item in items if isinstance(item.result, Reject))
    filtered: dict[str, float] = count_by(
        (item.result.filter, item.weight) for item in items if isinstance(item.result, Filtered)
    )
    rows = [(item.result, item.weight) for item in items if isinstance(item.result, PreparedImage)]
    buckets = count_by((format_bucket(*image.bucket), weight) for image, weight in rows)
    return {
        "shards": {stratum.kind: len(stratum.inputs) for stratum in estimate.strata if stratum.kind != "folder"},
        "folder_images": sum(stratum.count or 0 for stratum in estimate.strata if stratum.kind == "folder"),
        "units": sum(stratum.units for stratum in estimate.strata),
        "bytes": sum(stratum.bytes for stratum in estimate.strata),
        "images": images | {"is_exact": total.is_exact},
        "damaged_inputs": estimate.damaged,
        "sampled": {
            "inputs": sum(map(len, estimate.drawn)),
            "images": len(items),
            "image_bytes": sum(item.image_bytes for kind in estimate.drawn for item in kind),
        },
        "formats": _round(count_by((item.format, item.weight) for item in items)),
        "short_sides": _round(count_by((name_side(min(item.size)), item.weight) for item in items if item.size)),
        "columns": _share_columns(items),
        "unreadable": {"share": _share(rejected, total.images), "reasons": _round(rejected)},
        "filtered": _round(filtered),
        "enlarged": round(sum(weight for image, weight in rows if image.enlarged)),
        "rows": round(sum(weight for _, weight in rows)),
        "buckets": _round(buckets),
        "speed": _describe_speed(options, estimate, total.images, workers),
        "cache_bytes": estimate.sizes,
        "chosen": {"store": estimate.spec.layout.store, "dtype": estimate.spec.dtype},
        "requests": {
            "reads": sum(_count_reads(stratum) for stratum in estimate.strata),
            "writes": estimate.parts + sum(stratum.units for stratum in estimate.strata),
        },
    }


def _describe_speed(options: PlanOptions, estimate: Estimate, images: float, workers: int) -> dict[str, Any]:
    rates, cores = estimate.rates, max(1, estimate.spec.open_workers)
    if not rates.on_cores and not options.open_workers:  # a worker on a GPU has its share of the cores of its machine
        cores = max(1, int(count_cores() // estimate.local_workers))
    rate = rates.combine(cores)
    hours = images / rate / workers / 3600 if rate else None
    return {
        "device": estimate.spec.compute.device,
        "read": rates.read,
        "open": rates.open,
        "encode": rates.encode,
        "is_named": bool(options.images_per_second),
        "workers": workers,
        "cores_per_worker": cores,
        "images_per_second": rate * workers if rate else None,
        "bound_by": rates.find_bound(cores),
        "cores_per_device": rates.cores_per_device,
        "hours": hours,
        "cost": options.price_per_hour * workers * hours if hours is not None and options.price_per_hour else None,
    }


def _count_reads(stratum: Stratum) -> int:
    """Return about how many requests read the inputs of a kind: one an image, or one for each block of a shard."""
    if stratum.kind in ("folder", "manifest"):
        return stratum.count or 0
    return max(len(stratum.inputs), math.ceil(stratum.bytes / BLOCK))


def _round(counts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(count) for name, count in counts.items()}


def _share(counts: Mapping[str, float], total: float) -> float:
    return sum(counts.values()) / total if total else 0.0


def _share_columns(items: list[Opened]) -> dict[str, float]:
    """Return the share of the images that have a value in each column."""
    weights = count_by((name, item.weight) for item in items for name in item.columns)
    total = sum(item.weight for item in items)
    return {name: weight / total for name, weight in sorted(weights.items())} if total else {}


def format_summary(facts: Mapping[str, Any]) -> str:
    """Return the estimate as lines of text."""
    images, speed, sampled = facts["images"], facts["speed"], facts["sampled"]
    inputs = [f"{count:,} {kind}" for kind, count in facts["shards"].items()]
    if facts["folder_images"]:
        inputs.append(f"{count_noun(facts['folder_images'], 'image')} in folders")
    lines = [
        f"images     {_format_count(images, facts['damaged_inputs'])}",
        f"inputs     {', '.join(inputs)}; {count_noun(facts['units'], 'unit')}, {_format_bytes(facts['bytes'])}",
        f"sampled    {count_noun(sampled['images'], 'image')} of {count_noun(sampled['inputs'], 'input')}",
        f"formats    {_format_shares(facts['formats'])}",
        f"columns    {', '.join(f'{name} {share:.0%}' for name, share in facts['columns'].items()) or 'none'}",
        f"unreadable {facts['unreadable']['share']:.2%}{_format_reasons(facts['unreadable']['reasons'])}",
        f"filtered   {sum(facts['filtered'].values()):,}{_format_reasons(facts['filtered'])}",
        f"enlarged   {facts['enlarged']:,}",
        "shorter side in pixels",
        *_draw_histogram(facts["short_sides"]),
        "buckets",
        *(f"  {name:<12} {count:,}" for name, count in facts["buckets"].items()),
        *_format_speed(speed),
        "cache, bytes of its data by --store and --dtype",
    ]
    for store, sizes in facts["cache_bytes"].items():
        lines.append(f"  {store:<8} " + ", ".join(f"{name} {_format_bytes(size)}" for name, size in sizes.items()))
    requests = facts["requests"]
    lines.append(f"requests   about {requests['reads']:,} reads and {requests['writes']:,} writes")
    return printable_lines("\n".join(lines))  # names of columns are those of the inputs


def _format_speed(speed: Mapping[str, Any]) -> list[str]:
    rates = [f"{name} {speed[name]:.1f}" for name in ("read", "open", "encode") if speed[name]]
    given = "encode rate as given by --images-per-second"
    source = given if speed["is_named"] else f"measured here, on {speed['device']}"
    lines = [f"images/s   {', '.join(rates) or 'unknown'} (per stream, per core and per device; {source})"]
    if speed["hours"] is None:
        return lines
    workers, rate = count_noun(speed["workers"], "worker"), speed["images_per_second"]
    duration = format_duration(max(speed["hours"] * 3600, 1))
    lines.append(f"time       {duration} with {workers} ({rate:.1f} images/s), bound by {speed['bound_by']}")
    if speed["cores_per_device"] and speed["device"] != "cpu":
        lines.append(f"cores      {speed['cores_per_device']:.2g} open as many images as a device encodes")
    if speed["cost"] is not None:
        lines.append(f"cost       {speed['cost']:,.2f} at the given price per worker and hour")
    return lines


def _format_count(images: Mapping[str, Any], damaged: int) -> str:
    if images["is_exact"]:
        return f"{count_noun(images['count'], 'image')} (exact)"
    if images["error"] is None:
        return f"{images['count']:,} images (error unknown: too few shards were read)"
    if damaged and not images["error"]:  # all that can be read was counted
        rest = f"whatever follows the damage in {count_noun(damaged, 'input')}"
        return f"{count_noun(images['count'], 'image')}, plus {rest}"
    return f"{images['count']:,} ± {images['error']:,} images (95%)"


def _format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}" if unit != "B" else f"{size:,.0f} B"
        size /= 1024
    return f"{size:,.1f} TiB"


def _format_shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items()) if total else "unknown"


def _format_reasons(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count:,} {name}' for name, count in counts.items())})" if counts else ""


def _draw_histogram(counts: Mapping[str, int]) -> list[str]:
    """Return a line with a bar for each class of sizes, the smallest first."""
    order = [name_side(side) for side in (1, *SIDES)]
    most = max(counts.values(), default=0) or 1
    return [
        f"  {name:<14} {'#' * math.ceil(BAR * counts[name] / most):<{BAR}} {counts[name]:,}"
        for name in order
        if name in counts
    ]
