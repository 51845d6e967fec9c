"""Two proofs of a cache that need its inputs: the samples that were recorded, and latents that come out again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import flow
from pipeline.cache import input_hash
from pipeline.cache.reader import Cache, to_tensor
from pipeline.errors import REST_OF_SHARD, DamagedError, LatentmillError
from pipeline.flow import EncodeSpec, UnitWorker
from pipeline.formats.record import PartInfo
from pipeline.maintenance.verify_part import Problem
from pipeline.preview.render import RowRef, read_refs
from pipeline.records import PreparedImage, Reject, Sample, Unit
from pipeline.storage import reading

TOLERANCE = 0.05  # of a latent's own size: what another device or another slice may change, and no other image

SHOWN_EXAMPLES = 3  # parts that are named of an input that was exchanged

LIMITS = "give the --input-limit that it was encoded with; without one, the input was exchanged"
SOURCE = "say where it is now: --source"
CHANGED = "restore the input, or encode what it is now into another cache; give the --input-limit of encode here, too"
REST_READABLE = "latentmill retry takes up what follows the damage"
RUN = "look whether the input, the VAE or the cache was exchanged; encode anew into another folder"


def recount(unit: Unit, parts: Sequence[PartInfo], rest: int | None, spec: EncodeSpec) -> Iterator[Problem]:
    """Read a unit's input to its end, as it is now, and hold its samples against the records of the unit's parts.

    rest: the position from which on it was damaged, and could not be counted.
    """
    found, damage = bytearray(), ""
    try:
        for sample in flow.read_samples(
            reading.current_version(unit, spec.source_options), spec, may_differ=range(len(unit.paths))
        ):
            found += input_hash.hash_sample(sample)
    except DamagedError as error:
        damage = str(error)
    except LatentmillError as error:
        yield Problem(unit.url, f"it cannot be counted: {error}", SOURCE)
        return
    rejects = [reject for part in parts for reject in part.record.rejects if reject.reason == REST_OF_SHARD]
    recorded = len(set().union(*(part.record.counted for part in parts)))
    count = len(found) // input_hash.DIGEST_BYTES
    if damage and not rejects:
        yield Problem(unit.url, f"it was sound when it was encoded: {damage}", RUN)
    elif rest is not None and (count > rest or not damage):
        yield Problem(unit.url, f"it has {count} samples, it was damaged after {rest}", REST_READABLE)
    elif count != recorded:
        yield Problem(unit.url, f"it has {count} samples, {recorded} are recorded of {unit.name}", RUN)
    wrong = [part.file for part in parts if input_hash.hash_record(part.record, found) != part.record.inputs]
    if wrong:
        more = f" and {len(wrong) - SHOWN_EXAMPLES} more" if len(wrong) > SHOWN_EXAMPLES else ""
        what = f"its images or their columns are not those of which {', '.join(wrong[:SHOWN_EXAMPLES])}{more} were made"
        yield Problem(unit.url, what, CHANGED)


def reencode(cache: Cache, wanted: Sequence[RowRef], encoder: UnitWorker) -> Iterator[Problem]:
    """Encode these rows' images again, and compare. In slices of its own, so that rounding may differ."""
    spec = encoder.context.spec
    rows = list(zip(wanted, read_refs(cache.folder, wanted), strict=True))
    for unit in {one.unit.name: one.unit for one in wanted}.values():
        left = {row["key"]: (one.file, row) for one, row in rows if one.unit.name == unit.name}
        rejected: dict[str, str] = {}
        try:
            for sample in flow.read_samples(
                reading.current_version(unit, spec.source_options), spec, may_differ=range(len(unit.paths))
            ):
                if isinstance(sample, Sample) and sample.key in left:
                    file, row = left.pop(sample.key)
                    yield from _compare(unit, sample, file, row, encoder)
                elif isinstance(sample, Reject):
                    rejected[sample.key] = sample.reason
                if not left:
                    break
        except LatentmillError as error:
            yield Problem(unit.url, f"it cannot be read: {error}", SOURCE)
            continue
        for key, (file, _) in left.items():
            if key in rejected:
                yield Problem(file, f"{key} is rejected now ({rejected[key]}), but has a row", LIMITS)
                continue
            yield Problem(file, f"{unit.url} has no sample {key}, of which there is a row", RUN)


def _compare(unit: Unit, sample: Sample, file: str, row: Mapping[str, Any], encoder: UnitWorker) -> Iterator[Problem]:
    spec = encoder.context.spec
    image, _ = flow.open_sample(unit, sample, spec.transform, spec.limits)
    if not isinstance(image, PreparedImage):
        why = image.reason if isinstance(image, Reject) else "filtered"
        yield Problem(file, f"{sample.key} is rejected now ({why}), but has a row", LIMITS)
        return
    (latent,) = encoder.context.latent_encoder.encode([image], unit.path).latents
    different = [name for name, value in image.geometry.items() if row[name] != value]
    if different or not isinstance(latent, Tensor):
        yield Problem(file, f"{sample.key} comes out with another {', '.join(different) or 'latent'}", RUN)
        return
    distance = _distance(to_tensor(row), latent)
    if distance > TOLERANCE:
        yield Problem(file, f"{sample.key} comes out as another latent: {distance:.0%} away", RUN)


def _distance(stored: Tensor, made: Tensor) -> float:
    """How far two latents are apart, as a share of their size (root mean squares)."""
    if stored.shape != made.shape:
        return 1.0
    stored, made = stored.double(), made.double()
    if torch.equal(stored, made):
        return 0.0
    return float((stored - made).pow(2).mean().sqrt() / stored.pow(2).mean().sqrt().clamp(min=1e-12))
