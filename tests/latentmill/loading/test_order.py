"""The order of an epoch: exhaustive over small caches, ranks, workers and batch sizes; bounds of memory and time."""

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from latentmill.errors import UsageError
from latentmill.loading.order import BatchPlan, EpochOrder, OrderSettings, plan_epoch
from tests.conftest import slow_param
from tests.latentmill.loading.indexes import make_index, split_rows

SMALL = tuple(itertools.product(range(13), range(13), (1, 3, 5), range(1, 5), range(1, 5), range(4), ("drop", "pad")))


def consumers(order: EpochOrder) -> Iterator[tuple[int, int]]:
    """Yield each rank with each of its workers."""
    yield from itertools.product(range(order.settings.world), range(max(1, order.settings.workers)))


def flatten(plans: Iterable[BatchPlan]) -> list[Any]:
    return [(plan.step, plan.bucket, plan.rows.tolist(), plan.valid.tolist()) for plan in plans]


def check_order(order: EpochOrder, rows: list[int]) -> None:
    """Check that each rank has the same full batches of one bucket, and that they cover what they should."""
    index, settings = order.index, order.settings
    bucket_of = np.repeat(index.bucket, index.rows)
    seen = Counter[int]()
    for rank in range(settings.world):
        steps = []
        for worker in range(max(1, settings.workers)):
            plans = list(order.batches(rank, worker))
            assert [plan.step for plan in plans] == list(range(worker, order.steps, max(1, settings.workers)))
            for plan in plans:
                assert len(plan.rows) == len(plan.valid) == settings.batch_size
                assert set(bucket_of[plan.rows].tolist()) == {plan.bucket}
                assert settings.ends == "pad" or plan.valid.all()
                seen.update(plan.rows[plan.valid].tolist())
            steps += [plan.step for plan in plans]
        assert sorted(steps) == list(range(order.steps))
    assert not seen or max(seen.values()) == 1, "a row is valid once"
    left_out = {index.buckets[number]: count for number, count in enumerate(rows) if count}
    for row in seen:
        left_out[index.buckets[bucket_of[row]]] -= 1
    assert order.left_out == {bucket: count for bucket, count in left_out.items() if count}
    if settings.ends == "pad":
        assert not order.left_out
    else:
        assert len(seen) == order.steps * settings.world * settings.batch_size
        full = sum(count // settings.batch_size for count in rows)
        assert order.steps == full // settings.world, "no batch is left out that all ranks could have"


def check_tails_and_reads(order: EpochOrder) -> None:
    """Check that the batches from a step on are those of the whole epoch, and that the groups they need are read."""
    group_of = np.repeat(np.arange(len(order.index.rows)), order.index.rows)
    for rank, worker in consumers(order):
        whole = flatten(order.batches(rank, worker))
        for step in range(order.steps + 1):
            tail = list(order.batches(rank, worker, step))
            assert flatten(tail) == [plan for plan in whole if plan[0] >= step]
            reads = order.reads(rank, worker, step)
            assert [read.first for read in reads] == sorted(read.first for read in reads)
            for plan in tail:
                held = {read.group for read in reads if read.first <= plan.step <= read.last}
                assert set(group_of[plan.rows].tolist()) <= held


@pytest.mark.parametrize("every", [101, slow_param(1)])
def test_every_small_plan_covers_what_it_should(every: int) -> None:
    for number, (a, b, group_rows, batch_size, world, workers, ends) in enumerate(SMALL[::every]):
        index = make_index(split_rows((a, b), group_rows))
        settings = OrderSettings(
            batch_size=batch_size,
            window=(8, 40)[(a + b) % 2],
            seed=number,
            shuffle=number % 5 > 0,
            ends=ends,
            world=world,
            workers=workers,
        )
        order = plan_epoch(index, settings, number % 3)
        check_order(order, [a, b])
        if number % 7 == 0:
            check_tails_and_reads(order)
            again = plan_epoch(index, settings, number % 3)
            assert all(flatten(order.batches(*who)) == flatten(again.batches(*who)) for who in consumers(order))


def test_a_plan_of_some_rows_has_only_those() -> None:
    index = make_index(split_rows((40, 24), 8))
    left = np.array([0, 1, 5, *range(13, 30), 63])
    order = plan_epoch(index, OrderSettings(batch_size=4, window=16, ends="pad", world=2), 0, left)
    rows = [row for who in consumers(order) for plan in order.batches(*who) for row in plan.rows[plan.valid].tolist()]
    assert sorted(rows) == left.tolist()
    check_tails_and_reads(order)


def test_the_order_is_the_same_on_all_machines_and_versions() -> None:
    """A training that is resumed years later, elsewhere, has the same order. Change it knowingly."""
    index = make_index(split_rows((700, 300, 5), 64), 3)
    order = plan_epoch(index, OrderSettings(batch_size=8, window=256, seed=7, world=2, workers=2), 3)
    text = repr([flatten(order.batches(*who)) for who in consumers(order)])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "6f88d8024083c1db6c00cedf4d11403eecb9c12eec0a48c386ab313729920ebd"
    )


def test_other_seeds_and_epochs_give_other_orders_and_no_shuffle_gives_the_cache_s() -> None:
    index = make_index(split_rows((400,), 50), 1)
    first = [plan.rows.tolist() for plan in plan_epoch(index, OrderSettings(batch_size=8, window=100), 0).batches()]
    for seed, epoch in ((1, 0), (0, 1)):
        other = plan_epoch(index, OrderSettings(batch_size=8, window=100, seed=seed), epoch)
        assert [plan.rows.tolist() for plan in other.batches()] != first
    plain = plan_epoch(index, OrderSettings(batch_size=8, window=100, shuffle=False), 5)
    assert np.concatenate([plan.rows for plan in plain.batches()]).tolist() == list(range(400))


def test_the_rows_left_out_change_each_epoch_and_are_spread_evenly() -> None:
    """The tail of a bucket, and the batches that only some ranks could have, come from anywhere in it."""
    index = make_index(split_rows((100, 60), 50))
    settings = OrderSettings(batch_size=7, window=60, world=3)
    missing = np.zeros(160)
    for epoch in range(600):
        order = plan_epoch(index, settings, epoch)
        rows = [row for rank in range(3) for plan in order.batches(rank) for row in plan.rows]
        missing[np.setdiff1d(np.arange(160), rows)] += 1
    assert sum(order.left_out.values()) == 160 - order.steps * 21
    for part in (missing[:100], missing[100:]):
        assert part.min() > part.mean() / 2, part
        assert part.max() < part.mean() * 2, part


def test_rows_of_a_window_are_mixed() -> None:
    """A batch has rows of a quarter of the window, here of four groups and more; the next comes from another one."""
    index = make_index(split_rows((64 * 256,), 64), 1)
    order = plan_epoch(index, OrderSettings(batch_size=64, window=1024), 0)
    groups = [set((plan.rows // 64).tolist()) for plan in order.batches()]
    assert min(len(each) for each in groups) >= 4
    assert np.mean([len(set().union(*groups[step : step + 8])) for step in range(200)]) > 12
    assert sum(len(a & b) > 0 for a, b in itertools.pairwise(groups)) < len(groups) * 0.4


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bucket_count", [1, 12])
def test_memory_is_bounded_and_a_group_is_read_about_once(world: int, workers: int, bucket_count: int) -> None:
    group_rows, window = 64, 1024  # 16 groups
    rows = [200 * 64 // bucket_count * world // (1 + number % 3) for number in range(bucket_count)]
    index = make_index(split_rows(rows, group_rows), bucket_count)
    order = plan_epoch(index, OrderSettings(batch_size=24, window=window, world=world, workers=workers), 0)
    reads = 0
    for who in consumers(order):
        held = np.zeros(order.steps + 2, np.int64)
        for read in order.reads(*who):
            held[read.first] += index.rows[read.group]
            held[read.last + 1] -= index.rows[read.group]
            reads += 1
        assert held.cumsum().max() + 2 * group_rows <= 1.5 * window, "two groups may be read ahead"
    assert reads < 1.35 * len(index.rows)


def test_without_shuffle_each_group_is_read_once_in_turn() -> None:
    index = make_index(split_rows((64 * 20,), 64), 1)
    reads = plan_epoch(index, OrderSettings(batch_size=24, window=512, shuffle=False), 0).reads()
    assert [read.group for read in reads] == list(range(20))


def test_a_group_is_held_no_longer_than_its_windows_are_open() -> None:
    index = make_index(split_rows((64 * 200,), 64), 1)
    order = plan_epoch(index, OrderSettings(batch_size=32, window=1024), 0)
    needs = {group: list[int]() for group in range(200)}
    for plan in order.batches():
        for group in set((plan.rows // 64).tolist()):
            needs[group].append(plan.step)
    for read in order.reads():
        steps = [step for step in needs[read.group] if read.first <= step <= read.last]
        assert steps[0] - read.first < 20
        assert read.last - steps[-1] < 40, "a window has 8 batches, and each step takes one of four windows"


@pytest.mark.parametrize(("rows", "limit"), [(1_300_000, 0.1), slow_param(20_000_000, 2.0)])
def test_planning_is_fast(rows: int, limit: float) -> None:
    """Also half of the epoch is planned anew in this many CPU seconds, with a margin for slow machines."""
    index = make_index([(number % 20, 256) for number in range(rows // 256)], 20)
    settings = OrderSettings(batch_size=64, window=4096, world=8)
    started = time.process_time()
    order = plan_epoch(index, settings, 0)
    order.reads()
    planned = time.process_time()
    plan_epoch(index, settings, 0, order.rows_after(order.steps // 2))
    assert planned - started < limit
    assert time.process_time() - planned < limit * 3


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, not 1.5"),
        ({"world": 0}, "world must be an integer of at least 1, not 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, not -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
        ({"ends": "keep"}, "ends must be 'drop' or 'pad', not 'keep'"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        OrderSettings(**{"batch_size": 1, "window": 1, **values})


def test_a_rank_or_an_epoch_that_does_not_exist_is_refused() -> None:
    order = plan_epoch(make_index([(0, 4)]), OrderSettings(batch_size=1, window=1, world=2), 0)
    with pytest.raises(UsageError, match="no worker 0 of rank 2 with 2 ranks"):
        list(order.batches(2))
    with pytest.raises(UsageError, match="epoch must be"):
        plan_epoch(order.index, order.settings, -1)
