"""The number of requests that reading a cache on a store costs, counted over HTTP."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import img2dataset_members, write_tar
from tests.proxy import Proxy
from tests.servers import upload

Command = Callable[..., tuple[int, str, str]]

UNITS = 12


@pytest.fixture
def cache(latentmill: Command, micro_vae: Path, bucket: str, tmp_path: Path) -> tuple[str, ...]:
    """Write a complete cache to the store, and return the arguments of its job."""
    for number in range(UNITS):
        write_tar(tmp_path / f"s/{number:02d}.tar", img2dataset_members(number, 1, height=64, width=64))
    options = ("--vae", str(micro_vae), "--resolution", "64", "--workers", "0")
    code, _, err = latentmill("encode", tmp_path / "s", "--to", tmp_path / "c", *options)
    assert code == 0, err
    return ("encode", str(tmp_path / "s"), "--to", upload(tmp_path / "c", f"{bucket}/c"), *options)


def count_requests(proxy: Proxy) -> Counter[tuple[str, str]]:
    """Return the requests by method and folder of the cache, without listings."""
    counts: Counter[tuple[str, str]] = Counter()
    for request in proxy.seen:
        _, _, name = urlsplit(request.path).path.partition("/c/")
        if name:
            counts[request.method, name.partition("/")[0]] += 1
    return counts


def test_a_run_with_nothing_to_do_reads_each_commit_once_in_one_request(
    latentmill: Command, cache: tuple[str, ...], proxy: Proxy
) -> None:
    code, out, err = latentmill(*cache)
    assert (code, out.startswith("encoded 0 images")) == (0, True), err
    requests = count_requests(proxy)
    assert requests["GET", "_commits"] == UNITS
    assert not [key for key in requests if key[0] == "HEAD" and key[1] in ("_commits", "_runs", "cache.json")], requests
    assert ("GET", "data") not in requests


def test_status_reads_each_commit_once_in_one_request(
    latentmill: Command, cache: tuple[str, ...], proxy: Proxy
) -> None:
    code, _, err = latentmill("status", cache[3])
    assert code == 0, err
    requests = count_requests(proxy)
    assert requests["GET", "_commits"] == UNITS
    assert ("HEAD", "_commits") not in requests
