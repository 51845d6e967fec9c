"""The memory of parts: no copies more than needed, and none that outlives its part."""

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import buffers
from pipeline.flow import UnitWorker
from pipeline.records import Unit


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[mmap.mmap]]]:
    """The memory that was allocated for parts. Objects are freed without the help of the garbage collector."""
    allocate, allocated = buffers.allocate, list[weakref.ref[mmap.mmap]]()

    def allocate_and_watch(size: int) -> mmap.mmap:
        memory = allocate(size)
        allocated.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(buffers, "allocate", allocate_and_watch)
    gc.collect()
    gc.disable()
    yield allocated
    gc.enable()


def count_alive(mappings: list[weakref.ref[mmap.mmap]]) -> int:
    return sum(memory() is not None for memory in mappings)


def test_a_written_part_keeps_no_memory(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, mappings: list[weakref.ref[mmap.mmap]]
) -> None:
    encoder = worker(tmp_path / "c")
    assert encoder.run(unit).parts == 3
    assert (len(mappings) >= 6, count_alive(mappings)) == (True, 0)


@pytest.mark.parametrize("stage", ["encode", "write"])
def test_a_unit_that_fails_keeps_no_memory(
    worker: Callable[..., UnitWorker],
    unit: Unit,
    tmp_path: Path,
    mappings: list[weakref.ref[mmap.mmap]],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    encoder = worker(tmp_path / "c")
    launch, calls = encoder.context.latent_encoder.launch, []

    def fail_later(*_: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("the device failed")
        return launch(*_)

    def fail(*_: Any) -> bool:
        raise RuntimeError("the store failed")

    if stage == "encode":
        monkeypatch.setattr(encoder.context.latent_encoder, "launch", fail_later)
    else:
        monkeypatch.setattr(type(encoder.context.spec.cache), "create", fail)
    kept = []
    try:
        encoder.run(unit)
    except RuntimeError as error:
        kept.append(str(error))
    print(kept)
    assert (len(mappings) >= 2, count_alive(mappings)) == (True, 0)
