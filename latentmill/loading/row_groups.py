"""Read a row group of a cache by one request, without a Python object for each latent."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from latentmill.arrow_values import to_python
from latentmill.cache_files import OpenCache
from latentmill.error_text import first_line
from latentmill.errors import CacheError
from latentmill.group_spans import find_start
from latentmill.loading.footers import read_footer
from latentmill.loading.index import Index
from latentmill.loading.layout import LatentLayout
from latentmill.loading.parquet_pages import PageError, find_values
from latentmill.loading.tar_members import Sample, TarError, iterate_samples, make_npy_finder
from latentmill.overlay_files import to_rows
from latentmill.part_files import WEBDATASET_SUFFIX, open_parquet_file

GEOMETRY = ("original_height", "original_width", "resized_height", "resized_width", "crop_top", "crop_left", "flipped")
IDENTITY = ("key", "shard")
_FOOTERS = 256  # that are kept; each has about 100 kB in memory


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """The rows of a group in memory: N rows of one bucket.

    bucket: height and width of the images in pixels. data: the bytes of the latents. offsets: where in `data` the
    values of each array begin, [K, N]; K is 2 with `latent_flipped`, otherwise 1. geometry: the columns GEOMETRY,
    [N, 7]. columns: the values of all other columns that were read, by their name; always `key` and `shard`.
    """

    bucket: tuple[int, int]
    data: memoryview
    offsets: NDArray[np.int64]
    geometry: NDArray[np.int64]
    columns: Mapping[str, Sequence[Any]]


class GroupReader:
    """Reads row groups. It can be used by several threads; make it in the process that uses it.

    columns: the names of further columns to read (`BatchRules.columns`). checksums: verify the CRC of Parquet pages.
    """

    def __init__(self, cache: OpenCache, index: Index, columns: Collection[str] = (), checksums: bool = True) -> None:
        self._folder, self._index, self._checksums = cache.folder, index, checksums
        self._layout = LatentLayout.from_info(cache.info)
        self._overlays = cache.overlays
        self._later = [name for name in self._overlays.schema.names if name in columns]
        own = (name for name in columns if name not in (*IDENTITY, *self._later))
        self._columns = (*IDENTITY, *own)
        self._texts = {name for name in cache.info.columns.texts if name in self._columns}
        self._binary = cache.info.columns.binary
        self._open_file = lru_cache(_FOOTERS)(self._read_footer)

    def read(self, group: int) -> RowGroup:
        """Return the rows of a group, by one request; for the first group of a Parquet file, its footer by another.

        Added columns take a request of their own, and for the first group of a file one for their footer.

        Raises StorageError if the storage fails repeatedly, and CacheError, which names the file, the group and the
        column, if the bytes are not those of the index.
        """
        index = self._index
        number = int(index.file[group])
        file, local = index.files[number], group - int(np.searchsorted(index.file, number))
        try:
            is_tar = file.endswith(WEBDATASET_SUFFIX)
            read = self._read_tar(group, file) if is_tar else self._read_parquet(group, local, number)
        except (PageError, TarError) as error:
            raise CacheError(f"row group {local} of {self._folder.url_of(file)} is damaged: {error}") from error
        return self._add_overlays(read, file, group, local) if self._later else read

    def _add_overlays(self, read: RowGroup, file: str, group: int, local: int) -> RowGroup:
        """Return a row group with the added columns."""
        start = int(self._index.rows[group - local : group].sum())
        table = self._overlays.read(file, self._later, start, start + int(self._index.rows[group]))
        later = {name: to_rows(table[name]) for name in self._later}
        return replace(read, columns={**read.columns, **later})

    def _fetch(self, group: int) -> memoryview:
        index = self._index
        return self._folder.read_range(index.files[index.file[group]], int(index.start[group]), int(index.stop[group]))

    def _read_footer(self, number: int) -> tuple[pq.FileMetaData, Mapping[str, int]]:
        """Return the footer of a file, and the number of each column chunk by its column. number: of the file."""
        footer = read_footer(self._folder, self._index.files[number], int(self._index.sizes[number]))
        chunks = [footer.row_group(0).column(position).path_in_schema for position in range(footer.num_columns)]
        return footer, {path: position for position, path in enumerate(chunks)}

    def _read_parquet(self, group: int, local: int, number: int) -> RowGroup:
        index = self._index
        (footer, chunks), data = self._open_file(number), self._fetch(group)
        rows, start = int(index.rows[group]), int(index.start[group])
        if local >= footer.num_row_groups or footer.row_group(local).num_rows != rows:
            raise PageError(f"the file does not have the {rows} rows that the index says")
        bucket = index.buckets[index.bucket[group]]
        offsets = []
        for name in self._layout.names:
            chunk = footer.row_group(local).column(chunks[name])
            first = find_start(chunk) - start
            try:
                values = find_values(
                    data[first : first + chunk.total_compressed_size],
                    rows,
                    self._layout.array_bytes(bucket),
                    self._checksums,
                )
            except PageError as error:
                raise PageError(f"in the column {name}, {error}") from error
            offsets.append(first + values)
        table = self._read_table(footer, local, _Range(data, start))
        geometry = [table[name].to_numpy() for name in GEOMETRY]
        columns = {name: to_python(table[name]) for name in self._columns}
        return RowGroup(bucket, data, np.stack(offsets), np.stack(geometry, 1).astype(np.int64), columns)

    def _read_table(self, footer: pq.FileMetaData, local: int, source: "_Range") -> pa.Table:
        """Return the columns of a group but for its latents."""
        names = list(dict.fromkeys([*self._columns, *GEOMETRY]))
        try:
            return self._read_columns(footer, local, source, names)
        except (pa.ArrowException, OSError) as error:
            for name in names:  # Arrow does not say which one it is
                try:
                    self._read_columns(footer, local, source, [name])
                except (pa.ArrowException, OSError):
                    raise PageError(f"in the column {name}, {first_line(error)}") from error
            raise PageError(first_line(error)) from error

    def _read_columns(self, footer: pq.FileMetaData, local: int, source: "_Range", names: list[str]) -> pa.Table:
        file = open_parquet_file(pa.PythonFile(source, mode="r"), footer, self._checksums)
        return file.read_row_group(local, columns=names, use_threads=False)

    def _read_tar(self, group: int, file: str) -> RowGroup:
        index = self._index
        data, bucket = self._fetch(group), index.buckets[index.bucket[group]]
        samples = [
            sample
            for sample in iterate_samples(data, self._texts, self._binary)
            if (sample.values.get("height"), sample.values.get("width")) == bucket
        ]
        if len(samples) != index.rows[group]:
            raise TarError(f"it has {len(samples)} samples of {bucket[0]}x{bucket[1]}, not {index.rows[group]}")
        try:
            geometry = [[sample.values[name] for name in GEOMETRY] for sample in samples]
            columns = {name: [sample.values[name] for sample in samples] for name in self._columns}
        except KeyError as error:
            raise TarError(f"a sample lacks {error}") from error
        return RowGroup(bucket, data, self._find_arrays(data, samples, bucket), np.array(geometry, np.int64), columns)

    def _find_arrays(self, data: memoryview, samples: Sequence[Sample], bucket: tuple[int, int]) -> NDArray[np.int64]:
        find, count = make_npy_finder(self._layout.shape(bucket), self._layout.dtype), len(self._layout.names)
        if any(len(sample.arrays) != count for sample in samples):
            raise TarError(f"a sample does not have {count} arrays")
        starts = [[start + find(data[start:stop]) for start, stop in sample.arrays] for sample in samples]
        return np.array(starts, np.int64).T


class _Range:
    """A file of which only a range is in memory, for Arrow to read. start: where the range begins in the file."""

    closed = False

    def __init__(self, data: memoryview, start: int) -> None:
        self._data, self._start, self._position = data, start, 0

    def read(self, size: int) -> memoryview:
        """Return the next bytes, without a copy."""
        first = self._position - self._start
        if first < 0 or first + size > len(self._data):
            raise OSError("a column lies outside its row group")
        self._position += size
        return self._data[first : first + size]

    def seek(self, position: int, whence: int = 0) -> int:
        """Go to a position in the file. Only positions from its start or to the end of the range are possible."""
        self._position = position if whence == 0 else self._start + len(self._data)
        return self._position

    def tell(self) -> int:
        """Return the position in the file."""
        return self._position

    def close(self) -> None:
        """Nothing is open."""
