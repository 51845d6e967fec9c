"""Images opened on other machines: which images are sent there, and that none is lost with a remote opener."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest
import torch

from pipeline.errors import FilteredOut, Rejected
from pipeline.images.prepare import OpenedImage, make_opener
from pipeline.images.remote_openers import ImageFile, LocalAndRemoteOpeners, Result, count_block_images
from pipeline.images.transform import Transform
from pipeline.limits import DEFAULT_LIMITS
from tests.conftest import encoded, smooth

TRANSFORM = Transform(resolution=64, min_size=20)
open_here = make_opener(TRANSFORM, DEFAULT_LIMITS)
GOOD, SMALL, BROKEN = encoded(smooth(1)), encoded(smooth(2, 19, 30)), b"no image"


@dataclass
class FakeOpener:
    """A remote opener that the test controls. blocks: those that arrived, with the futures of their answers."""

    ready: threading.Event = field(default_factory=threading.Event)
    blocks: "SimpleQueue[tuple[Sequence[ImageFile], Future[Sequence[Result]]]]" = field(default_factory=SimpleQueue)

    def wait_until_ready(self) -> None:
        self.ready.wait()

    def open_images(self, block: Sequence[ImageFile]) -> Sequence[Result]:
        answer = Future[Sequence[Result]]()
        self.blocks.put((block, answer))
        return answer.result(30)


def open_files(block: Sequence[ImageFile]) -> list[Result]:
    """Open a block as an actor does."""
    results: list[Result] = []
    for file in block:
        try:
            results.append(open_here(*file))
        except (FilteredOut, Rejected) as error:
            results.append(error)
    return results


class BusyLocal:
    """A local opener that is busy until `go_on` is set."""

    def __init__(self) -> None:
        self.go_on, self.opened = threading.Event(), list[str]()

    def open_image(self, data: bytes, shard: str, key: str) -> OpenedImage:
        assert self.go_on.wait(30)
        self.opened.append(key)
        return open_here(data, shard, key)


@pytest.fixture
def local() -> BusyLocal:
    return BusyLocal()


@pytest.fixture
def remote() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
def openers(local: BusyLocal, remote: FakeOpener) -> LocalAndRemoteOpeners:
    return LocalAndRemoteOpeners(local.open_image, 1, [remote], TRANSFORM, DEFAULT_LIMITS)


def wait_for(openers: LocalAndRemoteOpeners, calls: int) -> None:
    """Wait until this many calls take images."""
    tick = threading.Event()
    for _ in range(1000):
        if openers._ready == calls:
            return
        tick.wait(0.01)
    pytest.fail(f"{openers._ready} calls are ready, not {calls}")


def test_images_go_to_remote_openers_if_the_local_ones_are_busy(
    openers: LocalAndRemoteOpeners, local: BusyLocal, remote: FakeOpener
) -> None:
    remote.ready.set()
    wait_for(openers, 2)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(openers.open_image, GOOD, "s", "local")
        while openers._local_places._value:  # until it has the local opener
            pass
        rest = [pool.submit(openers.open_image, data, "s", "remote") for data in (GOOD, SMALL, BROKEN)]
        opened = 0
        while opened < 3:
            block, answer = remote.blocks.get(timeout=30)
            answer.set_result(open_files(block))
            opened += len(block)
        good = rest[0].result(30)
        with pytest.raises(FilteredOut, match="min_size"):
            rest[1].result(30)
        with pytest.raises(Rejected, match="not_an_image"):
            rest[2].result(30)
        local.go_on.set()
        assert first.result(30) is not None
    expected = open_here(GOOD, "s", "remote")
    assert torch.equal(good.pixels, expected.pixels)
    assert local.opened == ["local"]


def test_images_wait_for_the_local_opener_while_no_remote_one_is_ready(
    openers: LocalAndRemoteOpeners, local: BusyLocal
) -> None:
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(openers.open_image, GOOD, "s", str(number)) for number in range(3)]
        local.go_on.set()
        assert all(future.result(30) is not None for future in futures)
    assert sorted(local.opened) == ["0", "1", "2"]


@pytest.mark.slow
def test_the_images_of_a_lost_opener_are_opened_here(
    openers: LocalAndRemoteOpeners, local: BusyLocal, remote: FakeOpener
) -> None:
    """Those of its blocks, and those that would have been sent next. Then its replacement takes others."""
    openers.block_images = 1
    remote.ready.set()
    wait_for(openers, 2)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(openers.open_image, GOOD, "s", "local")
        while openers._local_places._value:
            pass
        futures = [pool.submit(openers.open_image, GOOD, "s", str(number)) for number in range(6)]
        blocks = [remote.blocks.get(timeout=30) for _ in range(2)]
        remote.ready.clear()
        for _, answer in blocks:
            answer.set_exception(ConnectionError("the node died"))
        assert all(future.result(60) is not None for future in futures), "also those that waited in the queue"
        wait_for(openers, 0)
        remote.ready.set()
        wait_for(openers, 2)
        later = pool.submit(openers.open_image, GOOD, "s", "later")
        block, answer = remote.blocks.get(timeout=30)
        answer.set_result(open_files(block))
        assert later.result(30) is not None
        local.go_on.set()
        assert first.result(30) is not None


def test_a_fault_of_a_remote_opener_is_raised(
    openers: LocalAndRemoteOpeners, local: BusyLocal, remote: FakeOpener
) -> None:
    remote.ready.set()
    wait_for(openers, 2)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(openers.open_image, GOOD, "s", "local")
        while openers._local_places._value:
            pass
        future = pool.submit(openers.open_image, GOOD, "s", "key")
        _, answer = remote.blocks.get(timeout=30)
        answer.set_exception(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            future.result(30)
        wait_for(openers, 2)
        local.go_on.set()


def test_blocks_are_bounded_in_bytes() -> None:
    assert [count_block_images(Transform(resolution=side)) for side in (256, 512, 1024, 4096)] == [16, 16, 5, 1]
