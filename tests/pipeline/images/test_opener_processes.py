"""Images opened in several processes: the same results as in threads, and a crash costs its image only."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch

from pipeline.errors import FilteredOut, Rejected
from pipeline.images import opener_processes
from pipeline.images.buckets import make_grid
from pipeline.images.fit import Fit
from pipeline.images.opener_processes import OpenerProcesses
from pipeline.images.prepare import OpenedImage, make_opener
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from tests.conftest import encoded, smooth

LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyTransform(Transform):
    """A transform with a fault for some keys, in the openers only. worker: the process id of the worker."""

    worker: int = 0

    def fit(self, height: int, width: int, shard: str = "", key: str = "") -> Fit:
        if os.getpid() != self.worker:
            if key == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if key == "hang":
                time.sleep(600)
            if key == "no memory":
                raise MemoryError
        return Transform.fit(self, height, width, shard, key)


TRANSFORM = FaultyTransform(
    resolution=64, buckets=make_grid(64, 16), min_size=20, crop="random", flip="random", worker=os.getpid()
)


@pytest.fixture(scope="module")
def openers() -> Iterator[OpenerProcesses]:
    yield OpenerProcesses(2, TRANSFORM, LIMITS)


def opens_as_expected(openers: OpenerProcesses, key: str = "key") -> bool:
    """Return whether the image is opened as in a thread."""
    data = encoded(smooth(1))
    actual, expected = (opener(data, "s", key) for opener in (openers.open_image, make_opener(TRANSFORM, LIMITS)))
    assert actual is not None
    assert expected is not None
    return torch.equal(actual.pixels, expected.pixels) and actual.fit == expected.fit


def test_images_are_opened_as_in_threads(openers: OpenerProcesses) -> None:
    images = [
        encoded(smooth(seed, 40 + 3 * seed, 90 - 3 * seed), kind)
        for seed, kind in enumerate(["JPEG", "PNG", "WEBP"] * 4)
    ]
    open_here = make_opener(TRANSFORM, LIMITS)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda n: openers.open_image(images[n], "s", str(n)), range(len(images))))
    for number, actual in enumerate(opened):
        expected = open_here(images[number], "s", str(number))
        assert isinstance(actual, OpenedImage)
        assert isinstance(expected, OpenedImage)
        assert torch.equal(actual.pixels, expected.pixels)
        assert (actual.original_height, actual.original_width, actual.fit) == (
            expected.original_height,
            expected.original_width,
            expected.fit,
        )


def test_a_small_image_is_filtered(openers: OpenerProcesses) -> None:
    with pytest.raises(FilteredOut, match="min_size"):
        openers.open_image(encoded(smooth(1, 19, 30)), "s", "key")


@pytest.mark.parametrize("data", [b"", b"no image", encoded(smooth(0))[:500]])
def test_rejects_equal_those_of_threads(openers: OpenerProcesses, data: bytes) -> None:
    details = []
    for opener in (openers.open_image, make_opener(TRANSFORM, LIMITS)):
        with pytest.raises(Rejected) as caught:
            opener(data, "s", "key")
        details.append((caught.value.stage, caught.value.reason, caught.value.detail))
    assert details[0] == details[1]


def test_an_error_of_an_opener_is_raised_in_the_worker(openers: OpenerProcesses) -> None:
    with pytest.raises(MemoryError):
        openers.open_image(encoded(smooth(1)), "s", "no memory")
    assert opens_as_expected(openers)


def test_an_opener_that_was_killed_is_replaced(openers: OpenerProcesses) -> None:
    for _ in range(2):  # the second one has been started meanwhile
        assert opens_as_expected(openers)
        for pid in openers.list_pids():
            with suppress(ProcessLookupError):  # it was killed before, and has not been used since
                os.kill(pid, signal.SIGKILL)
        assert opens_as_expected(openers)
        assert opens_as_expected(openers)


def test_an_image_that_crashes_its_opener_is_opened_in_the_sandbox(openers: OpenerProcesses) -> None:
    assert opens_as_expected(openers, "crash")
    assert opens_as_expected(openers)


def test_an_image_that_also_ends_the_sandbox_is_rejected(
    openers: OpenerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openers, "limits", Limits(seconds=0))  # the sandbox is never fast enough
    with pytest.raises(Rejected, match="unsafe"):
        openers.open_image(encoded(smooth(1)), "s", "crash")
    assert opens_as_expected(openers)


@pytest.mark.slow
def test_an_image_that_takes_too_long_is_opened_in_the_sandbox() -> None:
    openers = OpenerProcesses(1, TRANSFORM, Limits(seconds=1))
    assert opens_as_expected(openers)
    openers.limits = LIMITS  # of the sandbox, which is slower on a busy machine
    (pid,) = openers.list_pids()
    assert opens_as_expected(openers, "hang")
    with suppress(OSError):
        os.kill(pid, 0)
        pytest.fail("the opener should have been ended")


@pytest.mark.slow
def test_the_openers_end_with_the_worker_and_a_dead_server_is_replaced() -> None:
    openers = OpenerProcesses(1, TRANSFORM, LIMITS)
    assert opens_as_expected(openers)
    server = openers._server
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    (pid,) = openers.list_pids()
    os.kill(pid, signal.SIGKILL)
    assert opens_as_expected(openers)
    assert opens_as_expected(openers), "another server has started another opener"
    (pid,), process = openers.list_pids(), server.process
    del openers, server
    gc.collect()
    assert process.poll() is not None
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the opener is still running")


def test_a_file_larger_than_the_shared_memory_is_opened_here(
    openers: OpenerProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(smooth(1)) + bytes(opener_processes.MEMORY_BYTES)
    opened = openers.open_image(data, "s", "crash")  # in an opener it would crash, and then be opened in the sandbox
    assert opened is not None
    assert opened.original_height == 96
