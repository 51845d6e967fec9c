"""index.parquet: the row groups of all files with rows, so that a reader starts without opening each file.

It is made from what a scan finds about the parts, and no part is read for it. With `--format webdataset`, there is also
`wids-meta.json`, the list of shards that the library wids reads. Both follow from the files alone. Readers must accept
that they are missing or old.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.part_files import PARQUET_RECORD, read_record_json
from pipeline.cache.commit_scan import DATA_PREFIX, PartTable
from pipeline.cache.name_array import CHUNK, iterate_names, sort_names
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import GROUP, make_table
from pipeline.cache.parts import DATA, read_record_bytes
from pipeline.canonical_json import canonical_json
from pipeline.errors import CacheError
from pipeline.records import Container
from pipeline.storage.folder import Folder

NAME = "index.parquet"
WIDS_NAME = "wids-meta.json"
FORMAT = 1
COLUMNS = ("bytes", "rows", "groups")  # of a part, that the index needs
LISTS = ("height", "width", "rows", "start", "stop")  # the columns with one entry per row group
SCHEMA = pa.schema(
    [("file", pa.string()), ("bytes", pa.int64()), *((name, pa.list_(GROUP.field(name).type)) for name in LISTS)]
)


@dataclass(slots=True)
class PartSizes:
    """The sizes and the row groups of the parts so far, in any order."""

    _rows: list[pa.Table] = field(default_factory=list)
    _files: list[np.ndarray] = field(default_factory=list)

    def add(self, table: PartTable) -> None:
        """Add some parts."""
        self._rows.append(table.rows.select(COLUMNS))
        self._files.append(table.files)

    def sort(self, files: np.ndarray) -> pa.Table:
        """Return the rows of the files with rows, one per file, in their order. files: all part files, sorted."""
        if not self._rows:
            return make_table([]).select(COLUMNS)
        numbers, places = np.concatenate(self._files), np.full(len(files), -1)
        places[numbers] = np.arange(len(numbers))
        rows = pa.concat_tables(self._rows).combine_chunks()
        return rows.take(pa.array(places[np.searchsorted(files, DATA_PREFIX) :]))


def write_index(cache: Folder, container: Container, files: np.ndarray, sizes: PartSizes, digest: str) -> None:
    """Write index.parquet and wids-meta.json, unless the existing index is of a cache with the same digest.

    files: all part files, sorted. sizes: of each of them. digest: of the cache. The index is the last file that is
    written. So if it exists with this digest, the other one does too.
    """
    if read_metadata(cache) == make_metadata(digest):
        return
    names, rows = files[np.searchsorted(files, DATA_PREFIX) :], sizes.sort(files)
    if container == "webdataset":
        cache.replace(WIDS_NAME, encode_wids(names, rows))
    cache.replace(NAME, encode_index(names, rows, digest))


def make_metadata(digest: str) -> bytes:
    """Return the metadata of the index of a cache with this digest."""
    return canonical_json({"format": FORMAT, "digest": digest})


def read_metadata(cache: Folder) -> bytes | None:
    """Read the metadata of the index. Returns None if there is no index, or if it has no readable footer."""
    try:
        data = read_record_bytes(cache, NAME)
        return None if data is None else read_record_json(data, NAME)
    except CacheError:
        return None


def encode_index(names: np.ndarray, rows: pa.Table, digest: str) -> bytes:
    """Return the bytes of the index. names: of the files with rows, sorted. rows: the columns COLUMNS of each."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(names), CHUNK):
            some = rows.slice(start, CHUNK).combine_chunks()
            groups = some["groups"].combine_chunks()
            files = [name.removeprefix(f"{DATA}/") for name in iterate_names(names[start : start + CHUNK])]
            lists = [_take_field(groups, name) for name in LISTS]
            writer.write_table(pa.table([pa.array(files, pa.string()), some["bytes"], *lists], schema=SCHEMA))
        writer.add_key_value_metadata({PARQUET_RECORD.decode(): make_metadata(digest).decode()})
    return sink.getvalue()


def _take_field(groups: pa.ListArray, name: str) -> pa.ListArray:
    """Return one field of lists of structs, as lists."""
    offsets = pc.subtract(groups.offsets, groups.offsets[0])
    return pa.ListArray.from_arrays(offsets, pc.struct_field(groups.flatten(), name))


def encode_wids(names: np.ndarray, rows: pa.Table) -> bytes:
    """Return the bytes of wids-meta.json. names: of the files with rows, sorted. rows: the columns COLUMNS of each."""
    sink = io.BytesIO()
    sink.write(b'{"__kind__":"wids-shard-index-v1","name":"latents","shardlist":[')
    for start in range(0, len(names), CHUNK):
        some = rows.slice(start, CHUNK)
        columns = (iterate_names(names[start : start + CHUNK]), some["rows"].to_pylist(), some["bytes"].to_pylist())
        shards = [{"url": url, "nsamples": count, "filesize": size} for url, count, size in zip(*columns, strict=True)]
        sink.write(b",\n" if start else b"\n")
        sink.write(b",\n".join(map(canonical_json, shards)))
    sink.write(b'\n],"wids_version":1}\n')
    return sink.getvalue()


def encode_parts(parts: Sequence[PartSummary], digest: str) -> tuple[bytes, bytes]:
    """Return the bytes of index.parquet and wids-meta.json of a cache with these parts, in any order."""
    with_rows = {part.file: part for part in parts if part.file.startswith(f"{DATA}/")}
    names = sort_names(with_rows)
    rows = make_table([("", with_rows[name]) for name in iterate_names(names)]).select(COLUMNS)
    return encode_index(names, rows, digest), encode_wids(names, rows)
