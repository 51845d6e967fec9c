"""Check a finished Parquet cache independently: with pyarrow, tarfile and json alone, without this project's reader.

It is a library, used by `bench.soak` and by the tests of clusters and faults. It compares the rows, rejects and
filtered samples of a cache with the number of its source's samples, and each data file with its committed SHA-256.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq

IMAGE_SUFFIXES = (".jpg", ".png")


def count_samples(shards: Path) -> int:
    """Return the number of images in the tars of a folder."""
    return sum(_count_images(path) for path in shards.glob("*.tar"))


def _count_images(tar: Path) -> int:
    with tarfile.open(tar) as archive:
        return sum(name.endswith(IMAGE_SUFFIXES) for name in archive.getnames())


def find_problems(cache: Mapping[str, bytes], samples: int) -> Iterator[str]:
    """Yield a sentence per problem. A consistent cache yields nothing.

    cache: the content of its files by their names. samples: the number of samples in its source.
    """
    keys: Counter[tuple[str, str]] = Counter()
    rejects = filtered = 0
    for name, data in cache.items():
        if name.startswith("data/"):
            table = pq.read_table(io.BytesIO(data), columns=["shard", "key"])
            keys.update(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))
        elif name.startswith("_rejects/"):
            rejects += len(data.splitlines())
        elif name.startswith("_commits/"):
            for part in json.loads(data)["parts"]:
                filtered += sum(part["filtered"].values())
                if hashlib.sha256(cache.get(part["file"], b"")).hexdigest() != part["sha256"]:
                    yield f"{part['file']} does not match the checksum in {name}"
    if keys.total() + rejects + filtered != samples:
        yield f"{keys.total()} rows, {rejects} rejects and {filtered} filtered samples, but {samples} source samples"
    if duplicates := [key for key, count in keys.items() if count > 1]:
        yield f"rows with the same key: {duplicates[:3]}"


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a cache on disk, by their names in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
