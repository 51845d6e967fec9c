"""The way back: latents out of a cache, images to look at.

rows -> decode -> images and contact sheets, beside the originals (read, open, transform) where these are there
"""

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from pipeline import flow
from pipeline.cache.reader import read_rows, to_tensor
from pipeline.encoder import ComputeConfig, build_model
from pipeline.errors import LatentmillError, Stopped
from pipeline.formats.schema import OutputSchema
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.preview import contact_sheet
from pipeline.records import FIRST_ATTEMPT, Attempt, PreparedImage, Sample, Unit
from pipeline.storage.folder import Folder
from pipeline.weights import Vae
from vae import AutoencoderKL

IMAGES_PER_SHEET = 12


@dataclass(frozen=True, slots=True)
class RowRef:
    """A row of the cache that is to be rendered: its file, its index in that file, and the unit it came from."""

    file: str
    index: int
    unit: Unit


@dataclass(frozen=True, slots=True)
class RenderTask:
    """One contact sheet's worth of rows."""

    number: int
    rows: tuple[RowRef, ...]

    @property
    def name(self) -> str:
        return f"sheet {self.number}"


@dataclass(frozen=True, slots=True)
class Rendered:
    """What was drawn of one row. psnr: dB against the original in 8-bit pixels; None where there was none to see."""

    shard: str
    key: str
    file: str
    psnr: float | None


@dataclass(frozen=True, slots=True)
class RenderReport:
    """What a finished sheet tells the driver. notes: why originals are missing."""

    sheet: str
    images: tuple[Rendered, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSpec:
    """What a worker must know to render; `build` makes the replica on arrival."""

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

    def build(self, vae: Vae, stop: threading.Event) -> "RenderWorker":
        """The worker, its replica loaded."""
        return RenderWorker(self, build_model(vae, self.compute, self.tile_above), stop)

    def with_smaller_slices(self) -> "RenderSpec":
        """Itself: images are decoded one by one."""
        return self


class RenderWorker:
    """A worker that draws sheets. Threads may call `run` together; the model runs for one of them at a time."""

    def __init__(self, spec: RenderSpec, model: AutoencoderKL, stop: threading.Event) -> None:
        self.spec = spec
        self.model = model
        self.stop = stop
        self.lock = threading.Lock()
        self.images = 0
        self.steps = 0  # samples read, too

    def run(self, task: RenderTask, attempt: Attempt = FIRST_ATTEMPT) -> RenderReport:
        return render_task(task, self)

    def step(self) -> None:
        """Count a step. Raises Stopped once the job is to stop."""
        if self.stop.is_set():
            raise Stopped
        self.steps += 1

    def decode(self, row: Mapping[str, Any]) -> np.ndarray:
        """A row's latent (of moments: the mean) to RGB uint8 [H, W, 3]."""
        self.step()
        latent = to_tensor(row)[: self.model.config.latent_channels]
        latent = latent[None].to(self.model.device, self.model.dtype)
        with self.lock, torch.inference_mode():
            sample = self.model.decode(latent).sample[0]
            self.images += 1
        return sample.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def choose_rows(files: Sequence[tuple[str, int, Unit]], limit: int) -> list[RenderTask]:
    """Up to `limit` rows (0: all), spread evenly over the cache, as tasks. files: name, rows and unit of each."""
    total = sum(rows for _, rows, _ in files)
    count = min(limit, total) if limit else total
    picked = {position * total // count for position in range(count)} if count else set()
    wanted: list[RowRef] = []
    start = 0
    for file, rows, unit in files:
        wanted += [RowRef(file, index, unit) for index in range(rows) if start + index in picked]
        start += rows
    sheets = range(0, len(wanted), IMAGES_PER_SHEET)
    return [RenderTask(n, tuple(wanted[i : i + IMAGES_PER_SHEET])) for n, i in enumerate(sheets)]


def render_task(task: RenderTask, worker: RenderWorker) -> RenderReport:
    """Draw one sheet and its single images."""
    spec = worker.spec
    rows = list(zip(task.rows, read_refs(spec.cache, task.rows), strict=True))
    originals, notes = find_originals(rows, worker) if spec.with_source else ({}, [])
    cells, images = [], []
    for wanted, row in rows:
        decoded = worker.decode(row)
        original = originals.get((wanted.unit.name, row["key"]))
        name = f"images/{wanted.unit.name}/{image_file_name(row['key'])}.png"
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
    side = "left the original, right decoded from the cache" if originals else "decoded from the cache"
    spec.out.replace(name, contact_sheet.draw_contact_sheet(cells, f"{len(cells)} images: {side}"))
    return RenderReport(name, tuple(images), tuple(notes))


def read_refs(cache: Folder, wanted: Sequence[RowRef]) -> Iterator[dict[str, Any]]:
    """The wanted rows, in their order."""
    by_file: dict[str, list[int]] = {}
    for row in wanted:
        by_file.setdefault(row.file, []).append(row.index)
    for file, indexes in by_file.items():
        yield from read_rows(cache, file, indexes)


def find_originals(
    rows: Sequence[tuple[RowRef, Mapping[str, Any]]], worker: RenderWorker
) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """The images that were encoded, by unit and key, as RGB uint8 [H, W, 3]; and why some cannot be seen."""
    spec, units = worker.spec, {wanted.unit.name: wanted.unit for wanted, _ in rows}
    found: dict[tuple[str, str], np.ndarray] = {}
    notes: list[str] = []
    for name, unit in units.items():
        missing = {row["key"] for wanted, row in rows if wanted.unit.name == name}
        try:
            for sample in flow.read_samples(unit, spec):
                worker.step()
                if sample.key in missing and isinstance(sample, Sample):
                    image, _ = flow.open_sample(unit, sample, spec.transform, spec.limits)
                    if isinstance(image, PreparedImage):
                        found[name, sample.key] = image.pixels.permute(1, 2, 0).numpy()
                    missing.discard(sample.key)
                if not missing:
                    break
        except LatentmillError as error:
            notes.append(f"without originals: {error}")
    return found, notes


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit images in dB; 100 where they are equal."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 100.0 if error == 0 else 20 * math.log10(255) - 10 * math.log10(error)


def image_file_name(key: str) -> str:
    """A key as a file name on any disk: percent-encoded, and cut with its sha256 where it would be too long."""
    name = quote(key, safe="")
    return name if len(name) <= 150 else f"{name[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
