"""Listings of stores that answer page by page: in parallel, with few requests, and complete."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fsspec.asyn import get_loop

from latentmill import pages
from pipeline.sources import found
from pipeline.sources.found import FoundFile, find_files_below


class PagedStore:
    """A store with these keys in the bucket `b`, whose library lists page by page as s3fs does.

    requests: the prefix and the delimiter of each listing. most: the listings that were under way at once.
    """

    def __init__(self, *keys: str) -> None:
        self.keys, self.loop = sorted(keys), get_loop()
        self.requests: list[tuple[str, str]] = []
        self.under_way = self.most = 0

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    async def _iterdir(self, bucket: str, delimiter: str, prefix: str) -> AsyncIterator[dict[str, Any]]:
        self.requests.append((prefix, delimiter))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        folders = set()
        for key in self.keys:
            if key.startswith(prefix) and delimiter and delimiter in key[len(prefix) :]:
                folders.add(key[: key.index(delimiter, len(prefix))])
            elif key.startswith(prefix):
                yield {"name": f"{bucket}/{key}", "type": "file", "size": len(key), "ETag": f'"{key}"'}
        for folder in sorted(folders):
            yield {"name": f"{bucket}/{folder}", "type": "directory", "size": 0}


def expected(store: PagedStore) -> dict[str, FoundFile]:
    return {f"b/{key}": FoundFile(len(key), key) for key in store.keys if not key.endswith("/")}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE", 2)


def test_a_small_source_is_listed_by_one_call() -> None:
    store = PagedStore("s/a", "s/b/c", "s/b/", "s/d")
    assert find_files_below(store, "b/s") == expected(store)
    assert store.requests == [("s/", "")]


def test_the_folders_of_a_large_source_are_listed_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "READERS", 3)
    store = PagedStore("s/x", *(f"s/only/{folder}/{number}" for folder in range(9) for number in range(4)))
    assert find_files_below(store, "b/s") == expected(store)
    assert store.most == 3
    assert sorted(store.requests[-9:]) == [(f"s/only/{folder}/", "") for folder in range(9)]


def test_a_large_folder_without_folders_is_listed_to_its_end() -> None:
    store = PagedStore(*(f"s/{number}" for number in range(20)))
    assert find_files_below(store, "b/s") == expected(store)


@pytest.mark.parametrize("folders", [[f"{number}" for number in range(9)], ["", "a", "b"]], ids=["many", "empty name"])
def test_a_source_is_complete_if_its_folders_are_not_listed_one_by_one(
    folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "MOST_FOLDERS", 4)
    store = PagedStore(*(f"s/{folder}/{number}" for folder in folders for number in range(3)))
    assert find_files_below(store, "b/s") == expected(store)
    assert store.requests == [("s/", ""), ("s/", "/")]
