"""Shared by the tests of the pipeline: a unit worker without Ray, a unit, and folders."""

import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileOpener
from fsspec.implementations.memory import MemoryFile

from pipeline.encoder import ComputeConfig
from pipeline.flow import EncodeSpec, UnitWorker
from pipeline.formats.schema import OutputSchema
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.records import Unit
from pipeline.sources import units
from pipeline.storage.folder import Folder
from pipeline.weights import Vae, load_vae
from tests.conftest import img2dataset_members, write_tar
from tests.listed_files import list_source_files

CPU = ComputeConfig(device="cpu", precision="fp32", batch_size=1, threads=1)


@pytest.fixture(scope="module")
def vae(micro_vae: Path) -> Vae:
    return load_vae(str(micro_vae))


def make_worker(vae: Vae, cache: Path | str, **settings: Any) -> UnitWorker:
    """Return a worker for a cache. settings: those of the job that differ from these."""
    job = {
        "cache": Folder(str(cache)),
        "source_options": {},
        "identity_sha256": "the identity",
        "transform": Transform(resolution=64),
        "dtype": "float16",
        "seed": 0,
        "layout": OutputSchema(),
        "image_column": None,
        "key_column": None,
        "rows_per_part": 4,
        "tile_above": None,
        "limits": Limits(),
        "compute": CPU,
        "open_workers": 1,
        "run": "a run",
        "versions": {},
    }
    return EncodeSpec(**{**job, **settings}).build(vae, threading.Event())  # type: ignore[arg-type]


@pytest.fixture
def worker(vae: Vae) -> Callable[..., UnitWorker]:
    """Return a function that makes a worker for a cache. Its keyword arguments change the settings of the job."""
    return partial(make_worker, vae)


def unit_of(source: Path) -> Unit:
    (unit,) = units.make_units(list_source_files((str(source),), {}, "nowhere"))
    return unit


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    """Return the unit of a tar with ten samples. The second sample is not an image."""
    members = img2dataset_members(0, 10, height=64, width=64)
    members["000000001.jpg"] = b"no image"
    return unit_of(write_tar(tmp_path / "s/0.tar", members))


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int | None], None]:
    """Return a function that truncates all files of a name at a byte when they are read. Their size is unchanged.

    None restores them.
    """
    ends: dict[str, int] = {}

    def truncate(read: Callable[..., bytes]) -> Callable[..., bytes]:
        def read_short(file: Any, *size: int) -> bytes:
            start = file.tell()
            data = read(file, *size)
            end = ends.get(str(file.path).rpartition("/")[2])
            return data if end is None else data[: max(0, end - start)]

        return read_short

    for file_class in (LocalFileOpener, MemoryFile):
        monkeypatch.setattr(file_class, "read", truncate(file_class.read))

    def set_end(name: str, end: int | None) -> None:
        ends.pop(name, None)
        if end is not None:
            ends[name] = end

    return set_end


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty folder, on disk and in memory."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}"
