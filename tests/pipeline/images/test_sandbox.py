"""Images opened in a separate process: an image that ends the process is rejected."""

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
def decoder() -> Iterator[SandboxedDecoder]:
    with SandboxedDecoder(Limits()) as decoder:
        yield decoder


def expect_reject(decoder: SandboxedDecoder, data: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        decoder.open_pixels(data, decoder.limits)
    return caught.value


def test_pixels_equal_those_without_the_sandbox(decoder: SandboxedDecoder) -> None:
    for seed, kind in enumerate(("JPEG", "PNG", "WEBP")):
        data = encoded(smooth(seed, 30 + seed, 40), kind)
        assert np.array_equal(decoder.open_pixels(data, decoder.limits), open_pixels(data))


@pytest.mark.parametrize("reduction", [1, 2, 8])
def test_reduced_pixels_equal_those_without_the_sandbox(decoder: SandboxedDecoder, reduction: int) -> None:
    data = encoded(smooth(3, 60, 80))
    pixels = decoder.open_pixels(data, decoder.limits, reduction)
    assert np.array_equal(pixels, open_pixels(data, decoder.limits, reduction))
    assert pixels.shape == (-(-60 // reduction), 80 // reduction, 3)


def test_rejects_equal_those_without_the_sandbox(decoder: SandboxedDecoder) -> None:
    for data in (b"", b"no image", encoded(smooth(0))[:500]):
        with pytest.raises(Rejected) as expected:
            open_pixels(data)
        reject = expect_reject(decoder, data)
        assert (reject.stage, reject.reason, reject.detail) == (
            expected.value.stage,
            expected.value.reason,
            expected.value.detail,
        )


def test_an_image_that_ends_the_process_is_rejected_and_the_next_is_opened(decoder: SandboxedDecoder) -> None:
    good = encoded(smooth(1))
    decoder.open_pixels(good, decoder.limits)
    assert decoder.process is not None
    os.kill(decoder.process.pid, signal.SIGSTOP)
    os.kill(decoder.process.pid, signal.SIGKILL)
    reject = expect_reject(decoder, good)
    assert (reject.reason, reject.stage) == ("unsafe", "open")
    assert decoder.open_pixels(good, decoder.limits).shape == (96, 128, 3)


def test_an_image_that_takes_too_long_is_rejected() -> None:
    with SandboxedDecoder(Limits(seconds=2)) as decoder:
        good = encoded(smooth(1))
        decoder.open_pixels(good, decoder.limits)
        assert decoder.process is not None
        os.kill(decoder.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        reject = expect_reject(decoder, good)
        assert (reject.reason, time.monotonic() - start < 10) == ("unsafe", True)
        assert (
            reject.detail == "decoding the image ended its process, or took more than 2 s or 2147483648 bytes of memory"
        )


@pytest.mark.slow
def test_an_image_that_takes_too_much_memory_is_rejected() -> None:
    with SandboxedDecoder(Limits(memory=400 << 20)) as decoder:
        bomb = encoded(np.zeros((12000, 8000, 3), np.uint8), "PNG")  # 288 MB of pixels in a file of 300 kB
        assert expect_reject(decoder, bomb).reason == "unsafe"
        assert decoder.open_pixels(encoded(smooth(1)), decoder.limits).shape == (96, 128, 3)


def test_the_process_ends_with_the_decoder() -> None:
    with SandboxedDecoder(Limits()) as decoder:
        decoder.open_pixels(encoded(smooth(1)), decoder.limits)
        process = decoder.process
    assert process is not None
    assert process.poll() is not None
    assert sandbox.SandboxedDecoder(Limits()).process is None
