"""How much memory a worker takes for the parts that it works on, with a device that takes no time.

    python -m bench.scale_memory [--rows 4096] [--units 2] [--parts 1] [--channels 8] [--format parquet]

A worker encodes units of synthetic images to moments: with 8 channels, 64 kB per row of 512 px. Each unit has a number
of parts, and a thread of its own. Images are really decoded. The printed sizes are in MB of the worker's process:

- base: after it encoded a small unit. So its libraries, buffers and images in flight are not counted.
- parts: the latents of the parts that exist at once. These are two per unit, if it has more than one: one is published
  while the next is filled.
- peak: the largest size above the base. ratio: peak divided by parts. end: the size above the base at the end.

The exit code is 1 if the peak is above the limit: 1.5 times the parts, or 256 MB more than them if that is more.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.encode_spec import make_spec
from pipeline.device_loop import DeviceLoop
from pipeline.encoder import ComputeConfig
from pipeline.flow import UnitWorker, WorkerContext
from pipeline.formats.schema import OutputSchema
from pipeline.images.prepare import make_opener
from pipeline.images.transform import Transform
from pipeline.part_writer import Stages
from pipeline.records import Container, EncodedImage, PreparedImage
from pipeline.sources.listing import list_sources
from pipeline.sources.units import make_units
from vae.fast import disable_malloc_trim

SMALLEST_EXCESS = 256 * 10**6  # bytes above the parts: for a row group that is written, and for freed images
DOWNSCALE = 8
BATCH = 8
WARM_UP = 256  # images


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The work of a worker: `units` at once, each of `parts` parts of `rows` images with sides of `side` pixels.

    channels: of the moments. openers: threads that open images.
    """

    rows: int = 4096
    units: int = 2
    parts: int = 1
    side: int = 512
    channels: int = 8
    openers: int = 2
    container: Container = "parquet"

    @property
    def part_bytes(self) -> int:
        """The bytes of the latents of the parts that exist at once."""
        return self.units * min(self.parts, 2) * self.rows * self.channels * (self.side // DOWNSCALE) ** 2 * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Sizes in bytes, as the head of this module describes them. seconds: the time of all units."""

    base: int
    parts: int
    peak: int
    end: int
    seconds: float

    @property
    def ratio(self) -> float:
        """The peak above the base, in sizes of the parts."""
        return self.peak / self.parts

    @property
    def is_within_limit(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.parts + max(self.parts // 2, SMALLEST_EXCESS)


class InstantEncoder:
    """A device that returns random moments at once."""

    runs_ahead = False
    images = runs = 0

    def __init__(self, compute: ComputeConfig, channels: int) -> None:
        self.compute, self.batch_size, self.channels = compute, compute.batch_size, channels
        self._random = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).half()

    def is_fatal(self, error: Exception) -> bool:
        return False

    def launch(self, images: Sequence[PreparedImage]) -> Sequence[PreparedImage]:
        return images

    def is_done(self, launched: Sequence[PreparedImage]) -> bool:
        return True

    def finish(self, launched: Sequence[PreparedImage]) -> Sequence[EncodedImage]:
        height, width = launched[0].bucket
        shape = (len(launched), self.channels, height // DOWNSCALE, width // DOWNSCALE)
        size = int(np.prod(shape))
        start = launched[0].position * 4097 % (len(self._random) - size)
        self.images += len(launched)
        return [EncodedImage(latent) for latent in self._random[start : start + size].reshape(shape).clone()]


def read_status(name: str) -> int:
    """Return a size of this process in bytes, such as VmRSS."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def reset_peak() -> None:
    """Let VmHWM, the largest size of this process, start again from its size now."""
    Path("/proc/self/clear_refs").write_text("5")


def make_source(folder: Path, case: Case) -> None:
    """Write a tar for each unit, and one of WARM_UP images that sorts first."""
    folder.mkdir(parents=True)
    sides = np.linspace(0, 255, case.side, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(sides[:, None], sides[None], sides[:, None] ^ sides[None]), axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    for number, images in enumerate([WARM_UP, *[case.rows * case.parts] * case.units]):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(images):
                header = tarfile.TarInfo(f"{index:07d}.jpg")
                header.size = file.tell()
                tar.addfile(header, io.BytesIO(file.getvalue()))


def make_worker(cache: Path, case: Case) -> UnitWorker:
    """Return a worker with an instant device, with the settings of a worker on a CPU."""
    compute = ComputeConfig(device="cpu", precision="fp32", batch_size=BATCH, threads=1)
    transform = Transform(resolution=case.side)
    layout = OutputSchema(container=case.container, store="moments")
    spec = replace(make_spec(cache, transform, compute, case.openers), layout=layout, rows_per_part=case.rows)
    encoder: Any = InstantEncoder(compute, case.channels)
    stages = Stages(
        pool=ThreadPoolExecutor(spec.openers, thread_name_prefix="open"),
        loop=DeviceLoop(encoder, spec.units_in_flight, spec.samples_in_flight, spec.openers),
        stop=threading.Event(),
        opener=make_opener(transform, spec.limits),
    )
    return UnitWorker(WorkerContext(spec=spec, latent_encoder=encoder, stages=stages))


def run(case: Case, folder: Path) -> MemoryUse:
    """Encode the units in this process, and measure it."""
    torch.set_num_threads(1)
    disable_malloc_trim()  # as a worker does
    make_source(folder / "source", case)
    worker = make_worker(folder / "cache", case)
    first, *units = make_units(list_sources([str(folder / "source")], {}, "nowhere").files)
    worker.run(first)
    base = read_status("VmRSS")
    reset_peak()
    start = time.perf_counter()
    with ThreadPoolExecutor(len(units)) as pool:
        rows = sum(report.rows for report in pool.map(worker.run, units))
    seconds = time.perf_counter() - start
    assert rows == case.rows * case.parts * case.units
    peak, end = read_status("VmHWM") - base, read_status("VmRSS") - base
    return MemoryUse(base=base, parts=case.part_bytes, peak=peak, end=end, seconds=seconds)


def measure(case: Case) -> MemoryUse:
    """Encode the units in a process of its own, and return what it measured."""
    command = [sys.executable, "-m", "bench.scale_memory", "--case", json.dumps(asdict(case))]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return MemoryUse(**json.loads(printed))


def main() -> int:
    """Run the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="images per part (default: 4096)")
    parser.add_argument("--units", type=int, default=2, help="units at once (default: 2)")
    parser.add_argument("--parts", type=int, default=1, help="parts per unit (default: 1)")
    parser.add_argument("--channels", type=int, default=8, help="channels of the moments (default: 8)")
    parser.add_argument("--openers", type=int, default=2, help="threads that open images (default: 2)")
    parser.add_argument("--format", choices=["parquet", "webdataset"], default="parquet")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of `measure`
    options = parser.parse_args()
    if options.case:
        with tempfile.TemporaryDirectory(prefix="latentmill-memory-") as folder:
            print(json.dumps(asdict(run(Case(**json.loads(options.case)), Path(folder)))))
        return 0
    counts = {name: getattr(options, name) for name in ("rows", "units", "parts", "channels", "openers")}
    case = Case(**counts, container=options.format)
    use = measure(case)
    print("| rows | units | parts | format | base | parts | peak | ratio | end | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    base, parts, peak, end = (f"{size / 1e6:.0f}" for size in (use.base, use.parts, use.peak, use.end))
    print(
        f"| {case.rows} | {case.units} | {case.parts} | {case.container} | {base} | {parts} | {peak} "
        f"| {use.ratio:.2f} | {end} | {use.seconds:.1f} |"
    )
    return int(not use.is_within_limit)


if __name__ == "__main__":
    raise SystemExit(main())
