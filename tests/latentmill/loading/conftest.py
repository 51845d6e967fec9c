"""Caches of random latents, and a store that counts its requests and fails when it is told to."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bench.make_cache import CacheSpec, write_cache
from latentmill import Cache

BUCKETS = {(64, 64): 11, (64, 128): 1, (128, 64): 6}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Cache]:
    """Return a function that writes a cache of two parts with 18 rows in three buckets, and opens it."""

    def run(**fields: Any) -> Cache:
        folder = tmp_path / "cache"
        write_cache(folder, CacheSpec(**{"buckets": BUCKETS, "parts": 2, **fields}))
        return Cache.open(str(folder))

    return run


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that returns a cache of moments, of 18 rows of one bucket, in six parts of a container."""
    made = dict[str, Path]()

    def run(container: str = "parquet") -> Path:
        if container not in made:
            made[container] = tmp_path_factory.mktemp("small") / container
            spec = CacheSpec(buckets={(64, 64): 18}, parts=6, container=container, store="moments")
            write_cache(made[container], spec)
        return made[container]

    return run


class CountingStore(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in memory. requests: (path, start, end) of each read. faults: what the next reads do instead."""

    protocol = "counted"
    requests: list[tuple[str, int | None, int | None]]
    faults: list[BaseException | int]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        name = path.removeprefix("counted://").strip("/")
        return f"/{name}" if name else ""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.requests.append((path.removeprefix("/counted/c/"), start, end))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, BaseException):
            raise fault
        return bytes(super().cat_file(path, start, end, **options))[:fault]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CountingStore]]:
    """Return the store behind `counted://`, without waits between its retries. `upload` fills it."""
    monkeypatch.setattr("latentmill.folder.RETRY_SECONDS", (0.0, 0.0))
    fsspec.register_implementation("counted", CountingStore, clobber=True)
    CountingStore.requests, CountingStore.faults = [], []
    yield CountingStore
    if CountingStore().exists("/counted"):
        CountingStore().rm("/counted", recursive=True)


def upload(cache: Cache) -> Cache:
    """Copy a cache to the store, and open it there. The requests until then do not count."""
    if CountingStore().exists("/counted/c"):  # it would be copied into it
        CountingStore().rm("/counted/c", recursive=True)
    CountingStore().put(cache.folder.url, "/counted/c", recursive=True)
    opened = Cache.open("counted://counted/c")
    CountingStore.requests.clear()
    return opened
