"""Memory on the host that a device reads from and writes into."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Staging:
    """Memory on the host from which a device reads batches, and into which it writes latents.

    It is used again, because allocating pinned memory is slow, and copied on a stream of its own, so that the copy of a
    batch runs beside the model. On CPUs, it is ordinary memory.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._free: list[torch.UntypedStorage] = []
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory. `release` makes it available again."""
        size = math.prod(shape) * dtype.itemsize
        for index, storage in enumerate(self._free):
            if storage.nbytes() >= size:
                del self._free[index]
                return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]
        del self._free[:1]  # it is too small; otherwise the memory would grow with every shape
        return torch.empty(*shape, dtype=dtype, pin_memory=self._stream is not None)

    def release(self, buffers: Iterable[Tensor]) -> None:
        """Take back memory that no device uses any more."""
        self._free += [buffer.untyped_storage() for buffer in buffers]

    def collate(self, images: Sequence[Tensor], size: int) -> Tensor:
        """Copy images, uint8 [H, W, 3] each, to a batch [size, H, W, 3]. The last image is repeated."""
        batch = self.take((size, *images[0].shape), torch.uint8)
        for index, image in enumerate(images):
            batch[index].copy_(image)
        batch[len(images) :] = images[-1]
        return batch

    def to_device(self, batch: Tensor) -> Tensor:
        """Return a batch on the device."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            pixels = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        pixels.record_stream(current)
        return pixels
