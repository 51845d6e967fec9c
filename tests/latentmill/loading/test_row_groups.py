"""Row groups by one request: equal to the rows that `Cache.rows` gives, and every damage is named."""

import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentmill import Cache, CacheError, StorageError
from latentmill.folder import CacheFolder
from latentmill.loading import parquet_pages
from latentmill.loading.index import read_index
from latentmill.loading.parquet_pages import PageError, find_values
from latentmill.loading.row_groups import GEOMETRY, GroupReader, RowGroup
from tests.latentmill.loading.conftest import CountingStore, upload

Make = Callable[..., Cache]
FORMS = [
    {"container": container, "store": store, "dtype": dtype, "flip": flip}
    for container, store, dtype, flip in product(
        ("parquet", "webdataset"), ("mode", "moments"), ("float16", "bfloat16", "float32"), ("random", "both")
    )
    if (container, dtype) != ("webdataset", "bfloat16")  # numpy has no such type
]


def read_all(cache: Cache, **options: Any) -> Iterator[RowGroup]:
    index = read_index(cache)
    reader = GroupReader(cache, index, ["txt"], **options)
    for group in range(len(index.rows)):
        yield reader.read(group)


def take(group: RowGroup, row: int, array: int, size: int) -> bytes:
    start = int(group.offsets[array, row])
    return bytes(group.data[start : start + size])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_groups_have_the_rows_of_the_cache(make: Make, form: dict[str, str]) -> None:
    cache = make(**form)
    rows = (row for file in cache.files() for row in cache.rows(file))
    count = 0
    for group in read_all(cache):
        for number in range(len(group.geometry)):
            row = next(rows)
            latents = [row[name] for name in ("latent", "latent_flipped") if name in row]
            assert [take(group, number, array, len(x)) for array, x in enumerate(latents)] == latents
            assert len(group.offsets) == len(latents) == (2 if form["flip"] == "both" else 1)
            assert group.bucket == (row["height"], row["width"])
            assert group.geometry[number].tolist() == [row[name] for name in GEOMETRY]
            assert {name: values[number] for name, values in group.columns.items()} == {
                name: row[name] for name in ("key", "shard", "txt")
            }
            count += 1
    assert count == 18 and next(rows, None) is None


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_group_is_one_request(make: Make, store: type[CountingStore], container: str) -> None:
    cache = upload(make(container=container))
    index = read_index(cache)
    reader = GroupReader(cache, index)
    store.requests.clear()
    order = np.random.default_rng(0).permutation(len(index.rows)).tolist()
    for group in order:
        reader.read(group)
    ranges = [request for request in store.requests if request[2] != index.sizes[index.files.index(request[0])]]
    if container == "parquet":  # and one for the footer of each file
        assert len(store.requests) == len(order) + 2
        assert ranges == [(index.files[index.file[g]], index.start[g], index.stop[g]) for g in order]
    else:
        assert len(store.requests) == len(order)
    store.requests.clear()
    list(map(reader.read, order))
    assert len(store.requests) == len(order), "footers are kept"


def test_a_failed_request_is_repeated_unless_the_file_is_missing(make: Make, store: type[CountingStore]) -> None:
    cache = upload(make(parts=1))
    index = read_index(cache)
    reader = GroupReader(cache, index)
    reader.read(0)
    store.requests.clear()
    store.faults[:] = [TimeoutError("slow"), 10]  # an error, and then 10 bytes only
    reader.read(0)
    assert len(store.requests) == 3
    url = f"{cache.folder.url}/{index.files[0]}"
    store.faults[:] = [OSError("busy")] * 3
    with pytest.raises(StorageError, match=rf"^cannot read {url}: OSError \(busy\)$"):
        reader.read(0)
    store.faults[:] = [10, 20, 30]
    start, stop = index.start[0], index.stop[0]
    with pytest.raises(StorageError, match=rf"^{url} has 30 bytes from byte {start} to {stop}: the transfer was cut"):
        reader.read(0)
    for error, reason in ((FileNotFoundError(), "no such file"), (PermissionError(13, "no"), "permission denied")):
        store.requests.clear()
        store.faults[:] = [error]
        with pytest.raises(StorageError, match=rf"^cannot read {url}: {reason}"):
            reader.read(0)
        assert len(store.requests) == 1


def test_a_local_file_that_is_missing_or_short_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmill.folder.RETRY_SECONDS", (0.0,))
    cache = make()
    reader = GroupReader(cache, read_index(cache))
    reader.read(0)
    path = Path(cache.folder.url, cache.files()[0])
    data = path.read_bytes()
    path.write_bytes(data[:500])
    with pytest.raises(StorageError, match=rf"^{path} has 496 bytes from byte 4 to \d+: the transfer was cut short"):
        reader.read(0)
    path.unlink()
    with pytest.raises(StorageError, match=rf"^cannot read {path}: no such file or directory$"):
        reader.read(0)


def test_any_range_of_a_local_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmill.folder.RETRY_SECONDS", ())
    content = np.random.default_rng(0).bytes(20_000)
    (tmp_path / "x").write_bytes(content)
    folder = CacheFolder(str(tmp_path))
    for start, stop in ((0, 20_000), (0, 1), (4095, 4097), (4096, 8192), (12_345, 19_999), (19_999, 20_000), (7, 7)):
        assert folder.read_range("x", start, stop) == content[start:stop]
    for start, stop, count in ((19_000, 20_001, 1000), (20_000, 20_001, 0), (50_000, 60_000, 0)):
        with pytest.raises(StorageError, match=rf"^{tmp_path}/x has {count} bytes from byte {start} to {stop}: "):
            folder.read_range("x", start, stop)


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("column", ["latent", "latent_flipped", "txt"])
def test_a_damaged_page_is_named(make: Make, column: str) -> None:
    cache = make(flip="both")
    path = Path(cache.folder.url, cache.files()[1])
    chunks = pq.read_metadata(path).row_group(1)
    chunk = next(c for c in map(chunks.column, range(chunks.num_columns)) if c.path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    flip_bit(path, start + chunk.total_compressed_size - 3)
    reason = "could not verify page integrity, CRC" if column == "txt" else "a page does not have its checksum"
    with pytest.raises(CacheError, match=rf"^row group 1 of {path} is damaged: in the column {column}, {reason}"):
        list(read_all(cache))
    if column != "txt":
        assert len(list(read_all(cache, checksums=False))) == 5


def test_a_file_that_is_not_the_one_in_the_index_is_named(make: Make) -> None:
    cache = make()
    index = read_index(cache)
    rows = index.rows.copy()
    rows[1] += 1
    path = Path(cache.folder.url, index.files[0])
    with pytest.raises(
        CacheError, match=rf"^row group 1 of {path} is damaged: the file does not have the {rows[1]} rows"
    ):
        GroupReader(cache, replace(index, rows=rows)).read(1)


def write_chunk(values: list[bytes | None], tmp_path: Path, **options: Any) -> memoryview:
    """Return the bytes of a column chunk with these values, as another program may write it."""
    path = tmp_path / "x.parquet"
    table = pa.table({"latent": pa.array(values, pa.binary())})
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(table, path, **{**settings, **options})
    chunk = pq.read_metadata(path).row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return memoryview(path.read_bytes())[start : start + chunk.total_compressed_size]


def test_values_are_found_in_all_pages_of_a_chunk(tmp_path: Path) -> None:
    values = [bytes([number]) * 40 for number in range(50)]
    for options in ({}, {"data_page_size": 100, "write_batch_size": 3}):
        chunk = write_chunk(values, tmp_path, **options)
        starts = find_values(chunk, 50, 40, checksums=True)
        assert [bytes(chunk[start : start + 40]) for start in starts.tolist()] == values


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        ([b"12", b"123456", b"1234"], {}, "a value has 2 bytes, not 4"),
        ([b"1234", b"12345"], {}, "2 values of 4 bytes do not have the size of their page"),
        ([b"1234", None], {}, "2 values of 4 bytes do not have the size of their page"),
        ([b"1234", b"1234", None], {}, "3 values of 4 bytes do not have the size of their page"),
        ([b"1234"], {}, "it has 1 values, not 2"),
        ([b"1234"] * 2, {"compression": "zstd"}, "a page is not PLAIN and without compression"),
        ([b"1234"] * 2, {"use_dictionary": True}, "the header of a page cannot be read"),
        ([b"1234"] * 2, {"data_page_version": "2.0"}, "the header of a page cannot be read"),
        ([b"1234"] * 2, {"write_page_checksum": False}, "a page does not have its checksum"),
    ],
)
def test_chunks_that_are_not_of_latents_are_refused(
    tmp_path: Path, values: list[bytes | None], options: dict[str, Any], reason: str
) -> None:
    chunk = write_chunk(values, tmp_path, **options)
    with pytest.raises(PageError, match=f"^{reason}"):
        find_values(chunk, len(values) if "not 2" not in reason else 2, 4, checksums=True)


def test_no_damage_of_a_chunk_gives_other_values_or_another_error(tmp_path: Path) -> None:
    """Few bits do not matter: those of fields that say nothing about PLAIN values."""
    chunk = write_chunk([b"1234"] * 3, tmp_path)
    starts, found = find_values(chunk, 3, 4, checksums=True).tolist(), 0
    for position in range(len(chunk) * 8):
        data = bytearray(chunk)
        data[position // 8] ^= 1 << position % 8
        try:
            assert find_values(memoryview(data), 3, 4, checksums=True).tolist() == starts
        except PageError:
            found += 1
    assert found > 0.8 * len(chunk) * 8
    for size in range(len(chunk)):
        with pytest.raises(PageError):
            find_values(chunk[:size], 3, 4, checksums=True)


def test_a_damaged_tar_is_named(make: Make) -> None:
    cache = make(container="webdataset", parts=1, buckets={(64, 64): 3})
    path = Path(cache.folder.url, cache.files()[0])
    data = path.read_bytes()
    index = read_index(cache)
    array, text = data.index(b".latent.npy"), data.index(b".latent.json")
    header = array // 512 * 512
    for position, reason in (
        (array, "a header does not have its checksum"),
        (header + 125, "a header does not have its checksum"),
        (header + 512, "an array has the header"),
        (data.index(b"(4, 8, 8)") + 1, r"an array has the header .*\(5, 8, 8\).*, not .*\(4, 8, 8\)"),
        (text // 512 * 512 + 512, "000000000.latent.json is not a JSON object"),
    ):
        path.write_bytes(data)
        flip_bit(path, position)
        with pytest.raises(CacheError, match=rf"^row group 0 of {re.escape(str(path))} is damaged: ({reason})"):
            GroupReader(cache, index).read(0)
    path.write_bytes(data)
    for stop, reason in (
        (header + 600, "a member is cut short"),
        (text // 512 * 512, "it has 0 samples of 64x64, not 3"),
    ):
        with pytest.raises(CacheError, match=reason):
            GroupReader(cache, replace(index, stop=np.array([stop]))).read(0)
    with pytest.raises(CacheError, match=r"it begins with the member 000000000\.latent\.json"):
        GroupReader(cache, replace(index, start=np.array([text // 512 * 512]))).read(0)


def test_without_isal_the_crc_is_that_of_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    assert parquet_pages.crc32(memoryview(data)) == zlib.crc32(data)
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    spec = importlib.util.spec_from_file_location("parquet_pages_without_isal", parquet_pages.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.crc32 is zlib.crc32
