"""Added columns, in a cache on S3: the requests that they cost, and a lost answer."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill import Cache
from tests.conftest import img2dataset_members, write_tar
from tests.proxy import Proxy, Request
from tests.servers import read, upload

Command = Callable[..., tuple[int, str, str]]
KEYS = [f"{number:09d}" for number in range(12)]
WIDTH = 100_000  # numbers of an embedding: an overlay is then larger than what is read with its footer


@pytest.fixture
def cache(latentmill: Command, micro_vae: Path, bucket: str, tmp_path: Path) -> str:
    """Return a cache on S3 of two parts with two row groups each."""
    for number in range(2):
        members = img2dataset_members(6 * number, 3, height=64, width=64)
        members |= img2dataset_members(6 * number + 3, 3, height=64, width=96)
        write_tar(tmp_path / f"s/{number}.tar", members)
    argv = ("--vae", micro_vae, "--buckets", 64, "--multiple-of", 8, "--workers", 0)
    code, _, err = latentmill("encode", tmp_path / "s", "--to", tmp_path / "c", *argv)
    assert code == 0, err
    return upload(tmp_path / "c", f"{bucket}/c")


def upload_table(bucket: str, tmp_path: Path) -> str:
    (tmp_path / "t").mkdir()
    numbers = np.repeat(np.arange(12, dtype=np.float16), WIDTH)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(numbers), WIDTH)
    table = pa.table({"key": KEYS, "txt": [f"new {key}" for key in KEYS], "e": embedding})
    for number in range(3):
        pq.write_table(table.slice(4 * number, 4), tmp_path / f"t/{number}.parquet")
    return upload(tmp_path / "t", f"{bucket}/t")


def count_requests(proxy: Proxy) -> Counter[tuple[str, str]]:
    """Return the requests for files of the columns, by method and kind of file."""
    counts: Counter[tuple[str, str]] = Counter()
    for request in proxy.seen:
        path = urlsplit(request.path).path
        if "/_columns/" in path:
            counts[request.method, "overlay" if "/files/" in path else "version"] += 1
    return counts


@pytest.mark.slow
def test_columns_of_a_cache_on_s3_cost_few_requests(
    latentmill: Command, cache: str, bucket: str, proxy: Proxy, tmp_path: Path
) -> None:
    code, out, err = latentmill("annotate", cache, "--from", upload_table(bucket, tmp_path), "--json")
    assert code == 0, err
    assert json.loads(out)["matched"] == 12
    assert count_requests(proxy)["PUT", "overlay"] == 2
    assert count_requests(proxy)["PUT", "version"] == 1
    proxy.seen.clear()
    opened = Cache.open(cache)
    assert count_requests(proxy) == {("GET", "version"): 1}
    proxy.seen.clear()
    file = opened.files()[1]
    keys = [row["key"] for row in opened.rows(file, columns=["key"])]
    for start in (3, 0):
        table = opened.overlays.read(file, None, start, start + 3)
        assert [value[0] for value in table["e"].to_pylist()] == list(map(int, keys[start : start + 3]))
    assert count_requests(proxy) == {("GET", "overlay"): 3}, "the footer, and each of two row groups"
    assert [row["txt"] for row in opened.rows(file)] == [f"new {key}" for key in keys]
    assert latentmill("verify", cache)[0] == 0


@pytest.mark.slow
def test_a_version_whose_answer_is_lost_is_created_once(
    latentmill: Command, cache: str, bucket: str, proxy: Proxy, tmp_path: Path
) -> None:
    """The library sends the request again, and is refused: the version that exists has the same overlays."""
    table = upload_table(bucket, tmp_path)

    def lose_first(request: Request) -> str | None:
        is_version = request.method == "PUT" and urlsplit(request.path).path.endswith("_columns/00001.parquet")
        return "lose" if is_version and not request.number else None

    proxy.rule = lose_first
    code, out, err = latentmill("annotate", cache, "--from", table, "--json")
    assert code == 0, err
    assert json.loads(out)["version"] == 1
    opened = Cache.open(cache)
    assert [version.number for version in opened.overlays.versions] == [1]
    assert read(f"{cache}/_columns/00001.parquet").startswith(b"PAR1")
