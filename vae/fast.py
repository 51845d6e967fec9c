"""Optional speed-ups, kept apart from the model's definition.

- `disable_malloc_trim` saves page faults on Linux; it costs no accuracy, and keeps the process at its peak of memory.
- `optimize_for_cpu` replaces the group norms and wide convolutions of a float32 model on a CPU (`vae.group_norm`,
  `vae.winograd`): inference only.
- `fuse_encoder` replaces the operations between an encoder's convolutions by Triton kernels, for GPUs: inference only.
- `compile_encoder` runs the encoder through torch.compile, for GPUs; each shape of batch costs a compilation.

docs/benchmarks.md has the measurements.
"""

import ctypes
import sys

import torch
from torch import nn

from vae.group_norm import ChannelsLastGroupNorm
from vae.model import Autoencoder
from vae.winograd import WinogradConv2d

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
# Shapes that torch compiles before it falls back to the uncompiled model: a set of buckets has about 30.
COMPILED_SHAPES = 64
_THRESHOLDS = (1 << 30, 32 << 20)  # bytes; glibc accepts only the second as M_MMAP_THRESHOLD on some machines


def disable_malloc_trim() -> bool:
    """Let the C library reuse the memory of freed activations instead of returning it to the operating system.

    Each layer allocates and frees megabytes. By default, glibc maps and unmaps them every time, and the kernel clears
    every page. At 256 px that is 4,241 page faults per image and half of the micro model's time: 38 ms per image with
    them, 21 ms without. The process stays at its peak of memory, which it reaches again with the next image anyway.

    Returns True on success (Linux with glibc only).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(
        any(mallopt(parameter, size) for size in _THRESHOLDS) for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)
    )


def compile_encoder(model: nn.Module) -> None:
    """Run the model's encoder through torch.compile from now on, in place. Each shape of batch is compiled once.

    Compiled code stays in torch's cache on disk, so of the workers on a machine only the first one has to wait.
    On CPUs `optimize_for_cpu` is faster (docs/benchmarks.md). Do not use both.
    """
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    model.encoder.compile(dynamic=False)  # type: ignore[union-attr]


def fuse_encoder(model: Autoencoder) -> None:
    """Replace the encoder by a `vae.fused.FusedEncoder`, in place. Raises ModuleNotFoundError without triton.

    model: in its final dtype, on its device, in channels_last. For inference only.
    """
    from vae.fused import FusedEncoder  # imports triton, which not every machine has

    model.encoder = FusedEncoder(model.encoder)  # type: ignore[assignment]


def optimize_for_cpu(model: nn.Module) -> None:
    """Replace the wide 3x3 convolutions of a float32 model on a CPU by Winograd convolutions, in place.

    Wide group norms are replaced by ones that are exact in the memory format channels_last. For inference only: the
    model can no longer be trained or saved. Results change by less than 1e-5.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if WinogradConv2d.suits(child):
                setattr(module, name, WinogradConv2d(child))  # type: ignore[arg-type]
            elif ChannelsLastGroupNorm.suits(child):
                setattr(module, name, ChannelsLastGroupNorm(child))  # type: ignore[arg-type]
