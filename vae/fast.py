"""What makes the model fast on a device, beside the model rather than in it."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = (1 << 30, 32 << 20)  # the C library caps the second on some machines


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed activations for the next ones, instead of returning it to the system.

    Each layer allocates and frees megabytes; glibc maps and unmaps these anew every time, and the kernel clears every
    page: 4,241 page faults a picture at 256 px, half of the micro model's time (38 ms a picture, 21 ms without them).
    What the process holds stays at its peak, which it reaches again with the next picture anyway.

    Returns whether the C library understood: it is glibc on Linux.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(any(mallopt(what, size) for size in _LARGE) for what in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
