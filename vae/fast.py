"""What makes the model fast on a device, beside the model rather than in it."""

import ctypes
import sys

import torch
from torch import nn

from vae.winograd import WinogradConv2d

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
SHAPES = 64  # that are compiled, before torch gives up: a set of buckets has some thirty
_LARGE = (1 << 30, 32 << 20)  # the C library caps the second on some machines


def disable_malloc_trim() -> bool:
    """Let the C library keep the memory of freed activations for the next ones, instead of returning it to the system.

    Each layer allocates and frees megabytes; glibc maps and unmaps these anew every time, and the kernel clears every
    page: 4,241 page faults an image at 256 px, half of the micro model's time (38 ms an image, 21 ms without them).
    What the process holds stays at its peak, which it reaches again with the next image anyway.

    Returns whether the C library understood: it is glibc on Linux.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(any(mallopt(what, size) for size in _LARGE) for what in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


def compile_encoder(model: nn.Module) -> None:
    """Run a model's encoder through torch.compile from now on: compiled once for each shape of batch that comes.

    What is compiled stays in torch's cache on disk, so that of the replicas on one machine only the first one waits.
    On CPUs `quicken` is the faster choice (docs/benchmarks.md); the two do not go together.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    model.encoder.compile(dynamic=False)  # type: ignore[union-attr]


def optimize_for_cpu(model: nn.Module) -> None:
    """Make a float32 model on a CPU faster, in place and for inference only: wide 3x3 convolutions by Winograd's way.

    The numbers stay within 1e-5, the weights cannot be saved or trained any more.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if WinogradConv2d.suits(child):
                setattr(module, name, WinogradConv2d(child))  # type: ignore[arg-type]
