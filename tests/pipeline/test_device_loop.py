"""The thread of the device: units share batches, an error reaches its units only, and the device has no gaps."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pipeline.device_loop import DeviceLoop, UnitQueue
from pipeline.errors import OtherUnitError, Stopped
from pipeline.records import EncodedImage, PreparedImage

SQUARE, TALL = (8, 8), (16, 8)


def make_image(shard: str, position: int, bucket: tuple[int, int] = SQUARE) -> PreparedImage:
    return PreparedImage(
        shard=shard,
        position=position,
        key=str(position),
        columns={},
        pixels=torch.empty(*bucket, 3, dtype=torch.uint8, device="meta"),
        original_height=8,
        original_width=8,
        resized_height=8,
        resized_width=8,
        crop_top=0,
        crop_left=0,
        enlarged=False,
    )


@dataclass
class PacedEncoder:
    """A device that takes a fixed time per batch, and works on while the next batch is started.

    fails: returns an error for the batches that fail. fatal: whether all later batches fail as well.
    """

    batch_size: int = 4
    seconds: float = 0.0
    runs_ahead: bool = True
    fails: Callable[[Sequence[PreparedImage]], Exception | None] = lambda images: None
    batches: list[list[str]] = field(default_factory=list)
    free_at: float = 0.0
    fatal: bool = False

    def is_fatal(self, error: Exception) -> bool:
        return self.fatal

    def launch(self, images: Sequence[PreparedImage]) -> tuple[Sequence[PreparedImage], float]:
        if error := self.fails(images):
            raise error
        self.batches.append([f"{image.shard}{image.position}" for image in images])
        self.free_at = max(self.free_at, time.perf_counter()) + self.seconds
        return images, self.free_at

    def is_done(self, launched: Any) -> bool:
        return time.perf_counter() >= launched[1]

    def finish(self, launched: Any) -> Sequence[EncodedImage]:
        time.sleep(max(0.0, launched[1] - time.perf_counter()))
        return [EncodedImage(torch.tensor(image.position)) for image in launched[0]]


def encode_unit(loop: DeviceLoop, name: str, images: Iterator[PreparedImage] | Sequence[PreparedImage]) -> list[int]:
    """Send images through the loop as a unit does, and return what came back for each, in their order."""
    results: dict[int, int] = {}
    with loop.unit(name, threading.Event()) as queue:
        count = 0
        for image in images:
            queue.admit()
            put(queue, image, results)
            count += 1
        queue.end_reading()
        queue.wait(lambda: len(results) == count)
    return [results[position] for position in sorted(results)]


def put(queue: UnitQueue, image: PreparedImage, results: dict[int, int]) -> None:
    def on_encoded(encoded: EncodedImage) -> None:
        assert isinstance(encoded.latent, torch.Tensor)
        results[image.position] = int(encoded.latent)

    queue.put(image, on_encoded)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_every_unit_has_its_results_and_batches_are_shared(runs_ahead: bool) -> None:
    encoder = PacedEncoder(runs_ahead=runs_ahead, seconds=0.002)
    loop = DeviceLoop(encoder, max_units=4, max_in_flight=32, openers=1)
    sizes = {"a": 5, "b": 17, "c": 0, "d": 1, "e": 30}
    with ThreadPoolExecutor(len(sizes)) as pool:
        futures = {
            name: pool.submit(encode_unit, loop, name, [make_image(name, n) for n in range(size)])
            for name, size in sizes.items()
        }
        results = {name: future.result(10) for name, future in futures.items()}
    assert results == {name: list(range(size)) for name, size in sizes.items()}
    assert sum(map(len, encoder.batches)) == sum(sizes.values())
    assert any(len({name[0] for name in batch}) > 1 for batch in encoder.batches)
    assert loop.in_flight == loop.batcher.waiting == loop.batcher.opening == 0


def test_an_error_of_a_batch_reaches_the_units_of_its_images_only() -> None:
    def fails(images: Sequence[PreparedImage]) -> Exception | None:
        return ValueError("the device failed") if any(image.shard == "b" for image in images) else None

    loop = DeviceLoop(PacedEncoder(batch_size=2, fails=fails), max_units=4, max_in_flight=32, openers=1)
    with ThreadPoolExecutor(2) as pool:
        sound = pool.submit(encode_unit, loop, "a", [make_image("a", n, TALL) for n in range(6)])
        failed = pool.submit(encode_unit, loop, "b", [make_image("b", n, SQUARE) for n in range(6)])
        with pytest.raises(ValueError, match="the device failed"):
            failed.result(10)
        assert sound.result(10) == list(range(6))
    assert encode_unit(loop, "c", [make_image("c", 0)]) == [0], "the loop goes on"
    assert loop.in_flight == 0


def test_the_other_units_of_a_device_that_failed_are_not_at_fault() -> None:
    def fails(images: Sequence[PreparedImage]) -> Exception | None:
        return ValueError("CUDA error") if any(image.shard == "b" for image in images) else None

    loop = DeviceLoop(PacedEncoder(batch_size=2, fails=fails, fatal=True), max_units=4, max_in_flight=32, openers=1)
    with loop.unit("a", threading.Event()) as other, pytest.raises(ValueError, match="CUDA error"):
        other.admit()
        put(other, make_image("a", 0, TALL), {})
        encode_unit(loop, "b", [make_image("b", n, SQUARE) for n in range(6)])
    assert isinstance(other.error, OtherUnitError)
    with pytest.raises(OtherUnitError, match="images of another unit: CUDA error"):
        encode_unit(loop, "c", [make_image("c", 0)])
    assert loop.in_flight == 0


def test_an_error_of_a_unit_that_takes_its_results_reaches_this_unit() -> None:
    loop = DeviceLoop(PacedEncoder(batch_size=1), max_units=2, max_in_flight=8, openers=1)

    def fail(encoded: EncodedImage) -> None:
        raise MemoryError

    with pytest.raises(MemoryError), loop.unit("a", threading.Event()) as queue:
        queue.admit()
        queue.put(make_image("a", 0), fail)
        queue.wait(lambda: False)
    assert encode_unit(loop, "b", [make_image("b", 0)]) == [0]


def test_units_do_not_wait_for_a_thread_that_failed() -> None:
    class Broken(PacedEncoder):
        def is_done(self, launched: Any) -> bool:
            raise ZeroDivisionError

    loop = DeviceLoop(Broken(batch_size=1, seconds=0.1), max_units=2, max_in_flight=8, openers=1)
    loop_errors = []
    original, threading.excepthook = threading.excepthook, lambda args: loop_errors.append(args.exc_type)
    try:
        with pytest.raises(ZeroDivisionError):
            encode_unit(loop, "a", [make_image("a", n) for n in range(3)])
    finally:
        threading.excepthook = original
    assert loop_errors == [ZeroDivisionError]
    with pytest.raises(OtherUnitError, match="the device's thread failed"):
        encode_unit(loop, "b", [make_image("b", 0)])


def test_the_thread_ends_with_the_last_unit() -> None:
    loop = DeviceLoop(PacedEncoder(), max_units=2, max_in_flight=8, openers=1)
    for _ in range(2):
        assert encode_unit(loop, "a", [make_image("a", 0)]) == [0]
        thread = loop._thread
        if thread is not None:
            thread.join(10)
        assert loop._thread is None


def test_few_samples_wait_for_an_opener() -> None:
    """They hold the bytes of their files."""
    loop = DeviceLoop(PacedEncoder(), max_units=1, max_in_flight=100, openers=2)
    most = 0
    with ThreadPoolExecutor(2) as pool, loop.unit("a", threading.Event()) as queue:

        def open_slowly(position: int) -> None:
            time.sleep(0.01)
            queue.put(make_image("a", position), lambda encoded: None)

        for position in range(30):
            queue.admit()
            most = max(most, loop.batcher.opening)
            pool.submit(open_slowly, position)
        queue.end_reading()
        queue.wait(lambda: queue.in_flight == 0)
    assert most == 4


def test_the_samples_between_reader_and_device_are_bounded() -> None:
    encoder = PacedEncoder(batch_size=4, seconds=0.05)
    loop = DeviceLoop(encoder, max_units=1, max_in_flight=8, openers=1)
    most = 0

    def images() -> Iterator[PreparedImage]:
        nonlocal most
        for position in range(40):
            most = max(most, loop.in_flight)
            yield make_image("a", position, SQUARE if position % 3 else TALL)

    assert encode_unit(loop, "a", images()) == list(range(40))
    assert 6 < most <= 8


def test_further_units_wait_for_a_place_until_the_last_batch_of_another_is_launched() -> None:
    encoder = PacedEncoder(batch_size=4, seconds=0.01)
    loop = DeviceLoop(encoder, max_units=1, max_in_flight=8, openers=1)
    first_may_end = threading.Event()

    def hold() -> list[int]:
        results: dict[int, int] = {}
        with loop.unit("a", threading.Event()) as queue:
            queue.admit()
            put(queue, make_image("a", 0), results)
            queue.end_reading()
            assert first_may_end.wait(10), "it is written meanwhile"
        return list(results.values())

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(hold)
        assert pool.submit(encode_unit, loop, "b", [make_image("b", 0)]).result(10) == [0]
        first_may_end.set()
        assert first.result(10) == [0]


def test_a_unit_that_waits_stops_with_the_job() -> None:
    loop = DeviceLoop(PacedEncoder(), max_units=1, max_in_flight=2, openers=1)
    stop = threading.Event()
    with pytest.raises(Stopped), loop.unit("a", stop) as queue:
        for position in range(2):
            queue.admit()
            put(queue, make_image("a", position), {})
        threading.Timer(0.1, stop.set).start()
        queue.wait(lambda: False)
    assert loop.in_flight == 0


def test_images_that_are_being_opened_are_waited_for_when_a_unit_fails() -> None:
    """The caller may close what they are opened with."""
    loop = DeviceLoop(PacedEncoder(), max_units=1, max_in_flight=8, openers=1)
    opened = list[int]()

    def open_slowly(queue: UnitQueue) -> None:
        time.sleep(0.2)
        opened.append(1)
        queue.put(make_image("a", 0), lambda encoded: None)

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError), loop.unit("a", threading.Event()) as queue:
        queue.admit()
        pool.submit(open_slowly, queue)
        raise KeyError
    assert opened == [1]
    assert loop.in_flight == loop.batcher.opening == loop.batcher.waiting == 0


def test_a_part_is_completed_while_its_unit_waits_for_it() -> None:
    """Its images are in partial batches, and the unit has more samples."""
    loop = DeviceLoop(PacedEncoder(batch_size=4), max_units=2, max_in_flight=32, openers=1)
    results: dict[int, int] = {}
    with loop.unit("a", threading.Event()) as queue:
        for position in range(3):
            queue.admit()
            put(queue, make_image("a", position), results)
        with queue.paused():
            queue.wait(lambda: len(results) == 3)
        queue.admit()
        put(queue, make_image("a", 3), results)
        queue.end_reading()
        queue.wait(lambda: len(results) == 4)


class ChainedEncoder(PacedEncoder):
    """A batch runs until the next one is launched. The last batch ends by itself."""

    def __init__(self, batch_size: int, total: int) -> None:
        super().__init__(batch_size)
        self.total = total

    def launch(self, images: Sequence[PreparedImage]) -> tuple[Sequence[PreparedImage], float]:
        images, _ = super().launch(images)
        return images, len(self.batches)

    def is_done(self, launched: Any) -> bool:
        return len(self.batches) > launched[1] or sum(map(len, self.batches)) == self.total

    def finish(self, launched: Any) -> Sequence[EncodedImage]:
        assert self.is_done(launched), "the loop waited for this batch before it launched the next one"
        return super().finish((launched[0], 0.0))


def test_the_device_has_no_gaps_between_batches() -> None:
    encoder = ChainedEncoder(batch_size=8, total=400)
    loop = DeviceLoop(encoder, max_units=2, max_in_flight=64, openers=1)
    with ThreadPoolExecutor(2) as pool:
        units = [pool.submit(encode_unit, loop, name, [make_image(name, n) for n in range(200)]) for name in "ab"]
        assert [len(unit.result(60)) for unit in units] == [200, 200]
    assert len(encoder.batches) == 50
