"""Memory for the latents of a part and for its file. The operating system gets it back once it is not used any more.

The C library keeps what is freed (`vae.fast.disable_malloc_trim`), and uses a large block for small ones that may live
long. So the parts of a worker are kept in mappings of their own.
"""

import contextlib
import ctypes
import io
import math
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a cache can be inspected without torch
    import torch
    from _typeshed import ReadableBuffer
    from torch import Tensor

CHUNK_BYTES = 4 << 20  # a chunk is freed once none of its latents is used
FRAGMENT_BYTES = 64 << 20  # of freed memory that is kept; to return it costs milliseconds, and so does its next use
FILE_BYTES = 64 << 20  # address space of an empty file; pages are memory once they are written

_freed_before, _freed_lock = [0], threading.Lock()  # the fewest bytes since memory was returned


def allocate(size: int) -> mmap.mmap:
    """Return `size` bytes of private memory, all 0. A page takes memory once it is written."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def allocate_tensor(shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
    """Return a tensor in memory of its own, which is freed with the tensor and all its views. No size may be 0."""
    import torch

    return torch.frombuffer(allocate(math.prod(shape) * dtype.itemsize), dtype=dtype).reshape(tuple(shape))


@dataclass(slots=True)
class _Chunk:
    latents: "Tensor"  # [rows, latents of a row, C, h, w]
    used: int = 0


class LatentBuffer:
    """Copies of the latents of rows, in chunks for rows of one shape and type. Only one thread at a time may use it."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[torch.Size, torch.dtype], _Chunk] = {}

    def add(self, latents: "Sequence[Tensor]") -> "tuple[Tensor, int]":
        """Copy the latents of a row, one or two of [C, h, w]. Returns the chunk, and the row's index in it."""
        shape, dtype = latents[0].shape, latents[0].dtype
        chunk = self._chunks.get((shape, dtype))
        if chunk is None or chunk.used == len(chunk.latents):
            _return_fragments()
            rows = max(1, CHUNK_BYTES // sum(latent.nbytes for latent in latents))
            chunk = _Chunk(allocate_tensor((rows, len(latents), *shape), dtype))
            self._chunks[shape, dtype] = chunk
        index, chunk.used = chunk.used, chunk.used + 1
        for number, latent in enumerate(latents):
            chunk.latents[index, number].copy_(latent)
        return chunk.latents, index

    def close(self) -> None:
        """Drop the chunks. Each is freed once no row uses it."""
        self._chunks.clear()


def return_freed_memory() -> None:
    """Return to the operating system what the C library keeps of freed memory. Only glibc can do that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _return_fragments() -> None:
    """Return freed memory if much more of it is kept than before.

    An aligned block, such as a tensor, may not fit where one of the same size was freed. So the C library takes new
    memory for each batch, and what it keeps grows with the number of batches.
    """
    free = _count_freed_bytes()
    with _freed_lock:
        is_much = free > _freed_before[0] + FRAGMENT_BYTES
        _freed_before[0] = free if is_much else min(free, _freed_before[0])
    if is_much:
        return_freed_memory()


def _count_freed_bytes() -> int:
    """Return the bytes that the C library keeps of freed memory, or 0 if it is not glibc 2.33 or later."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo.restype = _MallocInfo
    return int(mallinfo().fordblks)


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


class FileBuffer(io.RawIOBase):
    """A file in memory, to be written from its start to its end. On Linux, its content is not copied as it grows."""

    def __init__(self) -> None:
        self._memory = allocate(FILE_BYTES)
        self._size = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        """Append bytes. Returns their number."""
        view = memoryview(data).cast("B")
        end = self._size + len(view)
        if end > len(self._memory):
            self._grow(max(end, 2 * len(self._memory)))
        self._memory[self._size : end] = view
        self._size = end
        return len(view)

    def tell(self) -> int:
        """Return the number of bytes that were written."""
        return self._size

    def view(self) -> memoryview:
        """Return the content without a copy. Nothing may be written after that."""
        return memoryview(self._memory)[: self._size]

    def _grow(self, size: int) -> None:
        with contextlib.suppress(SystemError):  # macOS cannot resize
            self._memory.resize(size)
            return
        grown = allocate(size)
        grown[: self._size] = self._memory[: self._size]
        self._memory = grown
