"""Streams in torch's DataLoader, with and without workers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from latentmill import Cache, Loader, Stream
from latentmill.errors import CacheError, UsageError
from tests.conftest import slow_param

Make = Callable[..., Path]


@pytest.fixture
def cache(small_cache: Make) -> Cache:
    return Cache.open(str(small_cache()))


def load(stream: Stream, workers: int, context: str | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context, **options)


def describe(batches: Any) -> list[tuple[int, int, list[str]]]:
    return [(batch["epoch"], batch["step"], batch["key"]) for batch in batches]


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), slow_param(2, "spawn")])
def test_epochs_advance_and_each_has_every_row(cache: Cache, workers: int, context: str | None) -> None:
    stream = Stream(cache, 2, seed=1)
    loader = load(stream, workers, context)
    assert len(stream) == len(loader) == 9
    seen = []
    for epoch in range(2):
        assert stream.epoch == epoch
        batches = describe(loader)
        assert [batch[:2] for batch in batches] == [(epoch, step) for step in range(9)], "in the order of the steps"
        assert sorted(key for batch in batches for key in batch[2]) == [f"{number:09d}" for number in range(18)]
        seen.append([batch[2] for batch in batches])
    assert seen[0] != seen[1]
    if workers == 0:
        assert seen == [[batch["key"] for batch in Loader(cache, 2, seed=1, epoch=epoch)] for epoch in range(2)]


def test_persistent_workers_advance_too(cache: Cache) -> None:
    stream = Stream(cache, 6)
    loader = load(stream, 2, "fork", persistent_workers=True)
    assert [[batch["epoch"] for batch in loader] for _ in range(3)] == [[0] * 3, [1] * 3, [2] * 3]
    stream.set_epoch(7)
    assert describe(loader) == describe(load(Stream(cache, 6, epoch=7), 2, "fork"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_after_a_batch_goes_on_there(cache: Cache, workers: int) -> None:
    stream = Stream(cache, 2)
    batches = []
    for batch in load(stream, workers, "fork" if workers else None):
        batches.append(batch)
        if batch["step"] == 4:
            break
    state = json.loads(json.dumps(stream.state_after(batches[2])))
    rest = describe(load(Stream(cache, 2), workers))[3:]
    again = Stream(cache, 2)
    again.load_state_dict(state)
    assert describe(load(again, workers)) == rest
    assert stream.epoch == 0
    stream.load_state_dict(state)
    assert describe(load(stream, workers)) == rest
    assert (stream.epoch, again.epoch) == (1, 1)
    last = {"epoch": 0, "step": 8}
    assert (stream.state_after(last)["epoch"], stream.state_after(last)["sessions"]) == (1, [])


def test_other_workers_or_a_loader_go_on_with_the_rest(cache: Cache) -> None:
    stream = Stream(cache, 2)
    first = []
    for batch in load(stream, 2, "fork"):
        first.append(batch)
        if batch["step"] == 3:
            break
    state = stream.state_after(first[-1])
    loader, other = Loader(cache, 2), Stream(cache, 2)
    loader.load_state_dict(state)
    other.load_state_dict(state)
    done = [key for batch in first for key in batch["key"]]
    for rest in (describe(loader), describe(load(other, 1, "fork"))):
        assert [step for _, step, _ in rest] == list(range(4, 9))
        assert sorted(done + [key for _, _, keys in rest for key in keys]) == [f"{number:09d}" for number in range(18)]


@pytest.mark.parametrize("ends", ["drop", "pad"])
def test_ranks_have_the_same_number_of_batches(cache: Cache, ends: Any) -> None:
    keys, counts = list[str](), set[int]()
    for rank in range(2):
        stream = Stream(cache, 4, ends=ends, rank=rank, world=2)
        batches = list(load(stream, 2, "fork"))
        counts.add(len(batches))
        keys += [key for batch in batches for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]
    assert counts == {2 if ends == "drop" else 3}
    assert len(keys) == len(set(keys)) == (16 if ends == "drop" else 18)


@pytest.mark.slow  # after an error, torch waits ten seconds for its workers, whatever the data set
def test_an_error_of_a_worker_is_raised(cache: Cache) -> None:
    def fail(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["step"] == 3:
            raise CacheError("the tokenizer failed")
        return batch

    steps = []
    with pytest.raises(CacheError, match="the tokenizer failed"):
        for batch in load(Stream(cache, 2, transform=fail), 2, "fork"):
            steps.append(batch["step"])
    assert steps == [0, 1, 2]


def test_the_state_needs_the_epoch_and_the_step(cache: Cache) -> None:
    with pytest.raises(UsageError, match="the transform must keep them"):
        Stream(cache, 2).state_after({"latents": 1})
