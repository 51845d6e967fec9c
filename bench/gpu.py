"""Images per second from JPEG tars to latents on one device, without Ray, compared with a plain loop.

    python -m bench.gpu                                   # SD's shape at 512 px, on this machine's GPU
    python -m bench.gpu --device cpu --model micro --side 256 --images 512

It needs neither Ray nor a network, so it runs on a bare GPU machine. The images are made from the sample photographs,
and the weights are random. First, each form of the encoder is checked with one worker's encoder:

- error: of the self-check, relative to torch's kernels in float32.
- same bits: whether no bit of a latent depends on the other images of the batch, its place in it, or padding.
- after out of memory: the batch size after the rest of the GPU's memory was taken, and the largest difference of the
  latents, relative to their deviation. On CPUs there is no such memory to take.

On a GPU, the choice of the form and the batch size follows, as a job makes it (`pipeline.tuning`), with its duration.
The rows of the last table are:

- latentmill: the data path of the encode job with one worker. It writes Parquet. There is one row per form.
- plain loop: a DataLoader whose processes decode, resize and crop with Pillow, and the model of diffusers in eager mode
  (this repository's model if diffusers is not installed), batch by batch. It writes nothing.

busy: the share of the time for which the model ran. The model alone is measured by `bench.vae`, and how well a faster
device would be fed by `bench.feed`. The exit code is 1 if latentmill's device is busy for less than 95% of the time
with the last form, or if a form fails a check.
"""

import argparse
import io
import os
import random
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bench.encode_spec import make_spec
from bench.gpu_checks import print_checks, print_choice
from bench.vae import MODELS
from pipeline.encoder import PRECISIONS, ComputeConfig
from pipeline.images.transform import Transform
from pipeline.records import AttentionKernel, Form
from pipeline.sources.listing import list_sources
from pipeline.sources.units import make_units
from pipeline.weights import load_vae
from vae import AutoencoderKL

BUSY = 0.95  # target
PER_TAR = 256
PHOTOS = Path(__file__).resolve().parents[1] / "examples/photos"


@dataclass(frozen=True)
class Result:
    """images: per second, from the first batch to the last. busy: share of the time for which the model ran."""

    images: float
    busy: float


def make_shards(folder: Path, images: int, side: int) -> None:
    """Write tars of JPEGs, each a random crop of a photograph whose shorter side is a quarter longer than `side`."""
    folder.mkdir(parents=True)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.rglob("*.jpg"))]
    rng, size = random.Random(0), (round(side * 1.7), round(side * 1.25))
    for first in range(0, images, PER_TAR):
        with tarfile.open(folder / f"{first:07d}.tar", "w") as tar:
            for index in range(first, min(first + PER_TAR, images)):
                photo = photos[index % len(photos)]
                width = rng.uniform(0.6, 1.0) * min(photo.width, photo.height * size[0] / size[1])
                height = width * size[1] / size[0]
                left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
                buffer = io.BytesIO()
                photo.resize(size, box=(left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
                header = tarfile.TarInfo(f"{index:07d}.jpg")
                header.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(header, buffer)


def make_compute(options: argparse.Namespace, form: Form, attention: AttentionKernel = "sdpa") -> ComputeConfig:
    """Return the settings of a form of the encoder."""
    return ComputeConfig(
        device=options.device,
        precision=options.precision,
        batch_size=options.batch,
        threads=options.threads,
        form=form,
        attention=attention,
    )


def measure_latentmill(folder: Path, compute: ComputeConfig, options: argparse.Namespace) -> Result:
    """Encode the tars with one worker."""
    name = f"{compute.form}-{compute.attention}-{compute.batch_size}"
    spec = make_spec(folder / f"cache-{name}", Transform(resolution=options.side), compute, options.openers)
    worker = spec.build(load_vae(str(folder / "vae")), threading.Event())
    units = make_units(list_sources([str(folder / "shards")], {}, "nowhere").files)
    worker.run(units[0])  # cuDNN times its algorithms, and libraries are loaded
    start = time.perf_counter()
    with ThreadPoolExecutor(spec.tasks_per_worker) as pool:
        reports = list(pool.map(worker.run, units[1:]))
    seconds = time.perf_counter() - start
    busy = sum(report.seconds.encode for report in reports) / seconds
    return Result(sum(report.encoded for report in reports) / seconds, busy)


class Images(IterableDataset[torch.Tensor]):
    """The images of tars, resized and cropped with Pillow: float32 [3, side, side] in [-1, 1]."""

    def __init__(self, tars: list[Path], side: int) -> None:
        self.tars, self.side = tars, side

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        for path in self.tars[worker.id :: worker.num_workers] if worker else self.tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    image = Image.open(file).convert("RGB")
                    scale = self.side / min(image.size)
                    size = (round(image.width * scale), round(image.height * scale))
                    image = image.resize(size, Image.Resampling.BICUBIC)
                    left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
                    pixels = np.asarray(image.crop((left, top, left + self.side, top + self.side)))
                    yield torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(127.5).sub(1)


def load_plain_model(folder: Path) -> tuple[Any, str]:
    """Return the model of diffusers with its name, or this repository's model if diffusers is not installed."""
    try:
        from diffusers import AutoencoderKL as Reference
    except ImportError:
        return AutoencoderKL.from_pretrained(folder / "vae"), "this repository's model"
    return Reference.from_pretrained(folder / "vae"), "diffusers"


@torch.inference_mode()
def measure_plain_loop(folder: Path, options: argparse.Namespace) -> tuple[Result, str]:
    """Encode the same images in a loop over a DataLoader."""
    model, name = load_plain_model(folder)
    dtype = PRECISIONS["bf16" if options.device == "cuda" else "fp32"]
    model = model.to(options.device, dtype).eval()
    tars = sorted((folder / "shards").glob("*.tar"))[1:]
    workers = min(options.openers, len(tars))
    loader = DataLoader(
        Images(tars, options.side), options.batch, num_workers=workers, pin_memory=options.device == "cuda"
    )
    count, busy, start = 0, 0.0, 0.0
    for batch in loader:
        begin = time.perf_counter()
        latents = model.encode(batch.to(options.device, dtype, non_blocking=True)).latent_dist.mode().half().cpu()
        if start:
            count += len(latents)
            busy += time.perf_counter() - begin
        else:  # the first batch warms up
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    return Result(count / seconds, busy / seconds), name


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--device", default=device, help=f"cuda or cpu (default: {device})")
    parser.add_argument("--model", default="sd", choices=MODELS, help="shape of the model (default: sd)")
    parser.add_argument("--side", type=int, default=512, help="side of the images in pixels (default: 512)")
    parser.add_argument("--images", type=int, default=8192, help="number of images (default: 8192)")
    forms = "plain,fused,compiled" if device == "cuda" else "plain"
    parser.add_argument("--forms", default=forms, help=f"of the encoder, comma-separated (default: {forms})")
    parser.add_argument("--batch", type=int, default=16 if device == "cuda" else 1, help="images per batch")
    parser.add_argument("--openers", type=int, default=cores, help=f"threads that open images (default: {cores})")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model on a CPU (default: 1)")
    parser.add_argument("--precision", default="fp16" if device == "cuda" else "fp32", help="see `latentmill encode`")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark. Returns the exit code."""
    options = parse_arguments()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{name}, torch {torch.__version__}, {options.openers} openers, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="latentmill-gpu-") as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        AutoencoderKL(**MODELS[options.model]).save_pretrained(folder / "vae")
        make_shards(folder / "shards", options.images, options.side)
        computes = [make_compute(options, form) for form in options.forms.split(",")]
        vae = load_vae(str(folder / "vae"))
        is_sound = print_checks(vae, computes, options.side)
        if options.device == "cuda":
            computes.append(print_choice(folder, vae, computes[0], options.side))
        title = f"{options.model} at {options.side} px, {options.precision}"
        print(f"\n| {title} | batch | images/s | busy |\n|---|---|---|---|")
        for compute in computes:
            ours = measure_latentmill(folder, compute, options)
            row = f"latentmill, {compute.form}, attention {compute.attention} | {compute.batch_size}"
            print(f"| {row} | {ours.images:.1f} | {ours.busy:.1%} |", flush=True)
        plain, model = measure_plain_loop(folder, options)
    print(f"| plain loop, {model} | {options.batch} | {plain.images:.1f} | {plain.busy:.1%} |")
    print(f"\n{ours.images / plain.images:.2f} times the plain loop")
    return int(ours.busy < BUSY or not is_sound)


if __name__ == "__main__":
    raise SystemExit(main())
