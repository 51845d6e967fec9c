"""Images opened by a process of its own: what ends it is rejected by name."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.errors import Rejected
from pipeline.images import sandbox
from pipeline.images.decode import open_pixels
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.limits import Limits
from tests.conftest import encoded, smooth


@pytest.fixture
def opener() -> Iterator[SandboxedDecoder]:
    with SandboxedDecoder(Limits()) as opener:
        yield opener


def rejected(opener: SandboxedDecoder, data: bytes) -> Rejected:
    with pytest.raises(Rejected) as why:
        opener.open_pixels(data, opener.limits)
    return why.value


def test_images_are_the_same(opener: SandboxedDecoder) -> None:
    for seed, kind in enumerate(("JPEG", "PNG", "WEBP")):
        data = encoded(smooth(seed, 30 + seed, 40), kind)
        assert np.array_equal(opener.open_pixels(data, opener.limits), open_pixels(data))


def test_so_are_rejects(opener: SandboxedDecoder) -> None:
    for data in (b"", b"no image", encoded(smooth(0))[:500]):
        with pytest.raises(Rejected) as expected:
            open_pixels(data)
        why = rejected(opener, data)
        assert (why.stage, why.reason, why.detail) == (
            expected.value.stage,
            expected.value.reason,
            expected.value.detail,
        )


def test_an_image_that_ends_the_process_is_rejected_and_the_next_one_opened(opener: SandboxedDecoder) -> None:
    good = encoded(smooth(1))
    opener.open_pixels(good, opener.limits)
    assert opener.process is not None
    os.kill(opener.process.pid, signal.SIGSTOP)
    os.kill(opener.process.pid, signal.SIGKILL)
    why = rejected(opener, good)
    assert (why.reason, why.stage) == ("unsafe", "open")
    assert opener.open_pixels(good, opener.limits).shape == (96, 128, 3)


def test_an_image_that_takes_too_long_is_rejected() -> None:
    with SandboxedDecoder(Limits(seconds=2)) as opener:
        good = encoded(smooth(1))
        opener.open_pixels(good, opener.limits)
        assert opener.process is not None
        os.kill(opener.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        why = rejected(opener, good)
        assert (why.reason, time.monotonic() - start < 10) == ("unsafe", True)
        assert why.detail == "decoding the image ended its process, or took more than 2 s or 2147483648 bytes of memory"


def test_an_image_that_takes_too_much_memory_is_rejected() -> None:
    with SandboxedDecoder(Limits(memory=400 << 20)) as opener:
        bomb = encoded(np.zeros((12000, 8000, 3), np.uint8), "PNG")  # 288 MB once open, 300 kB before
        assert rejected(opener, bomb).reason == "unsafe"
        assert opener.open_pixels(encoded(smooth(1)), opener.limits).shape == (96, 128, 3)


def test_the_process_ends_with_its_owner() -> None:
    with SandboxedDecoder(Limits()) as opener:
        opener.open_pixels(encoded(smooth(1)), opener.limits)
        process = opener.process
    assert process is not None
    assert process.poll() is not None
    assert sandbox.SandboxedDecoder(Limits()).process is None
