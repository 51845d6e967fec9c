"""The thread that owns the device, and the queues that connect units to it.

    unit's thread: read --> threads of the pool: open --> Batcher --> device's thread: encode --> unit's part

The device's thread starts the next batch while the last one still runs, if the encoder allows it. It passes each latent
to the unit that the image is from. So units share batches, and none waits for another.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.batching import Batcher
from pipeline.errors import OtherUnitError, Stopped
from pipeline.records import EncodedImage, PreparedImage

POLL = 0.002  # seconds between two looks at a running batch while no other batch is ready
STOP_POLL = 0.2  # seconds between two looks at `stop` while a unit waits


class BatchEncoder(Protocol):
    """A model on a device. One thread uses it."""

    @property
    def batch_size(self) -> int:
        """Images per batch. It can become smaller, if memory does not suffice."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the batch is done, so that the next one can be started meanwhile."""
        ...

    def is_fatal(self, error: Exception) -> bool:
        """Whether the device fails for every later batch as well."""
        ...

    def launch(self, images: Sequence[PreparedImage]) -> Any:
        """Start to encode a batch. images: up to `batch_size`, of one bucket."""
        ...

    def is_done(self, launched: Any) -> bool:
        """Whether a batch that was started is done, so that `finish` does not wait."""
        ...

    def finish(self, launched: Any) -> Sequence[EncodedImage]:
        """Wait for a batch that was started, and return its latents in the order of its images."""
        ...


@dataclass(slots=True)
class DeviceTime:
    """How a device spent its time, in seconds. A unit has its share.

    encode: the model ran. The device had no batch because all openers were busy (`idle_opening`), because samples were
    still to be read (`idle_reading`), or because units were only being written (`idle_writing`).
    """

    encode: float = 0.0
    idle_opening: float = 0.0
    idle_reading: float = 0.0
    idle_writing: float = 0.0

    def add(self, other: "DeviceTime", share: float = 1.0) -> None:
        """Add a share of another time."""
        self.encode += share * other.encode
        self.idle_opening += share * other.idle_opening
        self.idle_reading += share * other.idle_reading
        self.idle_writing += share * other.idle_writing


@dataclass(slots=True, eq=False)
class _QueuedImage:
    unit: "UnitQueue"
    image: PreparedImage
    on_encoded: Callable[[EncodedImage], None]


@dataclass(slots=True)
class _RunningBatch:
    queued: Sequence[_QueuedImage]
    launched: Any
    started: float


class UnitQueue:
    """The images of one unit on their way to the device. Its methods raise the unit's error, once it has one."""

    def __init__(self, loop: "DeviceLoop", name: str, stop: threading.Event) -> None:
        self.loop, self.name, self.stop = loop, name, stop
        self.seconds = DeviceTime()
        self.error: BaseException | None = None
        self.in_flight = 0  # samples that are being opened, and images that wait or are on the device

    def admit(self) -> None:
        """Wait until there is room for another sample. `put` or `drop` must follow."""
        loop = self.loop
        with loop.lock:
            self._wait(loop.has_room, loop.may_read)
            loop.in_flight += 1
            self.in_flight += 1
            loop.batcher.start_opening(self.name)

    def put(self, image: PreparedImage, on_encoded: Callable[[EncodedImage], None]) -> None:
        """Add the image of an admitted sample. on_encoded: called in the device's thread with the result."""
        with self.loop.lock:
            self.loop.batcher.add(self.name, image.bucket, _QueuedImage(self, image, on_encoded))
            if self.error is not None:
                self.loop.release(self, 1)
            self.loop.has_room.notify()  # for the next sample to be opened
            self.loop.has_work.notify()

    def drop(self) -> None:
        """Record that an admitted sample has no image to encode."""
        with self.loop.lock:
            self.loop.batcher.drop(self.name)
            self.loop.release(self, 1)
            self.loop.update_places()
            self.loop.has_work.notify()

    def end_reading(self) -> None:
        """Record that the unit has no more samples."""
        with self.loop.lock:
            self.loop.batcher.end_reading(self.name)
            self.loop.update_places()
            self.loop.has_work.notify()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true that depends on the results of this unit."""
        with self.loop.lock:
            self._wait(self.loop.has_results, condition)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Read no samples within the block. The images that wait need not wait for others to fill their batches."""
        with self.loop.lock:
            self.loop.batcher.pause(self.name)
            self.loop.has_work.notify()
        try:
            yield
        finally:
            with self.loop.lock:
                self.loop.batcher.resume(self.name)

    def fail(self, error: BaseException) -> None:
        """Let the unit's thread raise an error, and forget its images. The first error counts."""
        with self.loop.lock:
            if self.error is None:
                self.error = error
                self.loop.discard(self)

    def _wait(self, changed: threading.Condition, condition: Callable[[], bool]) -> None:
        while True:
            if self.error is not None:
                raise self.error
            if self.stop.is_set():
                raise Stopped
            if condition():
                return
            changed.wait(STOP_POLL)


class DeviceLoop:
    """Runs batches of all units in flight on one device, in a thread of its own.

    max_units: units that are read at the same time. max_in_flight: samples between the readers and the device.
    openers: threads that open images. busy_seconds: for which the model ran so far.
    """

    def __init__(self, encoder: BatchEncoder, max_units: int, max_in_flight: int, openers: int) -> None:
        self.encoder = encoder
        self.max_units, self.max_in_flight, self.openers = max_units, max_in_flight, openers
        self.batcher = Batcher[_QueuedImage](encoder.batch_size)
        self.in_flight = 0
        self.busy_seconds = 0.0
        self.lock = threading.Lock()
        self.has_work = threading.Condition(self.lock)
        self.has_room = threading.Condition(self.lock)
        self.has_place = threading.Condition(self.lock)
        self.has_results = threading.Condition(self.lock)
        self._waiting_units = 0
        self._open_queues: set[UnitQueue] = set()
        self._fatal: OtherUnitError | None = None
        self._idle = DeviceTime()
        self._thread: threading.Thread | None = None  # it runs while there are units

    @contextmanager
    def unit(self, name: str, stop: threading.Event) -> Iterator[UnitQueue]:
        """Wait for a place among the units that are read, and return the unit's queue.

        The unit leaves its place as soon as its last image is on the device. At the end of the block, no image of it is
        being opened or encoded. Raises Stopped once `stop` is set.
        """
        queue = UnitQueue(self, name, stop)
        with self.lock:
            if self._fatal is not None:
                raise self._fatal
            self._waiting_units += 1
            self.has_work.notify()
            try:
                queue._wait(self.has_place, lambda: self.batcher.units < self.max_units)
            finally:
                self._waiting_units -= 1
            self._open_queues.add(queue)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="device", daemon=True)
                self._thread.start()
            self.batcher.start_unit(name)
        try:
            yield queue
        finally:
            queue.fail(Stopped())  # threads that still wait for results
            with self.lock:
                while queue.in_flight:
                    self.has_results.wait()
                self._open_queues.discard(queue)
                self.has_work.notify()

    def may_read(self) -> bool:
        """Whether another sample may be read. Few wait for an opener, because they hold the bytes of their files."""
        return self.in_flight < self.max_in_flight and self.batcher.opening < 2 * self.openers

    def discard(self, queue: UnitQueue) -> None:
        """Forget the images of a unit that wait. The caller holds the lock."""
        self.release(queue, self.batcher.discard(queue.name))
        self.has_place.notify()

    def release(self, queue: UnitQueue, samples: int) -> None:
        """Record that samples of a unit left: encoded, dropped or forgotten. The caller holds the lock."""
        queue.in_flight -= samples
        self.in_flight -= samples
        self.has_room.notify(samples)
        self.has_results.notify_all()

    def update_places(self) -> None:
        """Free the places of units whose last image has left the queues. The caller holds the lock."""
        self.has_place.notify(len(self.batcher.pop_finished()))

    def _run(self) -> None:
        running: _RunningBatch | None = None
        try:
            while running is not None or self._has_units():
                running = self._step(running)
        except BaseException as error:  # a fault of this program; without this, the units would wait forever
            with self.lock:
                self._thread, units = None, list(self._open_queues)
                self._fatal = OtherUnitError(f"the device's thread failed: {error!r}")
                for unit in units:
                    unit.in_flight = 0
            for unit in units:
                unit.fail(error)
            raise

    def _has_units(self) -> bool:
        """Return whether there are units. If there are none, the thread ends, and the next unit starts another one."""
        with self.lock:
            if not self._open_queues:
                self._thread = None
            return bool(self._open_queues)

    def _step(self, running: _RunningBatch | None) -> _RunningBatch | None:
        """Start the next batch, then finish the one that runs. Returns the batch that runs now."""
        batch = self._wait_for_batch(running)
        launched = self._launch(batch) if batch else None
        if running is not None:
            self._finish(running, launched)
        if launched is not None and not self.encoder.runs_ahead:
            self._finish(launched, None)
            return None
        return launched

    def _wait_for_batch(self, running: _RunningBatch | None) -> Sequence[_QueuedImage]:
        """Return the next batch. It is empty if none is ready before the running one is done, or without units."""
        with self.lock:
            while True:
                self.batcher.batch_size = self.encoder.batch_size
                units_wait = self._waiting_units > 0 and self.batcher.units >= self.max_units
                if batch := self.batcher.next_batch(units_wait, is_full=not self.may_read()):
                    self.update_places()
                    return batch
                if running is not None and self.encoder.is_done(running.launched):
                    return []
                if running is None and not self._open_queues:
                    return []
                start = time.perf_counter()
                self.has_work.wait(POLL if running is not None else None)
                if running is None:
                    self._note_idle(time.perf_counter() - start)

    def _note_idle(self, seconds: float) -> None:
        """Record for how long the device had no batch, and the stage that it waited for."""
        if self.batcher.opening >= self.openers:
            self._idle.idle_opening += seconds
        elif self.batcher.units:
            self._idle.idle_reading += seconds
        elif self._open_queues:
            self._idle.idle_writing += seconds

    def _launch(self, batch: Sequence[_QueuedImage]) -> _RunningBatch | None:
        started = time.perf_counter()
        try:
            return _RunningBatch(batch, self.encoder.launch([queued.image for queued in batch]), started)
        except Exception as error:  # it is raised in the threads of the units
            self._fail(batch, error)
            return None

    def _finish(self, running: _RunningBatch, launched: _RunningBatch | None) -> None:
        """Wait for a batch, and pass its latents to their units. launched: the batch that follows it on the device."""
        try:
            results = self.encoder.finish(running.launched)
        except Exception as error:
            self._fail(running.queued, error)
            return
        now = time.perf_counter()
        spent, self._idle = self._idle, DeviceTime()
        spent.encode = now - running.started
        self.busy_seconds += spent.encode
        if launched is not None:
            launched.started = now
        for queued, result in zip(running.queued, results, strict=True):
            if queued.unit.error is None:
                try:
                    queued.on_encoded(result)
                except Exception as error:
                    queued.unit.fail(error)
        with self.lock:
            for queued in running.queued:
                queued.unit.seconds.add(spent, 1 / len(running.queued))
                self.release(queued.unit, 1)

    def _fail(self, batch: Sequence[_QueuedImage], error: Exception) -> None:
        """Fail the units of a batch. If the device fails for good, the others end as well, but are not at fault."""
        units = {queued.unit for queued in batch}
        for unit in units:
            unit.fail(error)
        with self.lock:
            for queued in batch:
                self.release(queued.unit, 1)
            if self.encoder.is_fatal(error):
                self._fatal = OtherUnitError(f"the device failed while it encoded images of another unit: {error}")
            others = self._open_queues - units if self._fatal is not None else set()
        for unit in others:
            unit.fail(self._fatal or error)
