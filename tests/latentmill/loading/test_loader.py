"""The loader on small caches: batches, epochs, resuming, threads and their errors."""

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from latentmill import Cache, IdentityError, Loader
from latentmill.errors import CacheError, UsageError
from latentmill.loading.row_groups import GroupReader

Make = Callable[..., Path]
KEYS = [f"{number:09d}" for number in range(18)]


@pytest.fixture
def cache(small_cache: Make) -> Cache:
    return Cache.open(str(small_cache()))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("latentmill")]


def keys_of(batches: Any) -> list[list[str]]:
    return [batch["key"] for batch in batches]


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_an_epoch_has_each_row_and_its_latent(small_cache: Make, container: str) -> None:
    cache = Cache.open(str(small_cache(container)))
    loader = Loader(cache, 3, seed=1)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert sorted(key for batch in batches for key in batch["key"]) == KEYS
    assert [batch["step"] for batch in batches] == list(range(6))
    rows = {row["key"]: row for file in cache.files() for row in cache.rows(file)}
    for batch in batches:
        assert batch["latents"].shape == (3, 4, 8, 8)
        for key, caption, latent in zip(batch["key"], batch["captions"], batch["latents"], strict=True):
            assert caption == rows[key]["txt"]
            assert caption.endswith(f"picture {int(key)}")
            expected = cache.scaling.to_model(cache.raw_latent(rows[key])[:4].float())
            torch.testing.assert_close(latent, expected)


def test_epochs_advance_and_differ_and_repeat_by_number(cache: Cache) -> None:
    loader = Loader(cache, 4, seed=1)
    epochs = [(loader.epoch, keys_of(loader)) for _ in range(3)]
    assert [epoch for epoch, _ in epochs] == [0, 1, 2]
    assert len({str(keys) for _, keys in epochs}) == 3
    assert loader.left_out == {(64, 64): 2}
    assert (loader.epoch, loader.step) == (3, 0)
    loader.set_epoch(1)
    assert keys_of(loader) == epochs[1][1]
    assert keys_of(Loader(cache, 4, seed=1, epoch=2)) == epochs[2][1]
    assert keys_of(Loader(cache, 4, seed=1, epoch=2, step=3)) == epochs[2][1][3:]
    assert [row for batch in keys_of(Loader(cache, 6, shuffle=False)) for row in batch] == KEYS


def test_a_loop_that_is_left_goes_on(cache: Cache) -> None:
    whole, loader = keys_of(Loader(cache, 3)), Loader(cache, 3)
    first = keys_of(islice(loader, 2))
    assert (loader.epoch, loader.step) == (0, 2)
    assert first + keys_of(loader) == whole
    assert (loader.epoch, loader.step) == (1, 0)
    for batch in loader:
        if batch["step"] == 5:
            break
    assert (loader.epoch, loader.step, loader.state_dict()["epoch"]) == (1, 6, 2)
    assert next(iter(loader))["epoch"] == 2, "a loop that was left at the last batch has nothing to go on with"
    loader.close()


def test_the_state_counts_batches_that_were_delivered(cache: Cache) -> None:
    whole = [keys_of(Loader(cache, 3, epoch=epoch)) for epoch in range(2)]
    loader = Loader(cache, 3, prefetch=3)
    for batch in loader:
        state = json.loads(json.dumps(loader.state_dict()))
        again = Loader(cache, 3)
        again.load_state_dict(state)
        rest = whole[0][batch["step"] + 1 :]
        assert keys_of(again) == (rest or whole[1])


def valid_keys(batches: Any) -> list[str]:
    return [key for batch in batches for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]


@pytest.mark.parametrize("ends", ["drop", "pad"])
def test_other_ranks_and_batches_go_on_with_the_rest(cache: Cache, ends: Any) -> None:
    loader = Loader(cache, 4, ends=ends)
    seen = valid_keys(islice(loader, 2))
    left = 18 - len(seen)
    for rank in range(2):
        other = Loader(cache, 2, ends=ends, rank=rank, world=2)
        other.load_state_dict(loader.state_dict())
        assert (other.step, len(other)) == (2, 2 + (left // 4 if ends == "drop" else -(-left // 4)))
        batches = list(other)
        assert [batch["step"] for batch in batches] == list(range(2, len(batches) + 2))
        seen += valid_keys(batches)
    assert len(seen) == len(set(seen)) == (16 if ends == "drop" else 18)


def test_a_grown_cache_is_read_from_the_next_epoch(small_cache: Make, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(small_cache(), folder)
    (folder / "index.parquet").unlink(missing_ok=True)
    last = max((folder / "data").iterdir())
    moved = shutil.move(last, tmp_path / "later.parquet")
    loader = Loader(Cache.open(str(folder)), 2)
    before, length = loader.state_dict(), len(loader)
    iterator = iter(loader)
    next(iterator)
    within = loader.state_dict()
    shutil.move(moved, last)
    loader.refresh()
    assert len(keys_of(iterator)) == length - 1, "the running epoch has the files of its start"
    assert (len(loader), loader.epoch) == (9, 1)
    assert len(keys_of(loader)) == 9
    grown = Loader(Cache.open(str(folder)), 2)
    with pytest.raises(
        IdentityError, match=f"{within['fingerprint']}, but the cache has {loader.state_dict()['fingerprint']}"
    ):
        grown.load_state_dict(within)
    grown.load_state_dict(before)
    assert (len(grown), grown.epoch) == (9, 0)
    old = Loader(
        Cache.open(str(folder)), 2, files=[f"data/{path.name}" for path in (folder / "data").iterdir() if path != last]
    )
    old.load_state_dict(within)
    assert len(keys_of(old)) == length - 1
    old.refresh()
    assert len(old) == 9


def test_an_error_is_raised_at_its_batch_and_the_loop_can_go_on(cache: Cache) -> None:
    broken = [3]

    def fail(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["step"] in broken:
            raise ValueError("the tokenizer failed")
        return batch

    loader, seen = Loader(cache, 3, transform=fail), list[list[str]]()
    with pytest.raises(ValueError, match="the tokenizer failed"):
        for batch in loader:
            seen.append(batch["key"])
    assert (len(seen), loader.step) == (3, 3)
    broken.clear()
    assert seen + keys_of(loader) == keys_of(Loader(cache, 3))


def test_damage_is_raised_at_the_batch_that_needs_it(small_cache: Make, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(small_cache(), folder)
    loader = Loader(Cache.open(str(folder)), 3, shuffle=False)
    path = sorted((folder / "data").iterdir())[3]
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)
    first = next(
        number for number, row in enumerate(KEYS) if row in {r["key"] for r in _rows(small_cache(), path.name)}
    )
    taken = []
    with pytest.raises(CacheError, match=path.name):
        for batch in loader:
            taken.append(batch["step"])
    assert taken == list(range(first // 3))


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(Cache.open(str(folder)).rows(f"data/{name}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be a floating-point dtype of torch or None, not 'float16'"),
        ({"dtype": torch.int32}, "dtype must be a floating-point dtype of torch or None, not torch.int32"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"files": ["data/a.parquet", "data/a.parquet"]}, "files has the same file twice"),
        ({"epoch": -1}, "epoch must be from 0 to"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(cache: Cache, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Loader(cache, 2, **options)


def test_an_unknown_option_is_named(cache: Cache) -> None:
    with pytest.raises(TypeError, match="there is no option colums"):
        Loader(cache, 2, colums=["txt"])  # type: ignore[call-arg]


def test_what_is_no_state_is_refused(cache: Cache) -> None:
    loader = Loader(cache, 2)
    state = loader.state_dict()
    for other in (None, {}, {**state, "epoch": -1}, {**state, "sessions": None}):
        with pytest.raises(UsageError, match="not a state"):
            loader.load_state_dict(other)  # type: ignore[arg-type]


def test_a_rank_that_is_no_number_is_named(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    with pytest.raises(UsageError, match="the environment variable RANK is '', not a number"):
        Loader(cache, 2)


def test_buckets_below_a_batch_are_a_warning(make: Callable[..., Cache], caplog: pytest.LogCaptureFixture) -> None:
    cache = make(buckets={(64, 64): 9, (64, 96): 3})
    with caplog.at_level("INFO", logger="latentmill"):
        Loader(cache, 4)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "these sizes have fewer rows than a batch, so no epoch has them: 3 of 64x96; use ends='pad', a smaller "
            "batch, or fewer buckets",
        ),
        ("INFO", "each epoch leaves out a different set of rows: 1 of 64x64"),
    ]


def test_at_most_prefetch_batches_are_made_ahead(cache: Cache) -> None:
    made = list[int]()
    loader = Loader(cache, 1, prefetch=2, transform=lambda batch: made.append(batch["step"]) or batch)
    iterator = iter(loader)
    assert made == [], "nothing starts before the first batch is asked for"
    next(iterator)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2]
    loader.close()


def test_groups_are_read_once_and_dropped(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, alive = list[int](), weakref.WeakSet[Any]()
    read, peak = GroupReader.read, [0]

    def record(self: GroupReader, group: int) -> Any:
        reads.append(group)
        result = _Weak(read(self, group))
        alive.add(result)
        peak[0] = max(peak[0], len(alive))
        return result

    monkeypatch.setattr(GroupReader, "read", record)
    loader = Loader(cache, 1, window=1, shuffle=False)
    monkeypatch.setattr("latentmill.loading.feed.READ_AHEAD", 1)
    assert len(list(loader)) == 18
    assert sorted(reads) == list(range(len(cache.files())))
    gc.collect()
    assert not alive
    assert peak[0] <= 3, "the group in use, one ahead, and one that is about to be dropped"


class _Weak:
    """A row group that weak references can point to."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def test_an_abandoned_loop_leaves_no_thread(cache: Cache) -> None:
    iterator = iter(Loader(cache, 1))
    next(iterator)
    assert any(thread.name == "latentmill-loader" for thread in threading.enumerate())
    del iterator
    gc.collect()
    assert not any(thread.name.startswith("latentmill") for thread in threading.enumerate())


def test_a_loop_ends_with_an_error_if_the_loader_is_moved(cache: Cache) -> None:
    loader = Loader(cache, 3)
    first = iter(loader)
    next(first)
    loader.set_epoch(4)
    with pytest.raises(UsageError, match="moved to another place, during this loop"):
        next(first)
    second = iter(loader)
    assert next(second)["epoch"] == 4
    third = iter(loader)
    assert next(third)["step"] == 1
    with pytest.raises(UsageError, match="start a new loop"):
        next(second)
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "del loader"])
def test_the_end_of_the_interpreter_is_silent(small_cache: Make, ending: str) -> None:
    code = (
        "import sys; from latentmill import Cache, Loader\n"
        "loader = Loader(Cache.open(sys.argv[1]), 1)\n"
        "iterator = iter(loader)\n"
        "print(next(iterator)['step'])\n"
    )
    run = [sys.executable, "-c", code + ending, str(small_cache())]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (3 if "3" in ending else 0, "0\n", "")


def test_a_device_and_a_transform(cache: Cache) -> None:
    def add(batch: dict[str, Any]) -> dict[str, Any]:
        assert threading.current_thread() is not threading.main_thread()
        return {"nested": [batch["latents"], (batch["valid"],)], "key": batch["key"]}

    batch = next(iter(Loader(cache, 2, device="meta", transform=add)))
    assert {batch["nested"][0].device.type, batch["nested"][1][0].device.type} == {"meta"}
    assert isinstance(batch["key"], list)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 19}, r"no batch for each rank, with batch_size=19 and 1 ranks: it has 18 of 64x64 rows"),
        ({"batch_size": 6, "rank": 0, "world": 4}, "batch_size=6 and 4 ranks"),
        ({"batch_size": 2, "step": 10}, "an epoch has 9 steps, so it cannot begin at step 10"),
        ({"batch_size": 2, "rank": 0}, "rank and world are given together"),
        ({"batch_size": 2, "rank": 2, "world": 2}, "there is no rank 2 in a world of 2"),
        ({"batch_size": 2, "prefetch": 0}, "prefetch must be at least 1"),
        ({"batch_size": 2, "columns": ["aesthetic"]}, "has no column aesthetic; it has"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(cache: Cache, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Loader(cache, **arguments)


def test_the_rank_is_found(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    loader = Loader(cache, 2)
    assert (loader.rank, loader.world, len(loader)) == (1, 3, 3)
    assert (Loader(cache, 2, rank=0, world=1).world) == 1


def test_the_window_is_stated_in_rows(cache: Cache) -> None:
    assert Loader(cache, 64, ends="pad").window == 512 * 2**20 // (8 * 8 * 8 * 2)
    assert Loader(cache, 3, window=100).window == 96, "quarters of whole batches"
    assert Loader(cache, 3, window=1).window == 12
