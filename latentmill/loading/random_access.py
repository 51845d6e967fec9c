"""Single rows of a cache by their number or their identity: for looking at them, not for training."""

import hashlib
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.cache_files import OpenCache
from latentmill.canonical_json import canonical_json
from latentmill.errors import CacheError
from latentmill.loading.index import Index, read_index
from latentmill.loading.row_groups import IDENTITY, GroupReader, RowGroup
from latentmill.part_files import WEBDATASET_SUFFIX, open_parquet_file, read_rows


class RowAccess:
    """The rows of an open cache. What was read is kept: the index, the last row group, and the keys of files.

    The index is read when it is first needed, and fixes the rows of this object. A copy in another process starts anew.
    """

    def __init__(self) -> None:
        self._index: Index | None = None
        self._last: tuple[int, RowGroup] | None = None
        self._keys: dict[str, pa.Table] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RowAccess, ()

    def index(self, cache: OpenCache) -> Index:
        """Return the row groups of the cache."""
        if self._index is None:
            self._index = read_index(cache)
        return self._index

    def get(self, cache: OpenCache, row: int) -> dict[str, Any]:
        """Return a row as `Cache.__getitem__` does."""
        from latentmill.loading.batch import BatchSettings, check_settings, make_batch

        index = self.index(cache)
        if not -index.row_count <= row < index.row_count:
            raise IndexError(f"the cache {cache.folder.url} has {index.row_count} rows, and no row {row}")
        row %= index.row_count
        rules, group = check_settings(cache, BatchSettings()), int(index.find_groups(row))
        last = self._last
        if last is None or last[0] != group:
            last = self._last = (group, GroupReader(cache, index, rules.columns).read(group))
        batch = make_batch(rules, index, {group: last[1]}, np.array([row]))
        whole = ("epoch", "step", "bucket")
        return {name: value if name in whole else value[0] for name, value in batch.items()}

    def find(self, cache: OpenCache, shard: str, key: str) -> int:
        """Return the number of a row as `Cache.find` does."""
        index = self.index(cache)
        digits = hashlib.sha256(canonical_json([shard, None])).hexdigest()[:16]  # in the name of a whole input's parts
        for position in sorted(range(len(index.files)), key=lambda number: f"-{digits}-" not in index.files[number]):
            table = self._read_keys(cache, index.files[position])
            matches = pc.and_(pc.equal(table["key"], key), pc.equal(table["shard"], shard))
            if (row := pc.index(matches, True).as_py()) >= 0:
                return int(index.starts[np.searchsorted(index.file, position)]) + int(row)
        raise KeyError((shard, key))

    def _read_keys(self, cache: OpenCache, file: str) -> pa.Table:
        """Return the keys and shards of a file. Of a tar, all of it must be read."""
        if file not in self._keys:
            with cache.folder.open(file) as stream:
                if file.endswith(WEBDATASET_SUFFIX):
                    rows = [{name: row[name] for name in IDENTITY} for row in read_rows(stream, file)]
                    self._keys[file] = pa.Table.from_pylist(rows)
                else:
                    self._keys[file] = _read_columns(stream, cache.folder.url_of(file))
        return self._keys[file]


def _read_columns(stream: BinaryIO, url: str) -> pa.Table:
    try:
        parquet = open_parquet_file(stream)
        return parquet.read(columns=list(IDENTITY), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"the keys in {url} cannot be read: the file is damaged") from error
