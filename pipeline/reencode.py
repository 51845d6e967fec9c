"""Two proofs of a cache that need its inputs: as many samples as were recorded, and latents that come out again."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import flow
from pipeline.cache import Cache, to_tensor
from pipeline.errors import DamagedError, LatentmillError
from pipeline.flow import EncodeJob, Encoder
from pipeline.records import Picture, Reject, Sample, Standing, Unit
from pipeline.render import Wanted, wanted_rows
from pipeline.verify_part import Problem

NEAR = 0.05  # of a latent's own size: what another device or another slice may change, and no other picture

LIMITS = "give the --input-limit that it was encoded with; without one, the input was exchanged"
RUN = "look whether the input, the VAE or the cache was exchanged; encode anew into another folder"


def recount(unit: Unit, parts: Sequence[Standing], job: EncodeJob) -> Iterator[Problem]:
    """Read a unit's input to its end, and count its samples. parts: those of the unit that no retry wrote."""
    recorded = sum(part.record.samples for part in parts)
    try:
        count = 0
        for sample in flow.read(unit, job):
            count = sample.position + 1
    except DamagedError:
        count += 1  # the rest is one reject
    except LatentmillError as error:
        yield Problem(unit.url, f"it cannot be counted: {error}", "say where it is now: --source")
        return
    if count != recorded:
        yield Problem(unit.url, f"it has {count} samples, {recorded} are recorded of {unit.name}", RUN)


def reencode(cache: Cache, wanted: Sequence[Wanted], encoder: Encoder) -> Iterator[Problem]:
    """Encode these rows' pictures again, and compare. In slices of its own, so that rounding may differ."""
    rows = list(zip(wanted, wanted_rows(cache.folder, wanted), strict=True))
    for unit in {one.unit.name: one.unit for one in wanted}.values():
        left = {row["key"]: (one.file, row) for one, row in rows if one.unit.name == unit.name}
        rejected: dict[str, str] = {}
        try:
            for sample in flow.read(unit, encoder.tools.job):
                if isinstance(sample, Sample) and sample.key in left:
                    file, row = left.pop(sample.key)
                    yield from _compare(unit, sample, file, row, encoder)
                elif isinstance(sample, Reject):
                    rejected[sample.key] = sample.reason
                if not left:
                    break
        except LatentmillError as error:
            yield Problem(unit.url, f"it cannot be read: {error}", "say where it is now: --source")
            continue
        for key, (file, _) in left.items():
            if key in rejected:
                yield Problem(file, f"{key} is rejected now ({rejected[key]}), but has a row", LIMITS)
                continue
            yield Problem(file, f"{unit.url} has no sample {key}, of which there is a row", RUN)


def _compare(unit: Unit, sample: Sample, file: str, row: Mapping[str, Any], encoder: Encoder) -> Iterator[Problem]:
    job = encoder.tools.job
    picture, _ = flow.open_sample(unit, sample, job.transform, job.limits)
    if not isinstance(picture, Picture):
        why = picture.reason if isinstance(picture, Reject) else "filtered"
        yield Problem(file, f"{sample.key} is rejected now ({why}), but has a row", LIMITS)
        return
    (latent,) = encoder.tools.replica.encode([picture], unit.path).latents
    different = [name for name, value in picture.geometry.items() if row[name] != value]
    if different or not isinstance(latent, Tensor):
        yield Problem(file, f"{sample.key} comes out with another {', '.join(different) or 'latent'}", RUN)
        return
    distance = _distance(to_tensor(row), latent)
    if distance > NEAR:
        yield Problem(file, f"{sample.key} comes out as another latent: {distance:.0%} away", RUN)


def _distance(stored: Tensor, made: Tensor) -> float:
    """How far two latents are apart, as a share of their size (root mean squares)."""
    if stored.shape != made.shape:
        return 1.0
    stored, made = stored.double(), made.double()
    if torch.equal(stored, made):
        return 0.0
    return float((stored - made).pow(2).mean().sqrt() / stored.pow(2).mean().sqrt().clamp(min=1e-12))
