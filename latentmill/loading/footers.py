"""The facts about a part that its own file has at one end: a Parquet footer, or the record of a tar."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.errors import CacheError
from latentmill.folder import CacheFolder
from latentmill.group_spans import find_span
from latentmill.part_files import (
    PARQUET_RECORD,
    PARQUET_SUFFIX,
    WEBDATASET_SUFFIX,
    count_record_bytes,
    read_record_json,
)

FIRST_REQUEST = 64 << 10  # bytes at the end of a Parquet file, or at the start of a tar, that have most records


@dataclass(frozen=True, slots=True)
class FileGroups:
    """The row groups of a file, in order: the bucket (height, width) of each, its rows and its bytes [start, stop)."""

    buckets: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]


def read_file_groups(folder: CacheFolder, file: str, size: int) -> FileGroups:
    """Return the row groups of a part from its own file. size: its bytes.

    The record of a tar does not say where its samples lie. So each bucket is one group, and its bytes are those of the
    whole file. Raises CacheError if the file is no part of a cache, and StorageError.
    """
    if file.endswith(PARQUET_SUFFIX):
        metadata = read_footer(folder, file, size)
        return _locate_parquet_groups(folder.url_of(file), metadata)
    if not file.endswith(WEBDATASET_SUFFIX):
        raise CacheError(f"{folder.url_of(file)} is not a part of a latentmill cache")
    counts = _count_rows(folder.url_of(file), _read_end(folder, file, size))
    return FileGroups(tuple(counts), tuple(counts.values()), (0,) * len(counts), (size,) * len(counts))


def read_footer(folder: CacheFolder, file: str, size: int) -> pq.FileMetaData:
    """Return the footer of a Parquet part, by one request if it is not large. size: the bytes of the file."""
    try:
        return pq.read_metadata(pa.BufferReader(_read_end(folder, file, size)))
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"the footer of {folder.url_of(file)} cannot be read: the file is damaged") from error


def _read_end(folder: CacheFolder, file: str, size: int) -> memoryview:
    """Return the end of a part that has its record."""
    is_parquet, count = file.endswith(PARQUET_SUFFIX), min(size, FIRST_REQUEST)

    def read(count: int) -> memoryview:
        return folder.read_range(file, size - count if is_parquet else 0, size if is_parquet else count)

    data = read(count)
    needed = count_record_bytes(bytes(data[-512:] if is_parquet else data[:512]), file)
    if not needed or (is_parquet and needed > size):
        raise CacheError(f"{folder.url_of(file)} is not a part of a latentmill cache: it has no readable record")
    return data if needed <= count else read(min(needed, size))


def _count_rows(url: str, end: memoryview) -> dict[tuple[int, int], int]:
    """Return the rows of each bucket (height, width), sorted by bucket as in the file. end: of the file, its record."""
    return _parse_tally(url, read_record_json(bytes(end), url))


def _parse_tally(url: str, record: bytes) -> dict[tuple[int, int], int]:
    try:
        tally: dict[str, Any] = json.loads(record)["tally"]
        counts = {tuple(map(int, name.split("x"))): int(bucket["samples"]) for name, bucket in tally.items()}
        return {(height, width): counts[height, width] for height, width in sorted(counts)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{url} is damaged: its record does not count its rows") from error


def _locate_parquet_groups(url: str, metadata: pq.FileMetaData) -> FileGroups:
    """Return the groups of a footer. Rows are sorted by bucket, and a group has one, so counts tell which."""
    counts = _parse_tally(url, (metadata.metadata or {}).get(PARQUET_RECORD, b""))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    ends, group_ends = np.cumsum(list(counts.values())), np.cumsum(rows)
    if not set(ends.tolist()) <= set(group_ends.tolist()) or sum(rows) != sum(counts.values()):
        raise CacheError(f"{url} is damaged: its row groups do not have the rows that its record counts")
    names = list(counts)
    spans = [find_span(group) for group in groups]
    return FileGroups(
        tuple(names[int(np.searchsorted(ends, end))] for end in group_ends),
        tuple(rows),
        tuple(start for start, _ in spans),
        tuple(stop for _, stop in spans),
    )
