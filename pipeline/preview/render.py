"""Decode latents of a cache to images, and compare these with the originals if the source can be read.

    rows -> originals -> batches of one bucket -> decode -> PNG, fidelity, cells -> files -> table of the part

`render_task` composes these steps. The table is written last, so a part without one is decoded again. What a part's
files hold depends on its rows alone, and on whether its originals can be read.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from latentmill.cache_info import SourceRules
from latentmill.error_text import first_line
from latentmill.part_files import to_tensor
from pipeline.cache.reader import read_rows
from pipeline.encoder import ComputeConfig, build_model, denormalize_pixels, is_out_of_memory
from pipeline.errors import Stopped, VaeError
from pipeline.formats.schema import OutputSchema
from pipeline.images.transform import Transform
from pipeline.jax_model import JaxModel
from pipeline.limits import Limits
from pipeline.prefetch import map_in_order
from pipeline.preview import contact_sheet
from pipeline.preview.fidelity import measure_fidelity
from pipeline.preview.fidelity_table import Rendered, write_table
from pipeline.preview.image_files import EncodedPng, ImageFormat, name_image, write_images
from pipeline.preview.originals import Pair, RowToDecode, pair_with_originals
from pipeline.preview.selection import RenderTask
from pipeline.records import FIRST_ATTEMPT, Attempt
from pipeline.storage.folder import Folder
from pipeline.weights import Vae
from vae import Autoencoder

BATCH_PIXELS = 4 << 20  # of the images of a batch, and at least one image: a decoder needs some KB per pixel
MAX_THREADS = 16  # of a worker, for all but the model
COLUMNS = ("key", "shard", "latent", "shape", "dtype", "height", "width", "original_height", "original_width")


@dataclass(frozen=True, slots=True)
class RenderReport:
    """The report of a finished part to the driver."""

    part: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSpec:
    """All that a worker needs to render. It is small enough to be sent; `build` loads the model on arrival.

    threads: that open originals, compare, and make PNGs.
    superseded: the rejects that retry parts supersede (`pipeline.cache.parts.read_superseded`).
    """

    cache: Folder
    out: Folder
    format: ImageFormat
    source_options: Mapping[str, str]
    transform: Transform
    layout: OutputSchema
    image_column: str | None
    key_column: str | None
    tile_above: int | None
    limits: Limits
    compute: ComputeConfig
    superseded: Mapping[str, Mapping[int, str]]
    source_rules: SourceRules = SourceRules()
    threads: int = 1

    @property
    def tasks_per_worker(self) -> int:
        """The number of parts that a worker has at the same time: while one is decoded, the other is read."""
        return 2

    def build(self, vae: Vae, stop: threading.Event) -> "RenderWorker":
        """Return the worker, with its model loaded. stop: set once the job is to stop."""
        if self.compute.backend == "jax":
            compute = self.compute
            return RenderWorker(self, JaxModel(vae, compute.device, compute.precision, compute.threads), stop)
        return RenderWorker(self, build_model(vae, self.compute, self.tile_above), stop)

    def for_node(self, cores: float) -> "RenderSpec":
        """Return the same job for a worker that may use this many cores of its node."""
        return replace(self, threads=max(1, min(MAX_THREADS, int(cores))))

    def with_smaller_batches(self) -> "RenderSpec":
        """Return the same job with smaller batches, which need less memory."""
        return replace(self, compute=self.compute.with_smaller_batches())


class RenderWorker:
    """A worker that decodes parts.

    Several threads may call `run` at the same time. The model runs for one of them at a time.
    images: images decoded so far. steps: images decoded and samples read so far, so that progress can be seen.
    busy_seconds: 0, because it is not measured.
    """

    def __init__(self, spec: RenderSpec, model: Autoencoder | JaxModel, stop: threading.Event) -> None:
        self.spec = spec
        self.model = model
        self.stop = stop
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(spec.threads, thread_name_prefix="render")
        self.batch_size = spec.compute.batch_size
        self.images = 0
        self.steps = 0
        self.busy_seconds = 0.0

    def run(self, task: RenderTask, attempt: Attempt = FIRST_ATTEMPT) -> RenderReport:
        """Decode a part, and write its files and its table."""
        return render_task(task, self)

    def step(self) -> None:
        """Count a step. Raises Stopped once the job is to stop."""
        if self.stop.is_set():
            raise Stopped
        self.steps += 1

    def choose_batch_size(self, row: RowToDecode) -> int:
        """Return how many images of the bucket of a row are decoded at once."""
        pixels: int = row.values["height"] * row.values["width"]
        return max(1, min(self.batch_size, BATCH_PIXELS // pixels))

    def decode(self, rows: Sequence[RowToDecode]) -> list[np.ndarray]:
        """Decode latents of one bucket, of moments the mean. Returns RGB uint8 [H, W, 3] for each.

        The batch size is halved, also for later batches, each time that memory does not suffice. Raises VaeError if it
        does not suffice for one image.
        """
        channels = self.model.config.latent_channels
        latents = torch.stack([to_tensor(row.values)[:channels] for row in rows])
        decoded, start = list[np.ndarray](), 0
        while start < len(rows):
            self.step()
            size = self.choose_batch_size(rows[0])
            try:
                with self.lock, torch.inference_mode():
                    pixels = self._run(latents[start : start + size], size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_batches(size, rows[0], error)
                continue
            decoded += list(pixels.numpy())
            start += len(pixels)
            self.images += len(pixels)
        return decoded

    def _run(self, latents: Tensor, size: int) -> Tensor:
        """Return pixels, uint8 [B, H, W, 3] on the CPU. size: that JAX compiles for, so its batches are padded."""
        if isinstance(self.model, JaxModel):
            padding = latents[-1:].expand(size - len(latents), -1, -1, -1)
            sample = self.model.decode(torch.cat([latents, padding]))[: len(latents)]
        else:
            sample = self.model.decode(latents.to(self.model.device, self.model.dtype)).sample
        return denormalize_pixels(sample)

    def _halve_batches(self, size: int, row: RowToDecode, error: Exception) -> None:
        if size == 1:
            raise VaeError(
                f"out of memory on {self.spec.compute.device} while decoding a single image of "
                f"{row.values['height']}x{row.values['width']} pixels ({first_line(error):.200}); use another device"
            ) from error
        self.batch_size = size // 2
        if self.spec.compute.device in ("cuda", "mps"):
            getattr(torch, self.spec.compute.device).empty_cache()


def render_task(task: RenderTask, worker: RenderWorker) -> RenderReport:
    """Decode a part: write its files, its cells of contact sheets, and then its table."""
    spec, notes = worker.spec, list[str]()
    rows = read_task_rows(task, spec)
    pairs = pair_with_originals(rows, spec, worker.pool, notes, worker.step)

    def finish(decoded: tuple[Pair, np.ndarray]) -> EncodedPng:
        return finish_image(*decoded, spec.out)

    finished = map_in_order(worker.pool, finish, decode_in_batches(pairs, worker), window=2 * spec.threads)
    images = write_images(spec.out, spec.format, task.number, finished)
    write_table(spec.out, task.number, images, notes)
    return RenderReport(task.number, len(images))


def read_task_rows(task: RenderTask, spec: RenderSpec) -> list[RowToDecode]:
    """Read the rows of a task from the cache."""
    rows = list[RowToDecode]()
    for run in task.runs:
        found = read_rows(spec.cache, run.file, run.indexes, COLUMNS, texts=())
        rows += [
            RowToDecode(run.unit, values, task.cells.get((run.file, index), ""))
            for index, values in zip(run.indexes, found, strict=True)
        ]
    return rows


def decode_in_batches(pairs: Iterable[Pair], worker: RenderWorker) -> Iterator[tuple[Pair, np.ndarray]]:
    """Yield each pair with its decoded image, RGB uint8 [H, W, 3]. A batch has pairs of one bucket."""
    waiting = defaultdict[tuple[int, int], list[Pair]](list)
    for pair in pairs:
        bucket = pair.row.values["height"], pair.row.values["width"]
        waiting[bucket].append(pair)
        if len(waiting[bucket]) >= worker.choose_batch_size(pair.row):
            yield from decode_batch(waiting.pop(bucket), worker)
    for bucket in sorted(waiting):
        yield from decode_batch(waiting[bucket], worker)


def decode_batch(batch: Sequence[Pair], worker: RenderWorker) -> Iterator[tuple[Pair, np.ndarray]]:
    """Yield the pairs of one bucket with their decoded images."""
    yield from zip(batch, worker.decode([pair.row for pair in batch]), strict=True)


def finish_image(pair: Pair, decoded: np.ndarray, out: Folder) -> EncodedPng:
    """Compare a decoded image with its original, draw its cell if it is on a contact sheet, and encode it as PNG."""
    row, values = pair.row, pair.row.values
    psnr, ssim = (None, None) if pair.original is None else measure_fidelity(pair.original, decoded)
    if row.cell:
        cell = contact_sheet.Cell(
            images=(decoded,) if pair.original is None else (pair.original, decoded),
            title=f"{values['key']}" + ("" if psnr is None else f"   {psnr:.1f} dB"),
            remark=f"{values['shard']}   {values['original_width']} x {values['original_height']}",
        )
        out.replace(row.cell, contact_sheet.encode_png(contact_sheet.draw_cell(cell)))
    image = Rendered(
        key=values["key"],
        shard=values["shard"],
        file="",
        height=decoded.shape[0],
        width=decoded.shape[1],
        psnr=psnr,
        ssim=ssim,
    )
    return EncodedPng(image, name_image(row.unit, *row.identity), contact_sheet.encode_png(decoded))
