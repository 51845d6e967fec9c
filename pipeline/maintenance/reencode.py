"""Two checks of a cache that need its inputs: count and hash the samples again, and encode some images again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from latentmill.part_files import to_tensor
from pipeline.cache import input_hash
from pipeline.cache.part_info import PartInfo
from pipeline.cache.reader import Cache
from pipeline.cache.rows import RowRef, read_refs
from pipeline.encoder import SAME_LATENT, measure_error
from pipeline.errors import REST_OF_SHARD, DamagedError, LatentmillError
from pipeline.flow import EncodeSpec, UnitWorker
from pipeline.images.prepare import prepare_sample
from pipeline.maintenance.verify_part import Problem
from pipeline.readers.tar_group import leave_out, select_shards
from pipeline.readers.unit import read_samples
from pipeline.records import PreparedImage, Reject, Sample, Unit
from pipeline.sources.planned_files import fetch_current_version

SHOWN_EXAMPLES = 3  # parts that are named per input that was exchanged

LIMITS = "give the --input-limit that it was encoded with; if it had none, the input was exchanged"
SOURCE = "give its current location with --source"
CHANGED = "restore the input, or encode the new one into another cache; give the same --input-limit as for encode"
REST_READABLE = "run latentmill retry, which encodes the samples after the damage"
RUN = "check whether the input, the VAE or the cache was exchanged; encode into another cache"


def recount(unit: Unit, parts: Sequence[PartInfo], rest: int | None, spec: EncodeSpec) -> Iterator[Problem]:
    """Read a unit's input to its end, as it is now, and compare its samples with the records of the unit's parts.

    rest: the position from which the input was damaged when it was encoded; None if it was sound.
    """
    digests, damage = bytearray(), ""
    unit = leave_out(unit, (part.record for part in parts))
    try:
        for sample in read_samples(
            fetch_current_version(unit, spec.source_options), spec, may_differ=range(len(unit.paths))
        ):
            digests += input_hash.hash_sample(sample)
    except DamagedError as error:
        damage = str(error)
    except LatentmillError as error:
        yield Problem(unit.url, f"it cannot be counted: {error}", SOURCE)
        return
    rejects = [reject for part in parts for reject in part.record.rejects if reject.reason == REST_OF_SHARD]
    recorded = len(set().union(*(part.record.sample_positions for part in parts)))
    count = len(digests) // input_hash.DIGEST_BYTES
    if damage and not rejects:
        yield Problem(unit.url, f"it was sound when it was encoded: {damage}", RUN)
    elif rest is not None and (count > rest or not damage):
        yield Problem(
            unit.url, f"it has {count} samples, but was damaged after {rest} samples when it was encoded", REST_READABLE
        )
    elif count != recorded:
        yield Problem(unit.url, f"it has {count} samples, but {recorded} are recorded for {unit.name}", RUN)
    changed = [part.file for part in parts if input_hash.hash_record(part.record, digests) != part.record.inputs]
    if changed:
        more = f" and {len(changed) - SHOWN_EXAMPLES} more" if len(changed) > SHOWN_EXAMPLES else ""
        message = f"its images or their columns differ from those in {', '.join(changed[:SHOWN_EXAMPLES])}{more}"
        yield Problem(unit.url, message, CHANGED)


def reencode(cache: Cache, refs: Sequence[RowRef], encoder: UnitWorker) -> Iterator[Problem]:
    """Encode the images of these rows again, and compare. The batches differ, so the rounding can differ."""
    spec = encoder.context.spec
    rows = list(zip(refs, read_refs(cache.folder, refs, cache.layout.columns), strict=True))
    for unit in {ref.unit.name: ref.unit for ref in refs}.values():
        remaining = {(row["shard"], row["key"]): (ref.file, row) for ref, row in rows if ref.unit.name == unit.name}
        unit = select_shards(unit, {shard for shard, _ in remaining})
        rejected: dict[tuple[str, str], str] = {}
        try:
            for sample in read_samples(
                fetch_current_version(unit, spec.source_options), spec, may_differ=range(len(unit.paths))
            ):
                identity = (sample.shard or unit.path, sample.key)
                if isinstance(sample, Sample) and identity in remaining:
                    file, row = remaining.pop(identity)
                    yield from _compare(unit, sample, file, row, encoder)
                elif isinstance(sample, Reject):
                    rejected[identity] = sample.reason
                if not remaining:
                    break
        except LatentmillError as error:
            yield Problem(unit.url, f"it cannot be read: {error}", SOURCE)
            continue
        for (shard, key), (file, _) in remaining.items():
            if (shard, key) in rejected:
                yield Problem(file, f"{key} is rejected now ({rejected[shard, key]}), but has a row", LIMITS)
                continue
            yield Problem(file, f"{unit.url} has no sample {key}, but the cache has its row", RUN)


def _compare(unit: Unit, sample: Sample, file: str, row: Mapping[str, Any], encoder: UnitWorker) -> Iterator[Problem]:
    opener = encoder.context.stages.opener
    image = prepare_sample(unit, sample, encoder.context.spec.limits, opener)
    if not isinstance(image, PreparedImage):
        now = f"rejected now ({image.reason})" if isinstance(image, Reject) else f"filtered now ({image.filter})"
        yield Problem(file, f"{sample.key} is {now}, but has a row", LIMITS)
        return
    encoded = encoder.context.latent_encoder.encode([image])[0]
    different = [name for name, value in image.geometry.items() if row[name] != value]
    if different or not isinstance(encoded.latent, Tensor):
        yield Problem(file, f"{sample.key} is encoded to another {', '.join(different) or 'latent'}", RUN)
        return
    for name in encoder.context.spec.layout.latent_names:
        stored, latent = to_tensor(row, name), getattr(encoded, name)
        error = measure_error(latent, stored) if latent.shape == stored.shape else None
        if error is None or error > SAME_LATENT:
            more = "" if error is None else f": it differs by {error:.0%}"
            yield Problem(file, f"{sample.key} is encoded to another {name}{more}", RUN)
