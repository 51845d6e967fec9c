"""How fast the latents of a cache come into a training process, compared with other libraries on the same files.

    python -m bench.read [--rows 4096,40960] [--only "NAME;NAME"] [--repeats 3] [--python PYTHON]

The result is always batches of 64 as one float16 tensor on the CPU, with their captions. Each reader runs in a process
of its own, on one thread of torch, with the files in the page cache. Each row of the table has:

- samples per second of CPU time, and the bytes of their latents: the best of `--repeats` passes, opening included.
- ratio: to `Cache.rows` in the same run.
- memory: the most that the process has over what it has after its imports, without files that are mapped.
- first batch: the time to it, from opening the cache.

Readers of libraries that are not installed are left out. `--python` names the interpreter of the readers, if litdata is
in another environment. Ours mix the rows of four groups, the others read in order. `Cache.rows` and ours verify the CRC
of each page, which no peer does. The exit code is 1 if a peer is faster than ours, or if ours has less than 4 times the
rate of `Cache.rows` with rows of 128 KiB.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH = 64
OURS = "latentmill"
TARGET = 4.0  # times the rate of Cache.rows, with rows of 128 KiB
Batches = Iterator[tuple[Tensor, list[str | None]]]


@dataclass(frozen=True)
class Case:
    """A cache. side: of its images, in pixels."""

    name: str
    channels: int
    side: int
    rows: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a latent."""
        return self.channels, self.side // 8, self.side // 8


CASES = (Case("128 KiB", 16, 512, 4096), Case("8 KiB", 4, 256, 40960))


def read_ours(case: Case, folder: Path, checksums: bool = True, **settings: Any) -> Batches:
    """Mix the rows of four groups, and make batches of them."""
    from latentmill import Cache
    from latentmill.loading.batch import BatchSettings, check_settings, make_batch
    from latentmill.loading.index import read_index
    from latentmill.loading.row_groups import GroupReader

    cache = Cache.open(str(folder))
    index = read_index(cache)
    rules = check_settings(cache, BatchSettings(**settings))
    reader, generator = GroupReader(cache, index, rules.columns, checksums), np.random.default_rng(0)
    for first in range(0, len(index.rows), 4):
        numbers = range(first, min(first + 4, len(index.rows)))
        groups = {number: reader.read(number) for number in numbers}
        rows = np.arange(index.starts[numbers[0]], index.starts[numbers[-1]] + index.rows[numbers[-1]])
        generator.shuffle(rows)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            batch = make_batch(rules, index, groups, rows[start : start + BATCH])
            yield batch["latents"], batch["captions"]


def read_raw(case: Case, folder: Path) -> Batches:
    return read_ours(case, folder, scale=False, dtype=None)


def read_unchecked(case: Case, folder: Path) -> Batches:
    return read_ours(case, folder, checksums=False, scale=False, dtype=None)


def read_loader(case: Case, folder: Path) -> Batches:
    from latentmill import Cache, Loader

    for batch in Loader(Cache.open(str(folder)), BATCH, scale=False, dtype=None):
        yield batch["latents"], batch["captions"]


def read_cache_rows(case: Case, folder: Path) -> Batches:
    from latentmill import Cache

    cache = Cache.open(str(folder))
    rows = (
        row for file in cache.files() for row in cache.rows(file, columns=["key", "txt", "latent", "shape", "dtype"])
    )
    yield from collate((cache.raw_latent(row), row["txt"]) for row in rows)


def collate(rows: Iterator[tuple[Tensor, str | None]]) -> Batches:
    """Yield full batches of rows."""
    latents, captions = list[Tensor](), list[str | None]()
    for latent, caption in rows:
        latents.append(latent)
        captions.append(caption)
        if len(latents) == BATCH:
            yield torch.stack(latents), captions
            latents, captions = [], []


def to_latent(data: bytes, case: Case) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float16).view(case.shape)


def open_datasets(folder: Path) -> Any:
    from datasets import load_dataset

    files = sorted(map(str, (folder / "data").glob("*.parquet")))
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return dataset.select_columns(["latent", "key", "txt"])


def read_datasets(case: Case, folder: Path) -> Batches:
    yield from collate((to_latent(row["latent"], case), row["txt"]) for row in open_datasets(folder))


def read_datasets_arrow(case: Case, folder: Path) -> Batches:
    for table in open_datasets(folder).with_format("arrow").iter(batch_size=BATCH, drop_last_batch=True):
        column = table["latent"].combine_chunks()
        start = int(np.frombuffer(column.buffers()[1], np.int32, 1, 4 * column.offset)[0])
        values = np.frombuffer(column.buffers()[2], np.uint8, BATCH * 2 * int(np.prod(case.shape)), start)
        yield torch.from_numpy(values.copy()).view(torch.float16).view(BATCH, *case.shape), table["txt"].to_pylist()


def read_webdataset(case: Case, folder: Path) -> Batches:
    import webdataset

    files = sorted(map(str, (folder / "data").glob("*.tar")))
    dataset = webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode()
    yield from collate((torch.from_numpy(row["latent.npy"]), row.get("txt")) for row in dataset)


def read_litdata(case: Case, folder: Path) -> Batches:
    """Read our Parquet files. litdata writes an index beside them, so they are linked into a folder."""
    import litdata
    from litdata.streaming.item_loader import ParquetLoader

    with tempfile.TemporaryDirectory(dir=folder) as linked:
        for file in (folder / "data").glob("*.parquet"):
            os.link(file, Path(linked, file.name))
        litdata.index_parquet_dataset(linked)
        dataset = litdata.StreamingDataset(linked, item_loader=ParquetLoader(), shuffle=False)
        names = list(dataset[0]) if isinstance(dataset[0], dict) else ["key", "shard", "latent"]
        latent, text = (names.index(name) if not isinstance(dataset[0], dict) else name for name in ("latent", "txt"))
        yield from collate((to_latent(row[latent], case), row[text]) for row in dataset)


Reader = Callable[[Case, Path], Batches]
READERS: dict[str, tuple[str, str, Reader]] = {  # name: the library it needs, the container, the function
    "Cache.rows": ("torch", "parquet", read_cache_rows),
    OURS: ("torch", "parquet", read_raw),
    "latentmill, checksums=False": ("torch", "parquet", read_unchecked),
    "latentmill, Loader": ("torch", "parquet", read_loader),
    "latentmill, scaled in float32": ("torch", "parquet", read_ours),
    "latentmill, WebDataset": ("torch", "webdataset", read_raw),
    "datasets, streaming": ("datasets", "parquet", read_datasets),
    "datasets, streaming, Arrow": ("datasets", "parquet", read_datasets_arrow),
    "webdataset": ("webdataset", "webdataset", read_webdataset),
    "litdata": ("litdata", "parquet", read_litdata),
}


def measure(name: str, case: Case, folder: Path, repeats: int) -> dict[str, float] | None:
    """Read a cache in this process. Returns the numbers of its row; None if the library is not installed."""
    library, _, read = READERS[name]
    if importlib.util.find_spec(library) is None:
        return None
    torch.set_num_threads(1)
    importlib.import_module("latentmill.loading.batch" if library == "torch" else library)
    before, rate, first = read_memory(), 0.0, 0.0
    peak = before
    for _ in range(repeats):
        rows, cpu, start = 0, time.process_time(), time.perf_counter()
        for latents, captions in read(case, folder):
            first = first or time.perf_counter() - start
            assert latents.shape == (BATCH, *case.shape) and len(captions) == BATCH and captions[0]
            rows += BATCH
            peak = max(peak, read_memory()) if rows % (16 * BATCH) == 0 else peak
        assert rows >= case.rows * 0.9, rows
        rate = max(rate, rows / (time.process_time() - cpu))
    return {"rate": rate, "MiB": peak - before, "first": first}


def read_memory() -> float:
    """Return the memory of this process in MiB, without files that are mapped: the system can free those."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def run(name: str, case: Case, folder: Path, options: argparse.Namespace) -> dict[str, float] | None:
    """Measure a reader in a process of its own."""
    argv = [options.python, "-m", "bench.read", "--child", name, "--case", case.name, "--rows", options.rows]
    argv += ["--folder", str(folder), "--repeats", str(options.repeats)]
    process = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if process.returncode:
        print(f"{name}: failed: {(process.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return None
    result: dict[str, float] | None = json.loads(process.stdout.splitlines()[-1])
    return result


def print_table(case: Case, results: dict[str, dict[str, float]]) -> bool:
    """Print the rows of a case. Returns whether the targets are met."""
    size = int(np.prod(case.shape)) * 2
    base = results["Cache.rows"]["rate"]
    print(f"\n| rows of {case.name} | samples per CPU second | MB/s | ratio | memory, MiB | first batch, ms |")
    print("|---|---|---|---|---|---|")
    for name, row in results.items():
        rate, ratio = row["rate"], row["rate"] / base
        print(
            f"| {name} | {rate:,.0f} | {rate * size / 1e6:,.0f} | {ratio:.2f} | {row['MiB']:,.0f} "
            f"| {row['first'] * 1e3:,.0f} |",
            flush=True,
        )
    fastest = max((row["rate"] for name, row in results.items() if is_peer(name)), default=0.0)
    least = TARGET * base if size > 100_000 else 0.0
    return results[OURS]["rate"] > fastest and results[OURS]["rate"] >= least


def is_peer(name: str) -> bool:
    return READERS[name][0] != "torch"


def prepare(case: Case, folder: Path) -> dict[str, Path]:
    """Write the rows of a case in both containers, and read them once. Returns their folders."""
    from bench.make_cache import CacheSpec, write_cache

    folders = {}
    for container in ("parquet", "webdataset"):
        folders[container] = folder / f"{case.side}-{container}"
        spec = CacheSpec(
            buckets={(case.side, case.side): case.rows},
            channels=case.channels,
            container=container,
            parts=max(1, case.rows * int(np.prod(case.shape)) * 2 >> 28),
        )
        write_cache(folders[container], spec)
        for file in (folders[container] / "data").iterdir():
            file.read_bytes()
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="4096,40960", help="of the two caches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="names of readers, separated by semicolons")
    parser.add_argument("--python", default=sys.executable)
    for name in ("--child", "--case", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [
        Case(case.name, case.channels, case.side, int(rows))
        for case, rows in zip(CASES, options.rows.split(","), strict=True)
    ]
    if options.child:
        (case,) = (case for case in cases if case.name == options.case)
        print(json.dumps(measure(options.child, case, Path(options.folder), options.repeats)))
        return 0
    names = [name for name in READERS if not options.only or name in (*options.only.split(";"), "Cache.rows", OURS)]
    met = True
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            folders = prepare(case, Path(folder))
            found = {name: run(name, case, folders[READERS[name][1]], options) for name in names}
            met &= print_table(case, {name: row for name, row in found.items() if row is not None})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
