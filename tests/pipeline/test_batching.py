"""The choice of the next batch: rules one by one, and a simulated device that is to have work all the time."""

import heapq
import random
from collections import Counter, deque
from dataclasses import dataclass

import pytest

from pipeline.batching import Batcher

SQUARE = (64, 64)
TALL = (96, 64)


def make_batcher(batch_size: int, **units: int) -> Batcher[str]:
    """Return a batcher with these units. The number of each is that of its samples, all of them still being opened."""
    batcher = Batcher[str](batch_size)
    for unit, samples in units.items():
        batcher.start_unit(unit)
        for _ in range(samples):
            batcher.start_opening(unit)
    return batcher


def test_a_batch_runs_as_soon_as_it_is_full_whatever_units_its_images_are_from() -> None:
    batcher = make_batcher(3, a=2, b=9)
    for unit, item in (("a", "a0"), ("b", "b0")):
        batcher.add(unit, SQUARE, item)
    assert batcher.next_batch() == []
    batcher.add("b", TALL, "b1")
    assert batcher.next_batch() == [], "of another shape"
    batcher.add("a", SQUARE, "a1")
    assert batcher.next_batch() == ["a0", "b0", "a1"]
    assert (batcher.waiting, batcher.opening) == (1, 7)


def test_the_full_batch_that_waited_longest_is_first() -> None:
    batcher = make_batcher(2, a=9)
    for bucket, item in ((TALL, "t0"), (SQUARE, "s0"), (SQUARE, "s1"), (TALL, "t1"), (SQUARE, "s2"), (SQUARE, "s3")):
        batcher.add("a", bucket, item)
    assert [batcher.next_batch() for _ in range(4)] == [["t0", "t1"], ["s0", "s1"], ["s2", "s3"], []]


def test_a_partial_batch_waits_while_its_unit_has_samples() -> None:
    batcher = make_batcher(4, a=2)
    batcher.add("a", SQUARE, "a0")
    assert batcher.next_batch() == [], "the other sample is being opened"
    batcher.drop("a")
    assert batcher.next_batch() == [], "there may be more to read"
    batcher.end_reading("a")
    assert batcher.pop_finished() == []
    assert batcher.next_batch() == ["a0"]
    assert batcher.pop_finished() == ["a"]


def test_of_drained_units_the_one_that_costs_least_padding_is_first() -> None:
    batcher = make_batcher(4, a=4, b=3, c=9)
    for item in ("a0", "a1"):
        batcher.add("a", SQUARE, item)
    for item in ("a2", "a3"):
        batcher.add("a", TALL, item)
    for item in ("b0", "b1", "b2"):
        batcher.add("b", (64, 96), item)
    for unit in "ab":
        batcher.end_reading(unit)
    assert batcher.next_batch() == ["b0", "b1", "b2"], "1 slot, not 4"
    batcher.add("c", TALL, "c0")
    assert batcher.next_batch() == ["a2", "a3", "c0"], "the fullest bucket first, with images of other units"
    assert batcher.next_batch() == ["a0", "a1"]
    assert batcher.pop_finished() == ["a", "b"]


def test_a_drained_unit_makes_way_for_one_that_can_be_read() -> None:
    batcher = make_batcher(2, a=1, b=9)
    batcher.add("a", TALL, "a0")
    batcher.end_reading("a")
    for item in ("b0", "b1"):
        batcher.add("b", SQUARE, item)
    assert batcher.next_batch() == ["b0", "b1"], "no unit waits for the place"
    for item in ("b2", "b3"):
        batcher.add("b", SQUARE, item)
    assert batcher.next_batch(units_wait=True) == ["a0"], "only one unit has unread samples, and another waits"


def test_a_full_worker_runs_its_largest_batch() -> None:
    batcher = make_batcher(4, a=4)
    for bucket, item in ((SQUARE, "s0"), (TALL, "t0"), (SQUARE, "s1")):
        batcher.add("a", bucket, item)
    assert batcher.next_batch(is_full=True) == [], "a sample is being opened"
    batcher.drop("a")
    assert batcher.next_batch(is_full=True) == ["s0", "s1"]


def test_a_discarded_unit_leaves_the_images_of_others() -> None:
    batcher = make_batcher(2, a=2, b=1)
    for unit, item in (("a", "a0"), ("b", "b0")):
        batcher.add(unit, SQUARE, item)
    batcher.discard("a")
    batcher.add("a", SQUARE, "a1")  # it was being opened
    batcher.end_reading("b")
    assert (batcher.waiting, batcher.opening) == (1, 0)
    assert batcher.next_batch() == ["b0"]
    assert batcher.pop_finished() == ["b"]


@dataclass
class Simulation:
    """Units of images in random buckets, opened in parallel, encoded by one device. Times are in seconds."""

    rate: float
    unit_size: int
    buckets: int
    batch_size: int = 8
    active: int = 8
    units: int = 40
    openers: int = 16

    def run(self) -> tuple[float, float]:
        """Return the share of time for which the device ran, and the share of its slots that were padding."""
        rng = random.Random(0)
        batcher = Batcher[int](self.batch_size)
        room = self.buckets * (self.batch_size - 1) + 2 * self.openers + 4 * self.batch_size
        waiting, unread = deque(range(self.units)), dict[str, int]()
        events: list[tuple[float, int, str, str]] = []
        order = iter(range(10**9))
        slots, free_at, now, running, start = Counter[str](), 0.0, 0.0, False, 0.0
        open_seconds = 0.8 * self.openers / self.rate

        def read() -> None:
            """Read as far as there is room and openers are free, in turn over the units."""
            while waiting and len(batcher._units) < self.active:
                unit = str(waiting.popleft())
                batcher.start_unit(unit)
                unread[unit] = self.unit_size
            while unread and batcher.opening < self.openers and batcher.opening + batcher.waiting < room:
                unit = rng.choice(list(unread))
                batcher.start_opening(unit)
                heapq.heappush(events, (now + open_seconds * rng.uniform(0.5, 1.5), next(order), "opened", unit))
                unread[unit] -= 1
                if not unread[unit]:
                    del unread[unit]
                    batcher.end_reading(unit)

        read()
        while events:
            now, _, event, unit = heapq.heappop(events)
            if event == "opened":
                bucket = min(int(rng.expovariate(1) * self.buckets / 4), self.buckets - 1)
                batcher.add(unit, bucket, next(order))
            else:
                running = False
            if not running:
                is_full = batcher.opening + batcher.waiting >= room
                if batch := batcher.next_batch(bool(waiting) and len(batcher._units) >= self.active, is_full):
                    start = start or now
                    slots["images"] += len(batch)
                    slots["padding"] += self.batch_size - len(batch)
                    running, free_at = True, now + self.batch_size / self.rate
                    heapq.heappush(events, (free_at, next(order), "encoded", ""))
            batcher.pop_finished()
            read()
        assert slots["images"] == self.units * self.unit_size
        busy = slots.total() / self.rate / (free_at - start)
        return busy, slots["padding"] / slots.total()


CASES = [
    Simulation(rate, unit_size, buckets)
    for rate in (400, 1500)
    for unit_size, buckets in ((1000, 1), (1000, 33), (256, 33))
]


@pytest.mark.parametrize("simulation", CASES, ids=str)
def test_a_device_always_has_work_and_little_of_it_is_padding(simulation: Simulation) -> None:
    busy, padding = simulation.run()
    print(busy, padding)
    assert busy > 0.97
    assert padding < (0.03 if simulation.unit_size < 1000 else 0.012)
