"""Previews: decode latents of a cache to images, and compare them with the originals.

    rows -> decode -> images and contact sheets

If the source can be read, each decoded image is shown beside its original (read -> open -> transform).
"""

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from latentmill.cache_info import SourceRules
from latentmill.part_files import to_tensor
from pipeline.cache.rows import RowRef, read_refs
from pipeline.encoder import ComputeConfig, build_model
from pipeline.errors import LatentmillError, SourceError, Stopped, StorageError
from pipeline.formats.schema import OutputSchema
from pipeline.images.prepare import make_opener, prepare_sample
from pipeline.images.transform import Transform
from pipeline.jax_model import JaxModel
from pipeline.limits import Limits
from pipeline.preview import contact_sheet
from pipeline.readers.tar_group import select_shards
from pipeline.readers.unit import read_samples
from pipeline.records import FIRST_ATTEMPT, TAR_GROUP, Attempt, PreparedImage, Sample, Unit
from pipeline.storage.folder import Folder
from pipeline.weights import Vae
from vae import Autoencoder

IMAGES_PER_SHEET = 12


@dataclass(frozen=True, slots=True)
class RenderTask:
    """The rows of one contact sheet."""

    number: int
    rows: tuple[RowRef, ...]

    @property
    def name(self) -> str:
        """The name of the task in messages."""
        return f"sheet {self.number}"


@dataclass(frozen=True, slots=True)
class Rendered:
    """One decoded image. psnr: in dB against the original in 8-bit pixels; None if the original was not found."""

    shard: str
    key: str
    file: str
    psnr: float | None


@dataclass(frozen=True, slots=True)
class RenderReport:
    """The report of a finished sheet to the driver. notes: why originals are missing."""

    sheet: str
    images: tuple[Rendered, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSpec:
    """All that a worker needs to render. It is small enough to be sent; `build` loads the model on arrival.

    with_source: show the originals beside the decoded images.
    superseded: the rejects that retry parts supersede (`pipeline.cache.parts.read_superseded`).
    """

    cache: Folder
    out: Folder
    source_options: Mapping[str, str]
    transform: Transform
    layout: OutputSchema
    image_column: str | None
    key_column: str | None
    tile_above: int | None
    limits: Limits
    compute: ComputeConfig
    with_source: bool
    superseded: Mapping[str, Mapping[int, str]]
    source_rules: SourceRules = SourceRules()

    @property
    def tasks_per_worker(self) -> int:
        """The number of sheets that a worker renders at the same time: while one is decoded, the other is read."""
        return 2

    def build(self, vae: Vae, stop: threading.Event) -> "RenderWorker":
        """Return the worker, with its model loaded. stop: set once the job is to stop."""
        if self.compute.backend == "jax":
            compute = self.compute
            return RenderWorker(self, JaxModel(vae, compute.device, compute.precision, compute.threads), stop)
        return RenderWorker(self, build_model(vae, self.compute, self.tile_above), stop)

    def for_node(self, cores: float) -> "RenderSpec":
        """Return the same spec: one image is opened at a time."""
        return self

    def with_smaller_batches(self) -> "RenderSpec":
        """Return the same spec: images are decoded one at a time, so no batch can become smaller."""
        return self


class RenderWorker:
    """A worker that draws contact sheets.

    Several threads may call `run` at the same time. The model runs for one of them at a time.
    images: images decoded so far. steps: images decoded and samples read so far, so that progress can be seen.
    busy_seconds: 0, because it is not measured.
    """

    def __init__(self, spec: RenderSpec, model: Autoencoder | JaxModel, stop: threading.Event) -> None:
        self.spec = spec
        self.model = model
        self.stop = stop
        self.lock = threading.Lock()
        self.images = 0
        self.steps = 0
        self.busy_seconds = 0.0

    def run(self, task: RenderTask, attempt: Attempt = FIRST_ATTEMPT) -> RenderReport:
        """Draw one contact sheet."""
        return render_task(task, self)

    def step(self) -> None:
        """Count a step. Raises Stopped once the job is to stop."""
        if self.stop.is_set():
            raise Stopped
        self.steps += 1

    def decode(self, row: Mapping[str, Any]) -> np.ndarray:
        """Decode a row's latent, or the mean of its moments. Returns RGB uint8 [H, W, 3]."""
        self.step()
        latent = to_tensor(row)[: self.model.config.latent_channels]
        with self.lock, torch.inference_mode():
            if isinstance(self.model, JaxModel):
                sample = self.model.decode(latent[None])[0]
            else:
                sample = self.model.decode(latent[None].to(self.model.device, self.model.dtype)).sample[0]
            self.images += 1
        return sample.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def make_tasks(rows: Sequence[RowRef]) -> list[RenderTask]:
    """Divide rows into tasks of one contact sheet each."""
    starts = range(0, len(rows), IMAGES_PER_SHEET)
    return [RenderTask(number, tuple(rows[i : i + IMAGES_PER_SHEET])) for number, i in enumerate(starts)]


def render_task(task: RenderTask, worker: RenderWorker) -> RenderReport:
    """Draw one contact sheet and its single images."""
    spec = worker.spec
    rows = list(zip(task.rows, read_refs(spec.cache, task.rows, spec.layout.columns), strict=True))
    originals, notes = find_originals(rows, worker) if spec.with_source else ({}, [])
    cells, images = [], []
    for ref, row in rows:
        decoded = worker.decode(row)
        original = originals.get((ref.unit.name, row["shard"], row["key"]))
        name = f"images/{make_folder_name(ref.unit, row['shard'])}/{make_image_name(row['key'])}.png"
        spec.out.replace(name, contact_sheet.encode_png(decoded))
        fidelity = None if original is None else psnr(original, decoded)
        images.append(Rendered(row["shard"], row["key"], name, fidelity))
        cells.append(
            contact_sheet.Cell(
                images=(decoded,) if original is None else (original, decoded),
                title=f"{row['key']}" + ("" if fidelity is None else f"   {fidelity:.1f} dB"),
                remark=f"{row['shard']}   {row['original_width']} x {row['original_height']}",
            )
        )
    name = f"sheets/{task.number:05d}.png"
    caption = "original on the left, decoded from the cache on the right" if originals else "decoded from the cache"
    spec.out.replace(name, contact_sheet.draw_contact_sheet(cells, f"{len(cells)} images: {caption}"))
    return RenderReport(name, tuple(images), tuple(notes))


def find_originals(
    rows: Sequence[tuple[RowRef, Mapping[str, Any]]], worker: RenderWorker
) -> tuple[dict[tuple[str, str, str], np.ndarray], list[str]]:
    """Return the images that were encoded, by unit, shard and key, as RGB uint8 [H, W, 3], and notes about others."""
    spec, units = worker.spec, {ref.unit.name: ref.unit for ref, _ in rows}
    originals: dict[tuple[str, str, str], np.ndarray] = {}
    notes: list[str] = []
    opener = make_opener(spec.transform, spec.limits)
    for name, unit in units.items():
        missing = {(row["shard"], row["key"]) for ref, row in rows if ref.unit.name == name}
        try:
            for sample in read_samples(select_shards(unit, {shard for shard, _ in missing}), spec):
                worker.step()
                identity = (sample.shard or unit.path, sample.key)
                if identity in missing and isinstance(sample, Sample):
                    image = prepare_sample(unit, sample, spec.limits, opener)
                    if isinstance(image, PreparedImage):
                        originals[name, *identity] = image.pixels.numpy()
                    missing.discard(identity)
                if not missing:
                    break
        except LatentmillError as error:
            is_elsewhere = isinstance(error, StorageError | SourceError)
            advice = f"; give their location with --source {unit.source_name}=PATH" if is_elsewhere else ""
            notes.append(f"originals not shown: {error}{advice}")
    return originals, notes


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images in dB; 100 if they are equal."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 100.0 if error == 0 else 20 * math.log10(255) - 10 * math.log10(error)


def make_folder_name(unit: Unit, shard: str) -> str:
    """Return the folder of a row's image: one per unit, and in a group of tars one per tar, which may share keys."""
    return f"{unit.name}/{make_image_name(shard)}" if unit.kind == TAR_GROUP else unit.name


def make_image_name(key: str) -> str:
    """Return a key as a file name for any disk: percent-encoded. A long one is cut and gets a hash."""
    name = quote(key, safe="")
    return name if len(name) <= 150 else f"{name[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
