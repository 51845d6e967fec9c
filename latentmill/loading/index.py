"""The row groups of a cache: where they are, their bucket and their rows. From it, an epoch is planned without reading.

A row group is what is read by one request: consecutive rows of one bucket in one file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from latentmill.cache_files import DATA, PART_SUFFIXES, OpenCache
from latentmill.canonical_json import parse_json_object
from latentmill.errors import CacheError
from latentmill.folder import CacheFolder
from latentmill.loading.footers import read_file_groups
from latentmill.loading.layout import LatentLayout
from latentmill.part_files import open_parquet_file

INDEX = "index.parquet"
INDEX_FORMAT = 1
LISTS = ("height", "width", "rows", "start", "stop")  # the columns of index.parquet with one value per group
_READERS = 16  # threads that read the ends of files

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Index:
    """The row groups of a cache. Row r of the cache is row r of the concatenation of its files, sorted by name.

    files: "data/<part>.parquet" or ".tar", sorted. sizes: bytes of each file. buckets: (height, width) in pixels,
    sorted. row_bytes: of each bucket, the bytes of the latents of a row. fingerprint: sha256 over the files, their
    bytes and the rows of their groups; readers with equal ones plan the same epochs.

    Of each group, in the order of the rows: file, bucket: their indexes. rows: their number. start, stop: the first
    byte in the file, and the byte after the last. starts: the number of the first row.
    """

    files: tuple[str, ...]
    sizes: Int64s
    buckets: tuple[tuple[int, int], ...]
    row_bytes: Int64s
    file: Int32s
    bucket: Int32s
    rows: Int64s
    start: Int64s
    stop: Int64s
    fingerprint: str
    starts: Int64s = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum(self.rows) - self.rows)

    @property
    def row_count(self) -> int:
        """The number of rows of the cache."""
        return int(self.rows.sum())

    def find_groups(self, rows: ArrayLike) -> Int64s:
        """Return the number of the group of each row, by the numbers of the rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1


def read_index(cache: OpenCache, files: Sequence[str] | None = None) -> Index:
    """Return the row groups of a cache.

    files: those to read; None: all that the cache has now. What index.parquet has of them is taken from there, if the
    file still has that size. The ends of other files are read, a few at once.
    Raises CacheError, which names the file, if one of them is missing or no part of the cache, and StorageError.
    """
    folder = cache.folder
    listed = folder.list_sizes(DATA)
    sizes = {f"{DATA}/{name}": size for name, size in listed.items() if name.endswith(PART_SUFFIXES[DATA])}
    names = sorted(sizes) if files is None else sorted(files)
    if missing := next((name for name in names if name not in sizes), None):
        raise CacheError(f"the cache {folder.url} has no file {missing}")
    positions = {name: position for position, name in enumerate(names)}
    known = _read_known_groups(folder, sizes, positions)
    others = sorted(set(range(len(names))) - set(np.unique(known[0]).tolist()))
    groups = np.concatenate([known, _ask_files(folder, sizes, names, others)], axis=1)
    groups = groups[:, np.argsort(groups[0], kind="stable")]
    return _make_index(LatentLayout.from_info(cache.info), [(name, sizes[name]) for name in names], groups)


def _make_index(layout: LatentLayout, files: Sequence[tuple[str, int]], groups: Int64s) -> Index:
    """Return the index of groups [6, groups]: the index of the file, and then `LISTS`."""
    file, height, width, rows, start, stop = groups
    buckets, bucket = np.unique(np.stack([height, width]), axis=1, return_inverse=True)
    pairs = [(int(height), int(width)) for height, width in buckets.T]
    digest = hashlib.sha256("".join(f"{name} {size}\n" for name, size in files).encode())
    digest.update(np.ascontiguousarray(groups[:4], "<i8").tobytes())
    return Index(
        files=tuple(name for name, _ in files),
        sizes=np.array([size for _, size in files], np.int64),
        buckets=tuple(pairs),
        row_bytes=np.array([layout.row_bytes(pair) for pair in pairs], np.int64),
        file=file.astype(np.int32),
        bucket=bucket.reshape(-1).astype(np.int32),
        rows=rows,
        start=start,
        stop=stop,
        fingerprint=digest.hexdigest(),
    )


def _read_known_groups(folder: CacheFolder, sizes: Mapping[str, int], positions: Mapping[str, int]) -> Int64s:
    """Return what index.parquet has of these files, as `_make_index` takes it. sizes: the bytes that they have now."""
    data = folder.read_if_exists(INDEX)
    if data is None:
        return np.zeros((6, 0), np.int64)
    try:
        table = open_parquet_file(pa.BufferReader(data)).read(use_threads=False)
        header = (table.schema.metadata or {}).get(b"latentmill", b"")
        if parse_json_object(header, folder.url_of(INDEX)).get("format") != INDEX_FORMAT:
            return np.zeros((6, 0), np.int64)  # of another version
        files, recorded = table["file"].to_pylist(), table["bytes"].to_pylist()
        full = [f"{DATA}/{name}" for name in files]
        kept = [name in positions and sizes[name] == size for name, size in zip(full, recorded, strict=True)]
        table = table.filter(pa.array(kept, pa.bool_())).combine_chunks()
        position = np.array([positions[name] for name, keep in zip(full, kept, strict=True) if keep], np.int64)
        values = [pc.list_flatten(table[name]).to_numpy() for name in LISTS]
        owner = pc.list_parent_indices(table["rows"]).to_numpy()
        return np.stack([position[owner], *values]).astype(np.int64)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise CacheError(f"{folder.url_of(INDEX)} cannot be read: remove it, it is made again") from error


def _ask_files(folder: CacheFolder, sizes: Mapping[str, int], names: Sequence[str], positions: Sequence[int]) -> Int64s:
    """Return the groups of these files from the files themselves, as `_make_index` takes them."""
    if not positions:
        return np.zeros((6, 0), np.int64)
    with ThreadPoolExecutor(min(_READERS, len(positions))) as pool:
        found = list(
            pool.map(lambda position: read_file_groups(folder, names[position], sizes[names[position]]), positions)
        )
    owner = np.repeat(positions, [len(groups.rows) for groups in found])
    buckets = np.array([bucket for groups in found for bucket in groups.buckets], np.int64).reshape(-1, 2)
    others = [
        list(chain.from_iterable(getattr(groups, name) for groups in found)) for name in ("rows", "start", "stop")
    ]
    return np.stack([owner, buckets[:, 0], buckets[:, 1], *others]).astype(np.int64)
