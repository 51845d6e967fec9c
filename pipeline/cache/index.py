"""index.parquet: the row groups of all files with rows, so that a reader starts without opening each file.

It is made from what a scan finds about the parts, and no part is read for it. With `--format webdataset`, there is also
`wids-meta.json`, the list of shards that the library wids reads. Both follow from the files alone. Readers must accept
that they are missing or old.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.loading.index import INDEX, INDEX_FORMAT, LISTS
from latentmill.part_files import PARQUET_RECORD, read_record_json
from pipeline.cache.commit_scan import DATA_PREFIX, PartTable
from pipeline.cache.name_array import CHUNK, find_names, iterate_names, sort_names
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import GROUP, make_table
from pipeline.cache.parts import DATA, read_record_bytes
from pipeline.canonical_json import canonical_json
from pipeline.errors import CacheError
from pipeline.records import Container
from pipeline.storage.folder import Folder

NAME = INDEX
WIDS_NAME = "wids-meta.json"
COLUMNS = ("bytes", "groups")  # of a part, that the index needs
SCHEMA = pa.schema(
    [("file", pa.string()), ("bytes", pa.int64()), *((name, pa.list_(GROUP.field(name).type)) for name in LISTS)]
)


@dataclass(slots=True)
class PartSizes:
    """The sizes and the row groups of the parts so far, in any order. A part of one group takes 60 bytes of memory."""

    _rows: list[pa.Table] = field(default_factory=list)
    _files: list[np.ndarray] = field(default_factory=list)

    def add(self, table: PartTable) -> None:
        """Add some parts."""
        self._rows.append(table.rows.select(COLUMNS))
        self._files.append(table.files.astype(np.int32))

    def take_sorted(self, files: np.ndarray) -> Iterator[tuple[list[str], pa.Table]]:
        """Yield the files with rows, and the columns COLUMNS of each, in their order, piece by piece.

        files: all part files, sorted. Afterwards there are no parts any more.
        """
        numbers, places = np.concatenate([np.zeros(0, np.int32), *self._files]), np.full(len(files), -1, np.int32)
        places[numbers] = np.arange(len(numbers))
        rows = pa.concat_tables([make_table([]).select(COLUMNS), *self._rows]).combine_chunks()
        self._rows.clear()
        self._files.clear()
        for start in range(int(np.searchsorted(files, DATA_PREFIX)), len(files), CHUNK):
            piece = slice(start, start + CHUNK)
            yield list(iterate_names(files[piece])), rows.take(pa.array(places[piece])).combine_chunks()


def write_index(cache: Folder, container: Container, files: np.ndarray, sizes: PartSizes, digest: str) -> None:
    """Write index.parquet and wids-meta.json, unless the existing index is of a cache with the same digest.

    files: all part files, sorted. sizes: of each of them. digest: of the cache. The index is the last file that is
    written. So if it exists with this digest, the other one does too.
    """
    if read_metadata(cache) == make_metadata(digest):
        return
    index, shards = IndexWriter(digest), ShardList()
    for names, rows in sizes.take_sorted(files):
        index.add(names, rows)
        if container == "webdataset":
            shards.add(names, rows)
    if container == "webdataset":
        cache.replace(WIDS_NAME, shards.finish())
    cache.replace(NAME, index.finish())


def make_metadata(digest: str) -> bytes:
    """Return the metadata of the index of a cache with this digest."""
    return canonical_json({"format": INDEX_FORMAT, "digest": digest})


def read_metadata(cache: Folder) -> bytes | None:
    """Read the metadata of the index. Returns None if there is no index, or if it has no readable footer."""
    try:
        data = read_record_bytes(cache, NAME)
        return None if data is None else read_record_json(data, NAME)
    except CacheError:
        return None


class IndexWriter:
    """The bytes of index.parquet, written piece by piece. digest: of the cache."""

    def __init__(self, digest: str) -> None:
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, SCHEMA, compression="zstd", write_page_checksum=True)
        self._writer.add_key_value_metadata({PARQUET_RECORD.decode(): make_metadata(digest).decode()})

    def add(self, names: Sequence[str], rows: pa.Table) -> None:
        """Add files, with the columns COLUMNS of each."""
        groups = rows["groups"].combine_chunks()
        files = pa.array([name.removeprefix(f"{DATA}/") for name in names], pa.string())
        lists = [pa.ListArray.from_arrays(groups.offsets, groups.values.field(name)) for name in LISTS]
        self._writer.write_table(pa.table([files, rows["bytes"], *lists], schema=SCHEMA))

    def finish(self) -> bytes:
        """Return the bytes."""
        self._writer.close()
        return self._sink.getvalue()


class ShardList:
    """The bytes of wids-meta.json, written piece by piece. It is JSON with a line for each shard."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        self._separator = b"\n"
        self._sink.write(b'{"__kind__":"wids-shard-index-v1","name":"latents","shardlist":[')

    def add(self, names: Sequence[str], rows: pa.Table) -> None:
        """Add files, with the columns COLUMNS of each."""
        for url, size, groups in zip(names, rows["bytes"].to_pylist(), rows["groups"].to_pylist(), strict=True):
            count = sum(group["rows"] for group in groups)
            self._sink.write(self._separator)
            self._sink.write(canonical_json({"url": url, "nsamples": count, "filesize": size}))
            self._separator = b",\n"

    def finish(self) -> bytes:
        """Return the bytes."""
        self._sink.write(b'\n],"wids_version":1}\n')
        return self._sink.getvalue()


def encode_parts(parts: Sequence[PartSummary], digest: str) -> tuple[bytes, bytes]:
    """Return the bytes of index.parquet and wids-meta.json of a cache with these parts, in any order."""
    index, shards, sizes = IndexWriter(digest), ShardList(), PartSizes()
    files = sort_names(part.file for part in parts)
    sizes.add(PartTable(make_table([("", part) for part in parts]), find_names(files, [part.file for part in parts])))
    for names, rows in sizes.take_sorted(files):
        index.add(names, rows)
        shards.add(names, rows)
    return index.finish(), shards.finish()
