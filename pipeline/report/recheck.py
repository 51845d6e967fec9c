"""Some rows beside their originals: decoded, and encoded again to see how the stored latent came about.

If the latent is not that of the image, it is compared with those of likely mistakes.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentmill.part_files import to_tensor
from latentmill.scaling import Scaling
from pipeline.cache.reader import Cache, read_rows
from pipeline.cache.rows import RowRef, read_refs
from pipeline.encoder import SAME_LATENT, LatentEncoder, denormalize_pixels, measure_error
from pipeline.flow import EncodeSpec
from pipeline.images.prepare import make_opener, prepare_sample
from pipeline.preview.fidelity import measure_fidelity
from pipeline.preview.originals import RowToDecode, find_samples
from pipeline.records import PreparedImage, Unit
from pipeline.report.findings import MAX_EXAMPLES, Example, Finding
from pipeline.report.sample import find_caption_column
from pipeline.wording import count_noun

Cause = Literal["none", "wrong-range", "wrong-scaling", "swapped-channels", "unknown"]
SAME_CHANNEL = 0.1
PAIRS = 4  # of duplicates that are shown
SECONDS = 40.0  # after which no more images are decoded, so that a large model on a CPU does not take minutes

SENTENCES: Mapping[Cause, str] = {
    "wrong-range": "are what the VAE makes of pixels in [0, 1] instead of [-1, 1]: the input had the wrong range.",
    "wrong-scaling": "are model latents, not raw ones: they were scaled already, and a trainer would scale them again.",
    "swapped-channels": "have swapped channels: red and blue of the image, or channels of the latent.",
    "unknown": "are not what the VAE makes of their images: another VAE, other images, or a broken worker.",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """A row that was decoded.

    decoded, original: RGB uint8 [H, W, 3]; None if the original was not found. psnr: in dB. cause: how the
    stored latent differs from that of the original; None if it was not encoded again. caption: empty if there is none.
    """

    file: str
    key: str
    shard: str
    decoded: np.ndarray
    original: np.ndarray | None = None
    psnr: float | None = None
    ssim: float | None = None
    cause: Cause | None = None
    caption: str = ""


def compare_rows(
    cache: Cache, refs: Sequence[RowRef], encoder: LatentEncoder, spec: EncodeSpec, notes: list[str]
) -> list[Compared]:
    """Return rows, each with its original if that can be read. notes: receives why originals are missing."""
    rows = list(zip(refs, read_refs(cache.folder, refs, cache.layout.columns), strict=True))
    of_unit: dict[str, list[tuple[RowRef, dict[str, Any]]]] = defaultdict(list)
    for ref, row in rows:
        of_unit[ref.unit.name].append((ref, row))
    compared: list[Compared] = []
    caption = find_caption_column(cache)
    caption = None if caption in cache.overlays.schema.names else caption  # these are read by whole files only
    deadline = time.monotonic() + SECONDS
    for pairs in of_unit.values():
        if time.monotonic() > deadline:
            notes.append(f"only {len(compared)} of {len(rows)} images are shown: decoding them took {SECONDS:g} s")
            break
        unit = pairs[0][0].unit
        images = dict(read_originals(unit, (RowToDecode(unit, row) for _, row in pairs), spec, notes))
        compared += [
            compare_row(ref.file, row, images.get((row["shard"], row["key"])), encoder, cache.scaling, caption)
            for ref, row in pairs
        ]
    return compared


def decode_pairs(cache: Cache, finding: Finding, encoder: LatentEncoder) -> list[list[np.ndarray]]:
    """Return the images of the first examples of a finding that name two rows, RGB uint8 [H, W, 3]."""
    pairs = [example.places for example in finding.examples if len(example.places) > 1][:PAIRS]
    return [
        [decode(to_tensor(row), encoder) for file, index in places for row in read_rows(cache.folder, file, [index])]
        for places in pairs
    ]


def read_originals(
    unit: Unit, rows: Iterable[RowToDecode], spec: EncodeSpec, notes: list[str]
) -> Iterator[tuple[tuple[str, str], PreparedImage]]:
    """Yield the images of these rows of a unit, by shard and key, as they were encoded."""
    opener = make_opener(spec.transform, spec.limits)
    for row, sample in find_samples(unit, {row.identity: row for row in rows}, spec, notes, lambda: None):
        image = prepare_sample(unit, sample, spec.limits, opener)
        if isinstance(image, PreparedImage):
            yield row.identity, image


def compare_row(
    file: str,
    row: Mapping[str, Any],
    image: PreparedImage | None,
    encoder: LatentEncoder,
    scaling: Scaling,
    caption: str | None,
) -> Compared:
    """Decode a row, and compare it with its image: the pixels, and the latent. caption: the name of its column."""
    stored = to_tensor(row)
    decoded = decode(stored, encoder)
    text = str(row.get(caption) or "") if caption else ""
    shown = Compared(file=file, key=row["key"], shard=row["shard"], decoded=decoded, caption=text)
    if image is None or image.bucket != (row["height"], row["width"]):
        return shown
    original = image.pixels.numpy()
    psnr, ssim = measure_fidelity(original, decoded)
    return replace(shown, original=original, psnr=psnr, ssim=ssim, cause=find_cause(stored, image, encoder, scaling))


def decode(stored: Tensor, encoder: LatentEncoder) -> np.ndarray:
    """Return the image of a stored latent, or of the mean of its moments: RGB uint8 [H, W, 3]."""
    model = encoder.model
    latent = stored[: model.config.latent_channels].nan_to_num()
    with torch.inference_mode():
        sample = model.decode(latent[None].to(model.device, model.dtype)).sample  # type: ignore[union-attr]
    return np.asarray(denormalize_pixels(sample)[0].numpy())


def find_cause(stored: Tensor, image: PreparedImage, encoder: LatentEncoder, scaling: Scaling) -> Cause:
    """Return how a stored latent came about. `none`: it is that of the image."""
    latent = encode(image, encoder)
    if is_same(stored, latent):
        return "none"
    if is_same(stored, encode(replace(image, pixels=to_upper_half(image.pixels)), encoder)):
        return "wrong-range"
    if latent is not None and scaling.patch == (1, 1):
        channels = encoder.model.config.latent_channels
        if is_same(stored[:channels], scaling.to_model(latent[:channels].float())):
            return "wrong-scaling"
    if is_same(stored, encode(replace(image, pixels=image.pixels.flip(-1)), encoder)):
        return "swapped-channels"
    if latent is not None and latent.shape == stored.shape and is_permuted(stored, latent):
        return "swapped-channels"
    return "unknown"


def encode(image: PreparedImage, encoder: LatentEncoder) -> Tensor | None:
    """Return the latent of an image as it would be stored; None if it is not finite."""
    latent = encoder.encode([image])[0].latent
    return latent if isinstance(latent, Tensor) else None


def to_upper_half(pixels: Tensor) -> Tensor:
    """Return pixels whose values in [-1, 1] are those that the given ones have in [0, 1], rounded to uint8."""
    return (pixels.float() * 0.5 + 127.5).round().clamp(0, 255).byte()


def is_same(stored: Tensor, latent: Tensor | None) -> bool:
    """Return whether two latents are equal but for rounding."""
    if latent is None or stored.shape != latent.shape:
        return False
    error = measure_error(latent, stored)
    return error is not None and error <= SAME_LATENT


def is_permuted(stored: Tensor, latent: Tensor) -> bool:
    """Return whether the channels of a latent [C, h, w] are those of the other one in another order."""
    a, b = stored.double().flatten(1), latent.double().flatten(1)
    distance = torch.cdist(a, b) / a.norm(dim=1, keepdim=True).clamp(min=1e-12)
    order, is_near = distance.argmin(dim=1).tolist(), distance.min(dim=1).values < SAME_CHANNEL
    return bool(is_near.all()) and len(set(order)) == len(a) and order != sorted(order)


def find_in_compared(compared: Sequence[Compared]) -> list[Finding]:
    """Return a finding per cause of wrong latents."""
    checked = [row for row in compared if row.cause is not None]
    found = []
    for cause, sentence in SENTENCES.items():
        rows = [row for row in checked if row.cause == cause]
        if rows:
            examples = tuple(Example(key=row.key, shard=row.shard, remark=row.file) for row in rows[:MAX_EXAMPLES])
            text = f"{len(rows)} of {count_noun(len(checked), 'row')} that were encoded again {sentence}"
            found.append(
                Finding(
                    code="other-latents" if cause == "unknown" else cause,
                    severity="error",
                    sentence=text,
                    examples=examples,
                    command="latentmill verify {cache} --reencode 100",
                )
            )
    return found
