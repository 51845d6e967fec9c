"""Throughput of two steps of the encode job, each alone on both cores: the encoder, and opening images.

It is a part of `bench.end_to_end`, which prints the results. Opening means to decode a JPEG and resize it.
"""

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
SECONDS, SAMPLES, START_TIMEOUT = 8.0, 64, 120

barrier: Any = None  # shared by the processes of `measure_on_all_cores`, so that they run at the same time


def measure_on_all_cores(make_step: Callable[[Path], Callable[[], object]], folder: Path) -> float:
    """Return the images per second of one single-threaded process per core, summed."""
    context = get_context("spawn")
    with ProcessPoolExecutor(CORES, context, set_barrier, (context.Barrier(CORES),)) as pool:
        return sum(pool.map(measure, [make_step] * CORES, [folder] * CORES))


def set_barrier(shared_barrier: Any) -> None:
    """Set up a process of `measure_on_all_cores`."""
    global barrier
    barrier = shared_barrier


def measure(make_step: Callable[[Path], Callable[[], object]], folder: Path) -> float:
    """Return the images per second of this process. make_step: returns the timed function, which does one image."""
    torch.set_num_threads(1)
    step, count = make_step(folder), 0
    for _ in range(SAMPLES // 4):
        step()
    barrier.wait(START_TIMEOUT)
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        step()
        count += 1
    return count / (time.perf_counter() - start)


def make_encode_step(folder: Path) -> Callable[[], object]:
    """Return a step that encodes an opened image, with the settings that the job uses on CPUs."""
    compute = ComputeConfig(device="cpu", precision="fp32", batch_size=1, threads=1)
    latent_encoder = LatentEncoder(load_vae(str(folder / "vae")), compute, "float16")
    transform = Transform(resolution=SIDE)
    pixels = [prepare(data, transform) for data in read_images(folder / "shards", SAMPLES)]
    endless = cycle([as_image(p) for p in pixels])
    return lambda: latent_encoder.encode([next(endless)])


def make_open_step(folder: Path) -> Callable[[], object]:
    """Return a step that opens a JPEG from memory: it decodes and resizes it."""
    transform, endless = Transform(resolution=SIDE), cycle(read_images(folder / "shards", SAMPLES))
    return lambda: prepare(next(endless), transform)


def as_image(pixels: torch.Tensor) -> PreparedImage:
    """Return the encoder's input. The encoder uses only its pixels."""
    return PreparedImage(
        shard="",
        position=0,
        key="",
        columns={},
        pixels=pixels,
        original_height=0,
        original_width=0,
        resized_height=0,
        resized_width=0,
        crop_top=0,
        crop_left=0,
        enlarged=False,
    )


def prepare(data: bytes, transform: Transform) -> torch.Tensor:
    """Return a JPEG's pixels at the size at which they are encoded."""
    pixels = open_pixels(data)
    fit = transform.fit(*pixels.shape[:2])
    assert fit is not None
    return transform.apply(pixels, fit)
