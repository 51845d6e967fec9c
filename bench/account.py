"""What is wrong with a cache, by readers that are not ours: pyarrow, tarfile and json alone."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq

IMAGES = (".jpg", ".png")


def samples_of(shards: Path) -> int:
    """How many images the tars of a folder have."""
    return sum(_images(path) for path in shards.glob("*.tar"))


def _images(tar: Path) -> int:
    with tarfile.open(tar) as archive:
        return sum(name.endswith(IMAGES) for name in archive.getnames())


def wrongs(cache: Mapping[str, bytes], samples: int) -> Iterator[str]:
    """Each thing that is wrong. cache: its files by their names; samples: how many its source has."""
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
                filtered += part["filtered"]
                if hashlib.sha256(cache.get(part["file"], b"")).hexdigest() != part["sha256"]:
                    yield f"{part['file']} is not what {name} says"
    if keys.total() + rejects + filtered != samples:
        yield f"{keys.total()} rows, {rejects} rejects and {filtered} filtered, of {samples} samples"
    if twice := [key for key, count in keys.items() if count > 1]:
        yield f"there twice: {twice[:3]}"


def files(folder: Path) -> dict[str, bytes]:
    """All files of a cache on disk, by their names in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
