"""The memory of parts: no copies more than needed, and none that outlives its part."""

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import buffers
from pipeline.buffers import FileBuffer, LatentBuffer
from pipeline.flow import UnitWorker
from pipeline.part_writer import PartBuffer
from pipeline.records import EncodedImage, Unit
from pipeline.storage.folder import Folder
from tests.checked_images import make_image


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
    """Not even while its error is kept, which refers to all that its functions used."""
    encoder, calls = worker(tmp_path / "c"), list[int]()

    def fail_after(successes: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def fail_later(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > successes:
                raise RuntimeError("it failed")
            return function(*arguments)

        return fail_later

    device = encoder.context.latent_encoder
    if stage == "encode":
        monkeypatch.setattr(device, "launch", fail_after(5, device.launch))
    else:
        monkeypatch.setattr(Folder, "create", fail_after(1, Folder.create))
    with pytest.raises(RuntimeError, match="it failed") as kept:
        encoder.run(unit)
    assert kept.value.__traceback__ is not None
    assert (len(mappings) >= 3, count_alive(mappings)) == (True, 0)


def test_rows_of_many_shapes_are_copied_and_chunks_are_freed_one_by_one(
    mappings: list[weakref.ref[mmap.mmap]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "CHUNK_BYTES", 500)
    generator, buffer = torch.Generator().manual_seed(0), LatentBuffer()
    latents = [torch.randn(2, 4, 3 + number % 3, 5, generator=generator).bfloat16() for number in range(30)]
    added = [buffer.add(pair) for pair in latents]
    buffer.close()
    assert all(torch.equal(chunk[index], pair) for (chunk, index), pair in zip(added, latents, strict=True))
    assert len(mappings) == count_alive(mappings) > 6
    before = count_alive(mappings)
    first = {index for index, (chunk, _) in enumerate(added) if chunk is added[0][0]}
    added = [pair for index, pair in enumerate(added) if index not in first]
    assert count_alive(mappings) == before - 1


@pytest.mark.parametrize("can_resize", [True, False], ids=["resized", "copied"])
def test_a_file_grows_beyond_its_first_size(can_resize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(mmap.mmap):
        def resize(self, _: int) -> None:
            raise SystemError("mmap: resizing not available--no mremap()")

    monkeypatch.setattr(buffers, "FILE_BYTES", 10)
    if not can_resize:
        monkeypatch.setattr(mmap, "mmap", Fixed)
    file, pieces = FileBuffer(), [b"x" * number for number in (0, 3, 10, 9000, 1, 30_000)]
    for piece in pieces:
        assert file.write(memoryview(piece)) == len(piece)
    assert (file.tell(), bytes(file.view())) == (sum(map(len, pieces)), b"".join(pieces))


def test_rows_have_no_memory_of_their_own_beside_that_of_images() -> None:
    """Small blocks that live long would keep the C library from using what is freed around them."""
    buffer = PartBuffer()
    for number in range(40):
        image = make_image(number, 64, 72)
        buffer.add_encoded(image, EncodedImage(torch.full((4, 8, 9), number)))
    buffer.sort()
    assert [int(row.latents[0].sum()) for row in buffer.rows] == [288 * number for number in range(40)]
    assert len({id(row.chunk) for row in buffer.rows}) == 1
    assert len({id(row.image.pixels) for row in buffer.rows}) == 1
