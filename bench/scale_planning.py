"""What the driver of a job spends on a million shards: to list them, to plan them, and to find that nothing is new.

    python -m bench.scale_planning 1000000 [--only STEP ...]

The source is a simulated object store with that number of tars in 64 folders. It answers pages of 1,000 objects with
ETags, as S3 does, but without a network and without parsing its XML. Each step runs in a process of its own:

- store: the simulated store alone, which the next four steps contain: its pages, without their content.
- list: list the source.
- plan: list and inspect the source, and write the first plan.
- again: the same with that plan, so nothing is new; and list the names of as many files in data/ and in _commits/.
- sizes: read the names and sizes of the planned units, as `latentmill status` does.
- changed: the same, but the ETag of every object has changed. No unit has been encoded.
- folder: list a local directory of as many empty files, at most 100,000.

The output is a line per step: CPU seconds (user and system), seconds, and the peak of the resident memory in MB. The
exit code is 1 if a step exceeds its limit. The limits are those for a million shards, and in proportion for fewer.
"""

import argparse
import asyncio
import datetime
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.asyn import AsyncFileSystem
from PIL import Image

PROTOCOL = "simulated"
FOLDERS, PAGE = 64, 1000
MODIFIED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
BASE_MB = 250  # of a process that has listed nothing


@dataclass(frozen=True, slots=True)
class Step:
    """A step and its limits at a million shards: CPU seconds, and MB of memory. 0: no limit."""

    name: str
    cpu: float
    memory: int


STEPS = (
    Step("store", 0, 0),
    Step("list", 10, 900),
    Step("plan", 40, 1500),
    Step("again", 20, 1500),
    Step("sizes", 5, 700),
    Step("changed", 40, 1500),
    Step("folder", 0, 0),
)


class SimulatedStore(AsyncFileSystem):  # type: ignore[misc]
    """A read-only object store. `simulated://COUNT/NAME/FOLDER/FILE.tar`: a bucket has its number of objects.

    Each object is the same tar of one image. Its ETag depends on its name and on `version`.
    """

    protocol = PROTOCOL

    def __init__(self, version: str = "1", latency: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.version, self.latency, self.requests = version, latency, 0

    @staticmethod
    def split_path(path: str) -> tuple[str, str, None]:
        """Return the bucket and the key of a path, as s3fs does."""
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def _describe(self, name: str) -> dict[str, Any]:
        """Return the description of an object, with the fields that s3fs has."""
        description = {"Key": name, "LastModified": MODIFIED, "Size": len(TAR), "StorageClass": "STANDARD"}
        etag = f'"{name[-12:-4]}{self.version:>24}"'
        return {**description, "ETag": etag, "type": "file", "size": len(TAR), "name": name}

    def _list_keys(self, bucket: str, prefix: str, delimiter: str) -> Iterator[str]:
        """Yield the keys below a prefix in order, and the prefixes up to the delimiter, which end with it."""
        count = int(bucket)
        for folder in range(FOLDERS):
            start, end = count * folder // FOLDERS, count * (folder + 1) // FOLDERS
            below = f"shards/{folder:02d}/"
            if below.startswith(prefix) and delimiter and below != prefix:
                if prefix or not folder:
                    yield below[: below.index("/", len(prefix)) + 1]
            elif below.startswith(prefix) or prefix.startswith(below):
                yield from (f"{below}{n:08d}.tar" for n in range(start, end))

    async def _iterdir(
        self, bucket: str, max_items: int | None = None, delimiter: str = "/", prefix: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        for number, key in enumerate(self._list_keys(bucket, prefix, delimiter)):
            if number % PAGE == 0:
                self.requests += 1
                await asyncio.sleep(self.latency)
            if key.endswith("/"):
                yield {"name": f"{bucket}/{key[:-1]}", "type": "directory", "size": 0}
            else:
                yield self._describe(f"{bucket}/{key}")

    async def _ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        bucket, key, _ = self.split_path(self._strip_protocol(path))
        entries = [entry async for entry in self._iterdir(bucket, prefix=f"{key}/" if key else "")]
        if not entries:
            raise FileNotFoundError(path)
        return entries if detail else [entry["name"] for entry in entries]

    async def _find(self, path: str, detail: bool = False, **options: Any) -> Any:
        bucket, key, _ = self.split_path(self._strip_protocol(path))
        entries = [entry async for entry in self._iterdir(bucket, delimiter="", prefix=f"{key}/" if key else "")]
        return {entry["name"]: entry for entry in entries} if detail else [entry["name"] for entry in entries]

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path.endswith(".tar"):
            return self._describe(path)
        if "." in path or path.count("/") > 2:
            raise FileNotFoundError(path)
        return {"name": path, "type": "directory", "size": 0}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if not path.endswith(".tar"):
            raise FileNotFoundError(path)
        file = io.BytesIO(TAR)
        file.size = len(TAR)  # type: ignore[attr-defined]
        return file

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if not path.endswith(".tar"):
            raise FileNotFoundError(path)
        return TAR[start:end]


def _make_tar() -> bytes:
    """Return a tar of one image with a caption."""
    image, content = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "JPEG")
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in (("0.jpg", image.getvalue()), ("0.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


TAR = _make_tar()
fsspec.register_implementation(PROTOCOL, SimulatedStore, clobber=True)


def run_step(name: str, count: int, folder: Path) -> None:
    """Run a step in this process. folder: an empty folder for all steps, with the cache in it."""
    from jobs import encode
    from jobs.encode_options import EncodeOptions
    from latentmill.pages import list_pages
    from pipeline.cache import plan
    from pipeline.sources.listing import list_sources
    from pipeline.storage.folder import Folder

    cache, url = Folder(str(folder / "cache")), f"{PROTOCOL}://{count}/shards"
    if name == "store":
        fs = fsspec.filesystem(PROTOCOL)
        assert sum(map(len, list_pages(fs, f"{count}/shards", recursive=True))) == count
        return
    if name == "list":
        assert len(list_sources((url,), {}, cache.url).files) == count
        return
    if name == "folder":
        assert len(list_sources((str(folder / "tiny"),), {}, cache.url).files) == len(os.listdir(folder / "tiny"))
        return
    if name == "sizes":
        sizes = plan.read_unit_sizes(cache)
        assert len(sizes.names) == len(sizes.bytes) == count
        return
    version = ("version=2",) if name == "changed" else ()
    options = EncodeOptions(source=(url,), to=cache.url, vae="demo", storage_option=version)
    inputs = encode.inspect_sources(options, cache, None)
    units, _ = plan.extend_plan(cache, inputs.listing.files, inputs.listing.sources)
    assert len(units) == count
    if name == "again":
        plan.hash_plan_files(cache)
        folders = (
            Folder(url).iterate_names(f"{number:02d}") for _ in ("data", "_commits") for number in range(FOLDERS)
        )
        listed = [pa.array(names) for names in folders]
        assert sum(map(len, listed)) == 2 * count


def measure(name: str, count: int, folder: Path) -> tuple[float, float, float]:
    """Run a step in a new process. Returns its CPU seconds, its seconds, and its peak of memory in MB."""
    argv = [sys.executable, "-m", "bench.scale_planning", str(count), "--step", name, "--folder", str(folder)]
    started = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    cpu, memory = done.stdout.split()
    return float(cpu), time.perf_counter() - started, float(memory)


def main() -> int:
    """Measure the steps and print a table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("count", type=int, nargs="?", default=100_000)
    parser.add_argument("--only", nargs="*", choices=[step.name for step in STEPS])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_step(args.step, args.count, args.folder)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        unit = 1 if sys.platform == "darwin" else 1024
        print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6, flush=True)
        os._exit(0)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny").mkdir()
        for number in range(min(args.count, 100_000)):
            (Path(folder) / f"tiny/{number:06d}.jpg").touch()
        print(f"{'step':<10} {'CPU s':>8} {'s':>8} {'MB':>8}")
        for step in STEPS:
            if step.name in (args.only or [step.name]):
                cpu, seconds, memory = measure(step.name, args.count, Path(folder))
                share = args.count / 1e6
                is_over = bool(step.cpu) and (cpu > 5 + step.cpu * share or memory > BASE_MB + step.memory * share)
                failed |= is_over
                print(f"{step.name:<10} {cpu:>8.1f} {seconds:>8.1f} {memory:>8.0f}{'  over its limit' * is_over}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
