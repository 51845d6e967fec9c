"""Choose the next batch: images of all units in flight wait in queues, one per bucket.

    read -> open -> [queue of the bucket] -> batch of one static shape -> device

A full batch runs at once. A partial batch is padded to the static shape, which wastes the device's time, so it runs
only if its images would otherwise hold up a unit. A unit is *drained* if all its samples were read and opened, and some
of its images still wait in partial batches.

The idea to fill batches from all requests in flight is from the schedulers of language model servers ("continuous
batching": Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models"). Their batches
change between the steps of a request. Here, an image takes one step, and the shape is static, so that results do not
depend on the batch.
"""

from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
MIN_READING = 2  # units that should have unread samples, so that full batches come from them


@dataclass(slots=True)
class _UnitState:
    """The images of a unit.

    opening: read, but not opened yet. waiting: in the queues, by bucket.
    is_read: it has no more samples. is_paused: its samples are not read until its waiting images are encoded.
    """

    is_read: bool = False
    is_paused: bool = False
    opening: int = 0
    waiting: Counter[Hashable] = field(default_factory=Counter)

    @property
    def is_drained(self) -> bool:
        return (self.is_read or self.is_paused) and not self.opening and bool(self.waiting)

    @property
    def is_finished(self) -> bool:
        return self.is_read and not self.opening and not self.waiting


class Batcher(Generic[Item]):
    """The queues, and the rule that chooses the next batch. Only one thread may use it at a time.

    batch_size: images per batch. A caller may change it.
    waiting: the number of images in the queues. opening: the number of samples that were read, but are not opened yet.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.waiting = 0
        self.opening = 0
        self._units: dict[str, _UnitState] = {}
        self._queues: dict[Hashable, deque[tuple[int, str, Item]]] = {}
        self._added = 0

    @property
    def units(self) -> int:
        """The number of units with samples that are unread, unopened or waiting."""
        return len(self._units)

    @property
    def reading(self) -> int:
        """The number of units with unread samples."""
        return sum(not (unit.is_read or unit.is_paused) for unit in self._units.values())

    def start_unit(self, unit: str) -> None:
        """Add a unit. Its samples follow."""
        self._units[unit] = _UnitState()

    def end_reading(self, unit: str) -> None:
        """Record that all samples of a unit were read."""
        if unit in self._units:
            self._units[unit].is_read = True

    def pause(self, unit: str) -> None:
        """Record that no samples of a unit are read until its waiting images are encoded."""
        if unit in self._units:
            self._units[unit].is_paused = True

    def resume(self, unit: str) -> None:
        """Record that samples of a unit are read again."""
        if unit in self._units:
            self._units[unit].is_paused = False

    def start_opening(self, unit: str) -> None:
        """Record that a sample was read. `add` or `drop` follows once it is opened."""
        self.opening += 1
        if unit in self._units:
            self._units[unit].opening += 1

    def drop(self, unit: str) -> None:
        """Record that a sample was opened, and has no image to encode."""
        self.opening -= 1
        if unit in self._units:
            self._units[unit].opening -= 1

    def add(self, unit: str, bucket: Hashable, item: Item) -> None:
        """Add the image of a sample that was opened to the queue of its bucket."""
        self.drop(unit)
        if unit in self._units:
            self._units[unit].waiting[bucket] += 1
            self._queues.setdefault(bucket, deque()).append((self._added, unit, item))
            self._added += 1
            self.waiting += 1

    def discard(self, unit: str) -> int:
        """Remove a unit. Returns the number of its images that waited."""
        state = self._units.pop(unit, _UnitState())
        for bucket in state.waiting:
            kept = [entry for entry in self._queues[bucket] if entry[1] != unit]
            self._set_queue(bucket, deque(kept))
        self.waiting -= state.waiting.total()
        return state.waiting.total()

    def pop_finished(self) -> list[str]:
        """Remove and return the units of which no sample is unread, unopened or waiting."""
        finished = [name for name, unit in self._units.items() if unit.is_finished]
        for name in finished:
            del self._units[name]
        return finished

    def next_batch(self, units_wait: bool = False, is_full: bool = False) -> list[Item]:
        """Remove and return the images of the next batch: up to `batch_size`, of one bucket. Empty: wait for more.

        units_wait: further units wait until one of these is finished. is_full: nothing is read until a batch runs.

        1. If too few units have unread samples, further units wait, and a unit is drained: a batch of a drained unit.
        2. The full batch whose first image has waited longest.
        3. If a unit is drained: a batch of it. The device would be idle otherwise, so padding costs little.
        4. If no more samples are read, and none is being opened: the largest batch.
        """
        drained = [unit for unit in self._units.values() if unit.is_drained]
        if drained and units_wait and self.reading < MIN_READING:
            return self._pop(self._choose_bucket_to_flush(drained))
        full = [bucket for bucket, queue in self._queues.items() if len(queue) >= self.batch_size]
        if full:
            return self._pop(min(full, key=lambda bucket: self._queues[bucket][0][0]))
        if drained:
            return self._pop(self._choose_bucket_to_flush(drained))
        if self._queues and is_full and not self.opening:
            return self._pop(max(self._queues, key=lambda bucket: len(self._queues[bucket])))
        return []

    def _choose_bucket_to_flush(self, drained: Iterable[_UnitState]) -> Hashable:
        """Return the fullest bucket of the drained unit whose remaining images cost the fewest padded slots."""
        unit = min(drained, key=lambda unit: sum(self._padding(bucket) for bucket in unit.waiting))
        return max(unit.waiting, key=lambda bucket: len(self._queues[bucket]))

    def _padding(self, bucket: Hashable) -> int:
        return max(0, self.batch_size - len(self._queues[bucket]))

    def _pop(self, bucket: Hashable) -> list[Item]:
        queue = self._queues[bucket]
        batch = [queue.popleft() for _ in range(min(self.batch_size, len(queue)))]
        self._set_queue(bucket, queue)
        self.waiting -= len(batch)
        for _, unit, _ in batch:
            waiting = self._units[unit].waiting
            waiting[bucket] -= 1
            if not waiting[bucket]:
                del waiting[bucket]
        return [item for _, _, item in batch]

    def _set_queue(self, bucket: Hashable, queue: deque[tuple[int, str, Item]]) -> None:
        if queue:
            self._queues[bucket] = queue
        else:
            self._queues.pop(bucket, None)
