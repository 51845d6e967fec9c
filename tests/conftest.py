"""Shared by all tests: a micro model, functions that make images and shards, and the command line as a function."""

import gc
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from PIL import Image

from jobs import cli
from jobs.entry import run_guarded
from vae import AutoencoderKL

gc.disable()  # what the imports of all tests make stays in memory

if not torch.cuda.is_available():  # Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
# JAX reads these when it is first used: one thread, as torch has, and faster compilation of slower code.
os.environ.setdefault("NPROC", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "latentmill-tests-jax"))

pytest_plugins = ["tests.servers"]

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"  # the time at the start of a log line

MICRO = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that use an S3 server into one process, if pytest-xdist distributes by groups."""
    for item in items:
        if "endpoint" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("s3"))


def pytest_collection_finish() -> None:
    """Leave what is in memory now out of every garbage collection: each would take half a second."""
    gc.freeze()
    gc.enable()


def slow_param(*values: object) -> ParameterSet:
    """Return the parameters of a case that only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def micro_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny AutoencoderKL of random weights: downscale 8, 4 latent channels."""
    folder = tmp_path_factory.mktemp("micro") / "vae"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**MICRO).save_pretrained(folder)
    return folder


def smooth(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Return an image, RGB uint8 [height, width, 3], that is unique to the seed. JPEG preserves its smooth colors."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    """Return an image file. kind: its format, as Pillow names it. options: those of Pillow's `save`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar with these members, in this order. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def img2dataset_members(first: int, count: int, **size: int) -> dict[str, bytes]:
    """Return the members of a shard of img2dataset: an image, its caption and its metadata per sample."""
    members: dict[str, bytes] = {}
    for index in range(first, first + count):
        members[f"{index:09d}.jpg"] = encoded(smooth(index, **size), quality=90)
        members[f"{index:09d}.txt"] = f"image {index}".encode()
        members[f"{index:09d}.json"] = json.dumps({"key": f"{index:09d}"}).encode()
    return members


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder `shards` with three tars of 5, 7 and 6 samples."""
    folder = tmp_path_factory.mktemp("source") / "shards"
    first = 0
    for number, count in enumerate((5, 7, 6)):
        write_tar(folder / f"{number:05d}.tar", img2dataset_members(first, count))
        first += count
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder `photos` with five images in two subfolders. One image has a caption, one has metadata."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    for index, name in enumerate(("a/1", "a/2", "b/1", "b/2", "b/3")):
        path = folder / f"{name}.{'png' if index % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(smooth(100 + index), "PNG" if index % 2 else "JPEG"))
    (folder / "a/1.txt").write_text("one", encoding="utf-8")
    (folder / "b/3.json").write_text('{"n": 3}', encoding="utf-8")
    return folder


@pytest.fixture
def latentmill(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line in this process: exit code, standard output, standard error."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_guarded(cli.main, [str(argument) for argument in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry failed tasks of this process without a pause."""
    monkeypatch.setattr("jobs.scheduler.FIRST_PAUSE", 0.0)
