"""Throughput of the encode job on two cores, compared with two of its steps and with a plain Ray Data pipeline.

    python -m bench.end_to_end [--shards 8] [--images 1024] [--keep DIRECTORY]

It needs an idle machine, pandas (for Ray Data), diffusers and scikit-image. The output is a table of images per second:

- e and o: the encoder alone, and opening images alone, each as two single-threaded processes
  (`bench.encoder_and_opening`).
- The bound 1/(1/e + 1/o): no job on these cores can be faster.
- t: the job without its start. The first target is t as a fraction of the bound.
- The whole process with its start: the job, and `bench/ray_data_peer.py` on the same shards and weights. The second
  target is the ratio of the two.

The last lines compare each result with its target (PASS or FAIL). The third target is that both caches have the same
latents. The exit code is 1 if a target is missed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bench.encoder_and_opening import CORES, SIDE, make_encode_step, make_open_step, measure_on_all_cores
from bench.make_shards import make_model, make_shards, read_images

RAY_DATA_RATIO, BOUND_FRACTION = 2.0, 0.80  # targets
MAX_DIFFERENCE = 1e-2  # between the latents of the two outputs, in standard deviations
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the benchmark. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8, help="number of tar files (default: 8)")
    parser.add_argument("--images", type=int, default=1024, help="number of images in all shards (default: 1024)")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep shards and outputs in this directory")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(prefix="latentmill-bench-") as temporary:
        folder = options.keep or Path(temporary)
        make_shards(folder / "shards", options.shards, options.images)
        make_model(folder / "vae")
        print(f"{describe_setup(folder, options.images)}, load average {load:.1f} before the start\n", flush=True)
        return compare(folder, options.images)


def compare(folder: Path, images: int) -> int:
    """Run all measurements on the shards and the model in `folder`, and print the table. Returns the exit code."""
    e = measure_on_all_cores(make_encode_step, folder)
    o = measure_on_all_cores(make_open_step, folder)
    bound = 1 / (1 / e + 1 / o)
    shards, vae, out = str(folder / "shards"), str(folder / "vae"), tempfile.mkdtemp(dir=folder)
    job = [shards, "--to", f"{out}/latentmill", "--vae", vae, "--resolution", str(SIDE), "--device", "cpu", "--json"]
    seconds, printed = run_python(["-m", "jobs.encode", *job, "--workers", str(CORES)])
    run = json.loads(printed)["run"]
    t = run["counts"]["rows"] / run["working_seconds"]
    ray_data = [str(ROOT / "bench" / "ray_data_peer.py"), shards, "--to", f"{out}/ray_data", "--vae", vae]
    ray_data_seconds, _ = run_python(ray_data)
    print("                                            images/s")
    print(f"encoder alone, {CORES} processes            e   {e:10.1f}")
    print(f"opening alone, {CORES} processes            o   {o:10.1f}")
    print(f"bound                   1/(1/e + 1/o)   {bound:10.1f}")
    print(f"job without its start               t   {t:10.1f}   ({images} in {run['working_seconds']:.1f} s)")
    print(f"whole process, latentmill               {images / seconds:10.1f}   ({images} in {seconds:.1f} s)")
    rate = images / ray_data_seconds
    print(f"whole process, Ray Data                 {rate:10.1f}   ({images} in {ray_data_seconds:.1f} s)")
    rows, difference = compare_outputs(Path(out, "latentmill/data"), Path(out, "ray_data"), images)
    print(f"outputs: {rows} rows each, mean difference of latents {difference:.4f} standard deviations\n")
    if t > bound:
        print("t is above the bound, so another program used these cores during the measurement of e and o; run again")
    return print_verdicts(
        ("whole process / Ray Data", ray_data_seconds / seconds, RAY_DATA_RATIO),
        ("t / bound", t / bound, BOUND_FRACTION),
        (f"latents agree within {MAX_DIFFERENCE}", float(difference <= MAX_DIFFERENCE), 1.0),
    )


def print_verdicts(*results: tuple[str, float, float]) -> int:
    """Print the name, value and target of each result. Returns the exit code: 1 if a value is below its target."""
    for name, value, target in results:
        print(f"{name:<32} {value:5.2f}   target {target:4.2f}   {'PASS' if value >= target else 'FAIL'}")
    return int(any(value < target for _, value, target in results))


def describe_setup(folder: Path, images: int) -> str:
    """Return the processor, the versions and the images of the measurement as text."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    sizes = [len(data) for data in read_images(folder / "shards", images)]
    names = ("latentmill", "torch", "pillow", "ray", "diffusers", "pyarrow")
    return (
        f"{models[0] if models else platform.machine()}, {CORES} of {os.cpu_count()} cores\n"
        f"python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}\n"
        f"{images} JPEGs of 512x384, {sum(sizes) / len(sizes) / 1024:.0f} KB each; {SIDE} px, micro model"
    )


def run_python(arguments: Sequence[str]) -> tuple[float, str]:
    """Run a Python process. Returns its seconds from start to exit, and its standard output. Exits if it fails."""
    # Without RAY_ADDRESS, each process starts a Ray of its own.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with exit code {process.returncode}:\n{process.stderr[-4000:]}")
    return seconds, process.stdout


def compare_outputs(latentmill: Path, ray_data: Path, images: int) -> tuple[int, float]:
    """Return the number of rows of both outputs, and the mean difference of their latents in standard deviations.

    Exits if the keys differ. The latents are not equal: both round resized pixels to integers, but not all in the same
    direction.
    """
    latents = {row["key"]: np.frombuffer(row["latent"], np.float16).astype(np.float32) for row in read_rows(latentmill)}
    others = {row["key"]: np.ravel(row["latent"]).astype(np.float32) for row in read_rows(ray_data)}
    if latents.keys() != others.keys() or len(latents) != images:
        sys.exit(f"of {images} images, latentmill wrote {len(latents)} and Ray Data wrote {len(others)}")
    difference = np.mean([np.abs(latent - others[key]).mean() for key, latent in latents.items()])
    return len(latents), float(difference / np.std(list(latents.values())))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the keys and latents in all Parquet files of a folder."""
    tables = [pq.read_table(path, columns=["key", "latent"]) for path in sorted(folder.glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


if __name__ == "__main__":
    sys.exit(main())
