"""The two halves of the encode job, each alone on both cores: the encoder, and opening."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.make_shards import read_images
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.images.decode import open_pixels
from pipeline.images.transform import Transform
from pipeline.records import PreparedImage
from pipeline.weights import load_vae

CORES, SIDE = 2, 256
SECONDS, SAMPLE, PATIENCE = 8.0, 64, 120

barrier: Any = None  # of the processes of `on_both_cores`, so that they run at the same time


def on_both_cores(make: Callable[[Path], Callable[[], object]], folder: Path) -> float:
    """Images/s of processes of one thread, one a core, added up."""
    context = get_context("spawn")
    with ProcessPoolExecutor(CORES, context, share, (context.Barrier(CORES),)) as pool:
        return sum(pool.map(alone, [make] * CORES, [folder] * CORES))


def share(ours: Any) -> None:
    """Set up a process of `on_both_cores`."""
    global barrier
    barrier = ours


def alone(make: Callable[[Path], Callable[[], object]], folder: Path) -> float:
    """Images/s of one process. make: what makes the step that is timed, which does one image."""
    torch.set_num_threads(1)
    step, count = make(folder), 0
    for _ in range(SAMPLE // 4):
        step()
    barrier.wait(PATIENCE)
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def encoder(folder: Path) -> Callable[[], object]:
    """A step that encodes an image which is open already, as the job does on CPUs."""
    compute = ComputeConfig(device="cpu", precision="fp32", slice_size=1, batch_size=1, threads=1)
    latent_encoder = LatentEncoder(load_vae(str(folder / "vae")), compute, "float16")
    transform = Transform(resolution=SIDE)
    pixels = [opened(data, transform) for data in read_images(folder / "shards", SAMPLE)]
    endless = cycle([as_image(p) for p in pixels])
    return lambda: latent_encoder.encode([next(endless)])


def opener(folder: Path) -> Callable[[], object]:
    """A step that opens a JPEG which is in memory and brings it to size."""
    transform, endless = Transform(resolution=SIDE), cycle(read_images(folder / "shards", SAMPLE))
    return lambda: opened(next(endless), transform)


def as_image(pixels: torch.Tensor) -> PreparedImage:
    """What the encoder takes; it looks at the pixels only."""
    return PreparedImage(
        position=0,
        key="",
        columns={},
        pixels=pixels,
        original_height=0,
        original_width=0,
        crop_top=0,
        crop_left=0,
        enlarged=False,
    )


def opened(data: bytes, transform: Transform) -> torch.Tensor:
    """A JPEG's pixels at the size they are encoded at."""
    pixels = open_pixels(data)
    fit = transform.fit(*pixels.shape[:2])
    assert fit is not None
    return transform.apply(pixels, fit)
