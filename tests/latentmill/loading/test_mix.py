"""Several loaders as one."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from latentmill import Cache, Loader, mix
from latentmill.errors import UsageError

Make = Callable[..., Path]


@pytest.fixture
def pair(small_cache: Make) -> Callable[..., tuple[Loader, Loader]]:
    """Return a function that returns two loaders of batches of 2 and 3 rows."""
    cache = Cache.open(str(small_cache()))
    return lambda **options: (Loader(cache, 2, seed=1, **options), Loader(cache, 3, seed=2, **options))


def describe(batches: Any) -> list[tuple[int, int, int]]:
    return [(batch["loader"], batch["epoch"], batch["step"]) for batch in batches]


def test_batches_are_drawn_by_weight_and_each_loader_goes_through_its_epochs(pair: Callable[..., Any]) -> None:
    mixed = mix([*zip(pair(), (3, 1), strict=True)], seed=5, steps=60)
    places = describe(mixed)
    assert len(places) == len(mixed) == 60
    counts = Counter(number for number, _, _ in places)
    assert 36 <= counts[0] <= 54
    for number, length in ((0, 9), (1, 6)):
        own = [(epoch, step) for loader, epoch, step in places if loader == number]
        assert own == [divmod(place, length) for place in range(counts[number])]
    assert (mixed.epoch, mixed.step) == (1, 0)
    assert [place[0] for place in describe(mixed)] != [place[0] for place in places], "another epoch, other draws"


def test_the_draws_are_equal_on_all_ranks(pair: Callable[..., Any]) -> None:
    ranks = [describe(mix([*zip(pair(rank=rank, world=2), (1, 1), strict=True)], steps=20)) for rank in range(2)]
    assert ranks[0] == ranks[1]


def test_a_mix_goes_on_after_any_step(pair: Callable[..., Any]) -> None:
    def make() -> Any:
        return mix([*zip(pair(), (0.7, 0.3), strict=True)], seed=3)

    mixed = make()
    assert len(mixed) == 15
    whole = [batch["key"] for _ in range(2) for batch in mixed]
    for steps in (0, 1, 7, 14, 15, 16, 29):
        first, second = make(), make()
        taken = [batch["key"] for batch in islice(first, min(steps, 15))]
        taken += [batch["key"] for batch in islice(first, steps - 15)] if steps > 15 else []
        state = json.loads(json.dumps(first.state_dict()))
        second.load_state_dict(state)
        assert (second.epoch, second.step) == divmod(steps, 15)
        rest = [batch["key"] for batch in second]
        assert taken + rest == whole[: len(taken) + len(rest)]
        first.close()


@pytest.mark.parametrize(("before", "after", "step", "expected"), [(1, 2, 14, 6), (1, 2, 7, 3), (2, 1, 3, 6)])
def test_with_other_ranks_the_same_share_of_the_epoch_is_done(
    pair: Callable[..., Any], before: int, after: int, step: int, expected: int
) -> None:
    def make(world: int) -> Any:
        return mix([*zip(pair(rank=0, world=world), (0.7, 0.3), strict=True)], seed=3)

    first, second = make(before), make(after)
    assert {1: len(make(1)), 2: len(make(2))} == {1: 15, 2: 7}
    list(islice(first, step))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    first.close()
    assert (second.epoch, second.step) == (0, expected)
    assert len(list(second)) == len(second) - expected
    assert second.epoch == 1


def test_a_loader_of_weight_zero_is_never_drawn(pair: Callable[..., Any]) -> None:
    a, b = pair()
    assert {place[0] for place in describe(mix([(a, 1.0), (b, 0.0)], steps=30))} == {0}
    assert {place[0] for place in describe(mix([(a, 0.0), (b, 2.0)], steps=30))} == {1}


def test_what_is_no_mix_is_refused(pair: Callable[..., Any]) -> None:
    a, b = pair()
    for weights in ((0, 0), (-1, 2), (float("nan"), 1)):
        with pytest.raises(UsageError, match="weights of a mix must be positive"):
            mix([*zip((a, b), weights, strict=True)])
    with pytest.raises(UsageError, match="weights of a mix"):
        mix([])
    with pytest.raises(UsageError, match="the same loader twice"):
        mix([(a, 1), (a, 1)])
    with pytest.raises(UsageError, match="at least one step"):
        mix([(a, 1)], steps=0)
    with pytest.raises(UsageError, match="not a state of a mix of 1 loaders"):
        mix([(a, 1)]).load_state_dict(mix([(a, 1), (b, 1)]).state_dict())
    good = mix([(a, 1)]).state_dict()
    for state in (
        None,
        {},
        {**good, "loaders": None},
        {**good, "step": "x"},
        {**good, "epoch": -1},
        {**good, "step": 99},
        {**good, "step": 0, "steps": 0},
    ):
        with pytest.raises(UsageError, match="not a state of a mix"):
            mix([(a, 1)]).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the state has seed=1, but the mix has 2"):
        mix([(a, 1)], seed=2).load_state_dict(mix([(a, 1)], seed=1).state_dict())
