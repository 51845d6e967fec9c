"""The row groups of a cache: from index.parquet, and from the files that it does not have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill import Cache, CacheError
from latentmill.loading.index import Index, read_index
from tests.latentmill.loading.conftest import BUCKETS, CountingStore, upload

Make = Callable[..., Cache]


def write_index(cache: Cache, index: Index, **changes: Any) -> None:
    """Write index.parquet, as the jobs do."""
    rows = []
    for number, (file, size) in enumerate(zip(index.files, index.sizes.tolist(), strict=True)):
        groups = np.flatnonzero(index.file == number)
        sides = np.array([index.buckets[bucket] for bucket in index.bucket[groups]])
        lists = {"height": sides[:, 0], "width": sides[:, 1]}
        lists |= {name: getattr(index, name)[groups] for name in ("rows", "start", "stop")}
        row = {"file": file.removeprefix("data/"), "bytes": size, **{name: x.tolist() for name, x in lists.items()}}
        rows.append({**row, **changes})
    short, long = pa.list_(pa.int32()), pa.list_(pa.int64())
    kinds = {"file": pa.string(), "bytes": pa.int64(), "height": short, "width": short, "rows": short}
    schema = pa.schema(kinds | {"start": long, "stop": long})
    table = pa.Table.from_pylist(rows, schema.with_metadata({"latentmill": '{"format":1}'}))
    pq.write_table(table, f"{cache.folder.url}/index.parquet", write_page_checksum=True)


def assert_equal(left: Index, right: Index) -> None:
    for name in Index.__dataclass_fields__:
        assert np.array_equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_groups_are_found_without_an_index(make: Make, container: str) -> None:
    cache = make(container=container)
    index = read_index(cache)
    assert index.files == tuple(cache.files())
    assert index.sizes.tolist() == [Path(cache.folder.url, file).stat().st_size for file in index.files]
    assert index.buckets == tuple(sorted(BUCKETS))
    assert index.row_bytes.tolist() == [4 * 8 * 8 * 2, 4 * 8 * 16 * 2, 4 * 16 * 8 * 2]
    assert [int(index.rows[index.bucket == bucket].sum()) for bucket in range(3)] == [BUCKETS[b] for b in index.buckets]
    expected = [(row["height"], row["width"]) for file in cache.files() for row in cache.rows(file)]
    assert np.repeat(index.bucket, index.rows).tolist() == [index.buckets.index(bucket) for bucket in expected]
    assert index.starts.tolist() == [0, *np.cumsum(index.rows)[:-1].tolist()]
    assert index.row_count == 18


def test_the_groups_of_a_parquet_file_are_all_bytes_before_its_footer(make: Make) -> None:
    cache = make()
    index = read_index(cache)
    for number, size in enumerate(index.sizes.tolist()):
        groups = np.flatnonzero(index.file == number)
        assert index.start[groups].tolist() == [4, *index.stop[groups][:-1].tolist()], "after the magic bytes"
        footer = int.from_bytes(Path(cache.folder.url, index.files[number]).read_bytes()[-8:-4], "little")
        assert index.stop[groups[-1]] == size - footer - 8


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_an_index_is_read_by_one_request(make: Make, store: type[CountingStore], container: str) -> None:
    cache = make(container=container)
    asked = read_index(cache)
    write_index(cache, asked)
    remote = upload(cache)
    assert_equal(read_index(remote), asked)
    assert store.requests == [("index.parquet", None, None)]


def test_files_that_the_index_lacks_or_has_otherwise_are_asked(make: Make, store: type[CountingStore]) -> None:
    cache = make()
    asked = read_index(cache)
    first, second = asked.files
    write_index(cache, read_index(cache, [first]))
    remote = upload(cache)
    assert_equal(read_index(remote), asked)
    assert [path for path, _, _ in store.requests] == ["index.parquet", second], "the end of one file, by one request"
    assert store.requests[-1][2] == asked.sizes[1]
    write_index(cache, asked, bytes=5)  # of files that were there before
    assert_equal(read_index(upload(cache)), asked)
    assert sorted(path for path, _, _ in store.requests) == [first, second, "index.parquet"]


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_large_record_takes_two_requests(
    make: Make, store: type[CountingStore], monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    monkeypatch.setattr("latentmill.loading.footers.FIRST_REQUEST", 512)
    cache = make(parts=1, container=container)
    asked = read_index(cache)
    assert_equal(read_index(upload(cache)), asked)
    assert len(store.requests) == 3, "index.parquet, which is not there, and two for the file"


def test_the_fingerprint_follows_from_the_files(make: Make) -> None:
    cache = make()
    whole = read_index(cache)
    write_index(cache, whole)
    assert read_index(cache).fingerprint == whole.fingerprint
    part = read_index(cache, whole.files[:1])
    assert part.fingerprint != whole.fingerprint and part.row_count < whole.row_count
    path = Path(cache.folder.url, whole.files[1])
    path.rename(path.with_name("z.parquet"))
    assert read_index(cache).fingerprint != whole.fingerprint


def test_an_index_of_another_version_is_not_used_and_a_damaged_one_is_named(make: Make) -> None:
    cache = make()
    asked = read_index(cache)
    path = Path(cache.folder.url, "index.parquet")
    write_index(cache, asked)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"latentmill": '{"format":2}'}).drop(["rows"]), path)
    assert_equal(read_index(cache), asked)
    pq.write_table(table.drop(["rows"]), path)
    with pytest.raises(CacheError, match=rf"^{path} cannot be read: remove it, it is made again$"):
        read_index(cache)
    path.write_bytes(b"PAR1")
    with pytest.raises(CacheError, match=rf"^{path} cannot be read"):
        read_index(cache)


def test_files_that_are_missing_or_no_parts_are_named(make: Make) -> None:
    cache = make()
    file, other = cache.files()
    with pytest.raises(CacheError, match=rf"^the cache {cache.folder.url} has no file data/x\.parquet$"):
        read_index(cache, [file, "data/x.parquet"])
    path = Path(cache.folder.url, file)
    data = path.read_bytes()
    for content in (data[:-1], b"", b"PAR1", data[:100] + data[-8:]):
        path.write_bytes(content)
        with pytest.raises(CacheError, match=rf"{path}"):
            read_index(cache)
    path.write_bytes(data)
    table = pq.read_table(path)
    pq.write_table(table, path)  # by another program
    with pytest.raises(CacheError, match=rf"^{path} is damaged: its record does not count its rows$"):
        read_index(cache)
    record = json.loads(pq.read_metadata(Path(cache.folder.url, other)).metadata[b"latentmill"])
    pq.write_table(table.replace_schema_metadata({"latentmill": json.dumps(record)}).slice(1), path)
    with pytest.raises(CacheError, match=rf"^{path} is damaged: its row groups do not have the rows that its record"):
        read_index(cache)


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_the_index_of_a_job_is_that_of_the_files(
    latentmill: Callable[..., tuple[int, str, str]], shards: Path, micro_vae: Path, tmp_path: Path, container: str
) -> None:
    options = (
        "--vae",
        micro_vae,
        "--buckets",
        64,
        "--multiple-of",
        8,
        "--workers",
        0,
        "--format",
        container,
        "--rows-per-part",
        4,
    )
    code, _, err = latentmill("encode", shards, "--to", tmp_path / "c", *options)
    assert code == 0, err
    cache = Cache.open(str(tmp_path / "c"))
    known = read_index(cache)
    (tmp_path / "c/index.parquet").unlink()
    asked = read_index(Cache.open(str(tmp_path / "c")))
    if container == "parquet":  # the record of a tar does not say where its samples lie
        assert_equal(known, asked)
    rows = [row for file in cache.files() for row in cache.rows(file)]
    assert len(rows) == known.row_count == asked.row_count == 18
    assert [cache[number]["key"] for number in range(18)] == [row["key"] for row in rows]
    assert [cache.find(row["shard"], row["key"]) for row in rows] == list(range(18))
