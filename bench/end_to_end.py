"""How fast the encode job is on two cores: against its own two halves, and against a plain Ray Data pipeline.

    python -m bench.end_to_end [--shards 8] [--images 1024] [--keep DIRECTORY]

The halves are the encoder alone (e) and opening alone (o), each as two processes of one thread. Nothing on two cores
can be faster than 1/(1/e + 1/o); end to end without start-up (t) is held against that. The whole process, start-up
and all, is held against `bench/ray_data_peer.py` on the same shards and weights. Exit code 1 below a target.
Wants a quiet machine, pandas (for Ray Data), diffusers and scikit-image.
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

from bench.halves import CORES, SIDE, encoder, on_both_cores, opener
from bench.make_shards import make_model, make_shards, read_images

TIMES_RAY_DATA, SHARE_OF_BOUND, SAME = 2.0, 0.80, 1e-2
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure, print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images", type=int, default=1024, help="in all shards together")
    parser.add_argument("--keep", type=Path, help="make the shards and the outputs here, and leave them")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory(prefix="latentmill-bench-") as temporary:
        folder = options.keep or Path(temporary)
        make_shards(folder / "shards", options.shards, options.images)
        make_model(folder / "vae")
        print(f"{header(folder, options.images)}, load {load:.1f} before\n", flush=True)
        return compare(folder, options.images)


def compare(folder: Path, images: int) -> int:
    """Measure everything on the shards and the model in `folder`, print the table; the exit code."""
    e = on_both_cores(encoder, folder)
    o = on_both_cores(opener, folder)
    bound = 1 / (1 / e + 1 / o)
    shards, vae, out = str(folder / "shards"), str(folder / "vae"), tempfile.mkdtemp(dir=folder)
    job = [shards, "--to", f"{out}/ours", "--vae", vae, "--resolution", str(SIDE), "--device", "cpu", "--json"]
    ours, printed = timed(["-m", "jobs.encode", *job, "--workers", str(CORES)])
    run = json.loads(printed)["run"]
    t = run["counts"]["rows"] / run["working_seconds"]
    theirs, _ = timed([str(ROOT / "bench" / "ray_data_peer.py"), shards, "--to", f"{out}/theirs", "--vae", vae])
    print("                                            images/s")
    print(f"encoder alone, {CORES} processes            e   {e:10.1f}")
    print(f"opening alone, {CORES} processes            o   {o:10.1f}")
    print(f"bound                   1/(1/e + 1/o)   {bound:10.1f}")
    print(f"end to end without start-up         t   {t:10.1f}   ({images} in {run['working_seconds']:.1f} s)")
    print(f"whole process, latentmill               {images / ours:10.1f}   ({images} in {ours:.1f} s)")
    print(f"whole process, Ray Data                 {images / theirs:10.1f}   ({images} in {theirs:.1f} s)")
    rows, difference = agreement(Path(out, "ours/data"), Path(out, "theirs"), images)
    print(f"the two outputs: {rows} rows each, latents differ by {difference:.4f} standard deviations\n")
    if t > bound:
        print("t is above its bound: something else ran on these cores while e and o were measured; run this again")
    return judged(
        ("whole process, times Ray Data", theirs / ours, TIMES_RAY_DATA),
        ("t, share of the bound", t / bound, SHARE_OF_BOUND),
        (f"latents are the same within {SAME}", float(difference <= SAME), 1.0),
    )


def judged(*results: tuple[str, float, float]) -> int:
    """Print each result beside its target; 1 if one is below."""
    for name, reached, target in results:
        print(f"{name:<32} {reached:5.2f}   target {target:4.2f}   {'PASS' if reached >= target else 'FAIL'}")
    return int(any(reached < target for _, reached, target in results))


def header(folder: Path, images: int) -> str:
    """What was measured, on what."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    sizes = [len(data) for data in read_images(folder / "shards", images)]
    names = ("latentmill", "torch", "pillow", "ray", "diffusers", "pyarrow")
    return (
        f"{models[0] if models else platform.machine()}, {CORES} of {os.cpu_count()} cores\n"
        f"python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}\n"
        f"{images} JPEGs of 512x384, {sum(sizes) / len(sizes) / 1024:.0f} KB each; {SIDE} px, micro model"
    )


def timed(arguments: Sequence[str]) -> tuple[float, str]:
    """Seconds of a Python process from start to exit, and what it printed."""
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=alone, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if ended.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    return seconds, ended.stdout


def agreement(ours: Path, theirs: Path, images: int) -> tuple[int, float]:
    """How many rows both outputs have, and the mean difference of their latents, in standard deviations.

    Exits where the keys differ. Latents are not equal: both round resized pixels to whole numbers, not all alike.
    """
    mine = {row["key"]: np.frombuffer(row["latent"], np.float16).astype(np.float32) for row in rows_of(ours)}
    other = {row["key"]: np.ravel(row["latent"]).astype(np.float32) for row in rows_of(theirs)}
    if mine.keys() != other.keys() or len(mine) != images:
        sys.exit(f"of {images} images, {len(mine)} are in our output and {len(other)} in Ray Data's")
    difference = np.mean([np.abs(latent - other[key]).mean() for key, latent in mine.items()])
    return len(mine), float(difference / np.std(list(mine.values())))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Keys and latents in all Parquet files of a folder."""
    tables = [pq.read_table(path, columns=["key", "latent"]) for path in sorted(folder.glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


if __name__ == "__main__":
    sys.exit(main())
