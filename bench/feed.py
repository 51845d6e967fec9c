"""How well a worker feeds a fast device: the real data path with a sleep instead of the model, and one for opening.

    python -m bench.feed [--seconds 8] [--only NAME]

The device takes a fixed time per batch, whatever is in it. Opening an image takes 12 ms of sleep on each opener. So the
result shows what the loop, the readers and the writers cost, on any machine. Each row of the table has:

- busy: the share of the time for which the device ran, from its first batch to its last.
- padding: the share of its slots without an image. useful: busy without padding.
- CPU: milliseconds per image of this process without the openers: reading, batching, writing Parquet.

The exit code is 1 if a row misses its target.
"""

import argparse
import io
import os
import random
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from bench.encode_spec import make_spec
from pipeline.device_loop import DeviceLoop
from pipeline.encoder import ComputeConfig
from pipeline.flow import UnitWorker, WorkerContext
from pipeline.images.buckets import make_grid
from pipeline.images.prepare import make_opener
from pipeline.images.transform import Transform
from pipeline.part_writer import Stages
from pipeline.records import EncodedImage, PreparedImage, Unit
from pipeline.sources.listing import list_sources
from pipeline.sources.units import make_units
from pipeline.staging import Staging
from vae.fast import disable_malloc_trim

SIDE, DOWNSCALE, CHANNELS = 256, 8, 4
OPEN_SECONDS = 0.012


@dataclass(frozen=True)
class Case:
    """A device of `rate` images per second, and its source. openers: 0 for the default. useful: the target."""

    name: str
    rate: float
    kind: str
    unit_size: int
    has_buckets: bool
    openers: int
    useful: float


CASES = (
    Case("squares, tars of 1,000", 400, "tar", 1000, False, 16, 0.97),
    Case("33 buckets, tars of 1,000", 400, "tar", 1000, True, 16, 0.96),
    Case("33 buckets, folders of 256", 400, "folder", 256, True, 16, 0.90),
    Case("squares, default openers for 16 cores", 400, "tar", 1000, False, 0, 0.97),
    Case("squares, tars of 1,000, fast", 1500, "tar", 1000, False, 32, 0.95),
    Case("33 buckets, tars of 1,000, fast", 1500, "tar", 1000, True, 32, 0.93),
)


class PacedEncoder:
    """A device that takes `batch_size / rate` seconds per batch, and runs ahead of the thread that feeds it."""

    runs_ahead = True
    images = runs = 0

    def __init__(self, compute: ComputeConfig, rate: float) -> None:
        self.compute, self.batch_size = compute, compute.batch_size
        self.seconds = compute.batch_size / rate
        self.staging = Staging("cpu")
        self.batches = 0
        self.first = self.free_at = 0.0

    def is_fatal(self, error: Exception) -> bool:
        return False

    def launch(self, images: Sequence[PreparedImage]) -> tuple[Sequence[PreparedImage], float]:
        self.staging.release([self.staging.collate([image.pixels for image in images], self.batch_size)])
        now = time.perf_counter()
        self.first = self.first or now
        self.batches += 1
        self.images += len(images)
        self.free_at = max(self.free_at, now) + self.seconds
        return images, self.free_at

    def is_done(self, launched: tuple[Sequence[PreparedImage], float]) -> bool:
        return time.perf_counter() >= launched[1]

    def finish(self, launched: tuple[Sequence[PreparedImage], float]) -> Sequence[EncodedImage]:
        time.sleep(max(0.0, launched[1] - time.perf_counter()))
        height, width = launched[0][0].bucket
        shape = (len(launched[0]), CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        return [EncodedImage(latent) for latent in torch.zeros(shape, dtype=torch.float16)]


def make_source(folder: Path, case: Case, images: int) -> None:
    """Write a source whose image files are only numbers, from which the size after opening follows."""
    folder.mkdir(parents=True)
    for number in range(0, images, case.unit_size):
        names = [f"{index:07d}.jpg" for index in range(number, min(number + case.unit_size, images))]
        if case.kind == "folder":
            for name in names:
                (folder / name).write_bytes(name.encode())
            continue
        with tarfile.open(folder / f"{number:07d}.tar", "w") as tar:
            for name in names:
                header = tarfile.TarInfo(name)
                header.size = len(name)
                tar.addfile(header, io.BytesIO(name.encode()))


def make_sizes(has_buckets: bool) -> list[tuple[int, int]]:
    """Return the sizes of images after opening: squares, or the buckets in the shares of photographs and art."""
    if not has_buckets:
        return [(SIDE, SIDE)]
    buckets = make_grid(SIDE, SIDE // 16)
    weights = [1 / (1 + 6 * abs(abs(np.log(height / width)) - np.log(1.4))) for height, width in buckets]
    return random.Random(0).choices(buckets, weights, k=997)


def run(case: Case, folder: Path, seconds: float) -> tuple[float, float, float]:
    """Encode a source. Returns the busy share, the share of padding, and the CPU milliseconds per image."""
    images = int(case.rate * seconds / case.unit_size + 1) * case.unit_size
    make_source(folder / "source", case, images)
    sizes = make_sizes(case.has_buckets)
    transform = Transform(resolution=SIDE, buckets=make_grid(SIDE, SIDE // 16) if case.has_buckets else ())
    compute = ComputeConfig(device="cuda", precision="bf16", batch_size=8, threads=1)
    spec = make_spec(folder / "cache", transform, compute, case.openers).for_node(cores=16)

    def sleep_instead(data: bytes, *_: object) -> np.ndarray:
        time.sleep(OPEN_SECONDS)
        return np.empty((*sizes[int(data[:7]) % len(sizes)], 3), np.uint8)

    encoder: Any = PacedEncoder(spec.compute, case.rate)
    stages = Stages(
        pool=ThreadPoolExecutor(spec.openers),
        loop=DeviceLoop(encoder, spec.units_in_flight, spec.samples_in_flight, spec.openers),
        stop=threading.Event(),
        opener=make_opener(transform, spec.limits, sleep_instead),
    )
    worker = UnitWorker(WorkerContext(spec=spec, latent_encoder=encoder, stages=stages))
    units: Sequence[Unit] = make_units(list_sources([str(folder / "source")], {}, "nowhere").files)
    cpu = time.process_time()
    with ThreadPoolExecutor(spec.tasks_per_worker) as pool:
        encoded = sum(report.rows for report in pool.map(worker.run, units))
    barrier = threading.Barrier(spec.openers)
    openers = [stages.pool.submit(measure_thread_time, barrier) for _ in range(spec.openers)]
    cpu = time.process_time() - cpu - sum(opener.result() for opener in openers)
    assert encoded == images
    busy = encoder.batches * encoder.seconds / (encoder.free_at - encoder.first)
    return busy, 1 - images / (encoder.batches * encoder.batch_size), 1000 * cpu / images


def measure_thread_time(barrier: threading.Barrier) -> float:
    """Return the CPU seconds of this thread, once all threads of the pool run this function."""
    barrier.wait()
    return time.thread_time()


def main() -> int:
    """Run the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="time of the device per row (default: 8)")
    parser.add_argument("--only", default="", metavar="NAME", help="run only the rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_malloc_trim()
    pyarrow.array([0])  # pyarrow imports pandas here if it is installed: once per worker, not once per image
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before the start\n")
    print("| source | images/s of the device | busy | padding | useful | target | CPU ms per image |")
    print("|---|---|---|---|---|---|---|", flush=True)
    is_missed = False
    for case in (case for case in CASES if options.only in case.name):
        with tempfile.TemporaryDirectory(prefix="latentmill-feed-") as folder:
            busy, padding, cpu = run(case, Path(folder), options.seconds)
        useful = busy * (1 - padding)
        is_missed |= useful < case.useful
        verdict = "PASS" if useful >= case.useful else "FAIL"
        print(
            f"| {case.name} | {case.rate:g} | {busy:.1%} | {padding:.1%} | {useful:.1%} | {case.useful:.0%} {verdict} "
            f"| {cpu:.2f} |",
            flush=True,
        )
    return int(is_missed)


if __name__ == "__main__":
    raise SystemExit(main())
