"""Single rows: `len(cache)`, `cache[i]`, `cache.find(shard, key)`."""

import pickle
from collections.abc import Callable

import pytest
import torch

from latentmill import Cache
from tests.latentmill.loading.conftest import CountingStore, upload

Make = Callable[..., Cache]


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_row_by_its_number(make: Make, container: str) -> None:
    cache = make(container=container)
    rows = [row for file in cache.files() for row in cache.rows(file)]
    assert len(cache) == len(rows) == 18
    for number in (0, 7, 17, -1, -18):
        row, expected = cache[number], rows[number]
        assert torch.equal(row["latents"], cache.scaling.to_model(cache.raw_latent(expected).float()))
        assert (row["key"], row["captions"], row["shard"]) == (expected["key"], expected["txt"], expected["shard"])
        assert row["bucket"] == (expected["height"], expected["width"])
        assert row["original_size"].tolist() == [expected["original_height"], expected["original_width"]]
        assert cache.find(expected["shard"], expected["key"]) == number % 18
    for number in (18, -19):
        with pytest.raises(IndexError, match=rf"^the cache {cache.folder.url} has 18 rows, and no row {number}$"):
            cache[number]
    assert [row["key"] for row in cache] == [row["key"] for row in rows]
    for identity in (("shards/00000.tar", "x"), ("x", "000000000"), (rows[0]["shard"], rows[-1]["key"])):
        with pytest.raises(KeyError, match=identity[1]):
            cache.find(*identity)


def test_the_file_of_a_whole_tar_is_found_by_its_name(make: Make, store: type[CountingStore]) -> None:
    cache = upload(make())
    assert cache.find("shards/00001.tar", "000000018") == 17
    copy = pickle.loads(pickle.dumps(cache))
    assert len(copy) == 18 and copy[3]["key"] == cache[3]["key"]
    store.requests.clear()
    assert cache[4]["bucket"] == cache[3]["bucket"]
    assert not store.requests, "the last row group is kept"


def test_only_one_file_is_searched_if_the_name_says_which(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, opened = make(), list[str]()
    plain = type(cache.folder).open

    def spy(folder: object, name: str) -> object:
        opened.append(name)
        return plain(folder, name)  # type: ignore[arg-type]

    monkeypatch.setattr(type(cache.folder), "open", spy)
    cache.find("shards/00001.tar", "000000017")
    cache.find("shards/00001.tar", "000000016")
    assert opened == [cache.files()[1]]
