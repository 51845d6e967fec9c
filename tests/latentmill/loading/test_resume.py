"""Resuming in the middle of an epoch: at every step, with the same topology and with others."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentmill.errors import IdentityError, UsageError
from latentmill.loading.index import Index
from latentmill.loading.order import OrderSettings
from latentmill.loading.resume import EpochPlan, resume_epoch, start_epoch
from tests.conftest import slow_param
from tests.latentmill.loading.indexes import make_index, split_rows

TOPOLOGIES = ({"world": 1}, {"world": 2, "workers": 2}, {"world": 3, "batch_size": 1}, {"world": 2, "window": 40})
SMALL = tuple(itertools.product(range(0, 13, 3), (0, 3, 10), (1, 3), ("drop", "pad")))


def deliver(plan: EpochPlan, first: int, end: int) -> list[int]:
    """Return the valid rows of the steps from `first` on and before `end`, of all ranks."""
    settings, rows = plan.order.settings, list[int]()
    for rank, worker in itertools.product(range(settings.world), range(max(1, settings.workers))):
        for batch in plan.order.batches(rank, worker, first - plan.first_step):
            if batch.step + plan.first_step < end:
                rows += batch.rows[batch.valid].tolist()
    return rows


def train(index: Index, settings: OrderSettings, cuts: list[tuple[dict[str, Any], int]]) -> None:
    """Train an epoch that is interrupted; check that the sessions cover what they should.

    cuts: the topology of each session, and how many steps it does. The last one goes to the end of the epoch.
    """
    plan = start_epoch(index, replace(settings, **cuts[0][0]), 2)
    state = plan.state_at(0) if plan.steps else {"epoch": 3, "sessions": []}
    seen, batches = Counter[int](), 0
    for number, (topology, steps) in enumerate(cuts):
        if state["epoch"] == 3:
            break
        plan, step = resume_epoch(index, replace(settings, **topology), json.loads(json.dumps(state)))
        if plan.epoch == 3:  # nothing that this topology could take is left
            state = plan.state_at(0)
            break
        end = plan.steps if number == len(cuts) - 1 else min(plan.steps, step + steps)
        seen.update(deliver(plan, step, end))
        batches += (end - step) * plan.order.settings.world * plan.order.settings.batch_size
        state = plan.state_at(end)
    assert not seen or max(seen.values()) == 1
    assert (state["epoch"], state["sessions"]) == (3, [])
    if settings.ends == "pad":
        assert len(seen) == index.row_count
    else:
        assert len(seen) == batches
        left = np.setdiff1d(np.arange(index.row_count), list(seen))
        rest = np.bincount(np.repeat(index.bucket, index.rows)[left], minlength=2) // plan.order.settings.batch_size
        assert rest.sum() < plan.order.settings.world, "whole batches are left for all ranks"


@pytest.mark.parametrize("every", [53, slow_param(1)])
def test_an_epoch_that_is_interrupted_anywhere_has_each_row_once(every: int) -> None:
    count = 0
    for a, b, batch_size, ends in SMALL:
        index = make_index(split_rows((a, b), 4))
        settings = OrderSettings(batch_size=batch_size, window=8, ends=ends)
        length = start_epoch(index, replace(settings, **TOPOLOGIES[0]), 2).steps
        for steps, (first, second) in itertools.product(range(length + 1), itertools.product(TOPOLOGIES, repeat=2)):
            count += 1
            if count % every == 0:
                train(index, settings, [(TOPOLOGIES[0], steps), (first, steps % 3), (second, 1), (TOPOLOGIES[0], 0)])


def test_the_same_topology_goes_on_with_the_same_batches() -> None:
    index = make_index(split_rows((40, 24), 8))
    settings = OrderSettings(batch_size=3, window=16, world=2, workers=2)
    plan = start_epoch(index, settings, 4)
    for step in range(plan.steps):
        again, at = resume_epoch(index, settings, plan.state_at(step))
        assert (again.epoch, at, again.steps) == (4, step, plan.steps)
        assert deliver(again, step, again.steps) == deliver(plan, step, plan.steps)


def test_steps_are_counted_from_the_start_of_the_epoch() -> None:
    index = make_index(split_rows((64,), 8), 1)
    settings = OrderSettings(batch_size=4, window=32)
    plan, step = resume_epoch(index, replace(settings, world=2), start_epoch(index, settings, 0).state_at(6))
    assert (plan.first_step, step, plan.steps) == (6, 6, 6 + 5)
    back, step = resume_epoch(index, settings, plan.state_at(8))
    assert (back.first_step, step, back.steps) == (8, 8, 8 + 6)
    assert back.state_at(9)["sessions"] == [[1, 0, 4, 32, 6], [2, 0, 4, 32, 2], [1, 0, 4, 32, 1]]


def test_the_state_is_small_and_says_where_it_is() -> None:
    plan = start_epoch(make_index(split_rows((64,), 8), 1), OrderSettings(batch_size=4, window=32, seed=3), 7)
    state = plan.state_at(0)
    assert (state["epoch"], state["sessions"], state["seed"], state["ends"]) == (7, [], 3, "drop")
    assert (plan.state_at(16)["epoch"], plan.state_at(15)["epoch"]) == (8, 7)
    sessions = [[1024, 8, 64, 65536, 100000]] * 25
    assert len(json.dumps({**state, "epoch": 10000, "seed": 2**62, "sessions": sessions})) < 1000


def test_a_cache_that_has_grown_is_refused_within_an_epoch_and_read_from_the_next_one() -> None:
    index, grown = (make_index(split_rows((rows,), 8), 1) for rows in (64, 80))
    settings = OrderSettings(batch_size=4, window=32)
    plan = start_epoch(index, settings, 1)
    with pytest.raises(IdentityError, match=rf"{index.fingerprint}, but the cache has {grown.fingerprint}.*epoch\(2\)"):
        resume_epoch(grown, settings, plan.state_at(5))
    after, step = resume_epoch(grown, settings, plan.state_at(16))
    assert (after.epoch, step, after.steps) == (2, 0, 20)


@pytest.mark.parametrize("change", [{"seed": 1}, {"ends": "pad"}, {"shuffle": False}])
def test_another_order_is_refused(change: dict[str, Any]) -> None:
    index, settings = make_index([(0, 8)]), OrderSettings(batch_size=2, window=8)
    (name,) = change
    with pytest.raises(UsageError, match=f"the state has {name}="):
        resume_epoch(index, replace(settings, **change), start_epoch(index, settings, 0).state_at(1))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"sessions": [[1, 0, 2]]},
        {"sessions": 5},
        {"sessions": [[1, 0, 2, 8, 9]]},
        {"sessions": [[2, 0, 2, 8, 9]]},
        {"epoch": "x"},
        {"epoch": -1},
        {"more": 1},
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any]) -> None:
    index, settings = make_index([(0, 8)]), OrderSettings(batch_size=2, window=8)
    with pytest.raises(UsageError):
        resume_epoch(index, settings, {**start_epoch(index, settings, 0).state_at(0), **change})
