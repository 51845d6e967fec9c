"""The row groups of a part file: the bucket, the rows and the bytes of each.

A group has rows of one bucket, up to GROUP_BYTES of latents, and up to GROUP_BYTES of other columns. In a Parquet file,
it is a row group, and its bytes are those of all its columns. In a tar, it is a run of whole samples, and its bytes are
those of their members with the headers. So one ranged read of these bytes, by `tarfile`'s mode `r|`, gives the samples.
"""

import json
import tarfile
from collections.abc import Iterable
from typing import IO, BinaryIO, NamedTuple, Protocol, cast

import pyarrow.parquet as pq

from latentmill.part_files import FLIPPED_MEMBERS, LATENT_MEMBERS, SAMPLE_JSON

GROUP_BYTES = 32 << 20
BLOCK = 512  # the size of a member of a tar is rounded up to whole blocks
_NPY_PREFIX = 10  # bytes of an .npy file, of version 1.0, before its header; the last two are the header's length


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes: ...


class GroupSpan(NamedTuple):
    """A row group of a file.

    start, stop: its first byte, and the byte after its last one. height, width: of the encoded images, in pixels.
    """

    rows: int
    start: int
    stop: int
    height: int
    width: int


class GroupLimit:
    """Decides row by row where a group ends."""

    def __init__(self) -> None:
        self._bucket: tuple[int, int] | None = None
        self._latents = self._others = 0

    def starts_group(self, bucket: tuple[int, int], latents: int, others: int) -> bool:
        """Add a row, and return whether it is the first one of a group.

        latents, others: the bytes of its latents, and of its other columns.
        """
        is_full = self._latents + latents > GROUP_BYTES or self._others + others > GROUP_BYTES
        is_first = bucket != self._bucket or is_full
        if is_first:
            self._bucket, self._latents, self._others = bucket, 0, 0
        self._latents, self._others = self._latents + latents, self._others + others
        return is_first


class SampleSpan(NamedTuple):
    """A sample of a tar. latents: bytes of the values of its latents. others: bytes of its other members."""

    start: int
    stop: int
    bucket: tuple[int, int]
    latents: int
    others: int


def group_samples(samples: Iterable[SampleSpan]) -> list[GroupSpan]:
    """Return the groups of these samples, which must follow one another in a tar."""
    groups, limit = list[GroupSpan](), GroupLimit()
    for start, stop, bucket, latents, others in samples:
        if limit.starts_group(bucket, latents, others):
            groups.append(GroupSpan(1, start, stop, *bucket))
        else:
            groups[-1] = groups[-1]._replace(rows=groups[-1].rows + 1, stop=stop)
    return groups


def list_parquet_groups(metadata: pq.FileMetaData) -> list[GroupSpan]:
    """Return the row groups of a Parquet part. Their bucket is in the statistics of the columns `height` and `width`.

    Raises ValueError if these are missing, or if a row group has several buckets.
    """
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        sides = {chunk.path_in_schema: chunk.statistics for chunk in chunks}
        height, width = (_get_only_value(sides.get(name)) for name in ("height", "width"))
        groups.append(GroupSpan(group.num_rows, *find_span(group), height, width))
    return groups


def find_span(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Return the first byte of a row group in its file, and the byte after its last: of all its column chunks."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    starts = [find_start(chunk) for chunk in chunks]
    return min(starts), max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True))


def find_start(chunk: pq.ColumnChunkMetaData) -> int:
    """Return the first byte of a column chunk in its file."""
    return int(chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset)


def _get_only_value(statistics: pq.Statistics | None) -> int:
    """Return the value of a column that is equal in all rows of a row group. Raises ValueError if it is unknown."""
    if statistics is None or not statistics.has_min_max or statistics.min != statistics.max:
        raise ValueError("a row group has several buckets, or does not name its bucket")
    return int(statistics.min)


def list_tar_groups(stream: Readable) -> list[GroupSpan]:
    """Return the groups of a WebDataset part. stream: at the start of the tar. It is read once, from start to end.

    Raises tarfile.TarError, OSError, ValueError, LookupError or TypeError if the tar is damaged.
    """
    samples = list[SampleSpan]()
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as tar:  # nothing but `read` is called
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                raise ValueError(f"{member.name} is not a file")
            if member.name.endswith(LATENT_MEMBERS):
                samples.append(SampleSpan(member.offset, 0, (0, 0), 0, 0))
            start, _, bucket, latents, others = samples[-1]
            if member.name.endswith(LATENT_MEMBERS + FLIPPED_MEMBERS):
                latents += _count_values(file, member.size)
            else:
                others += member.size
            if member.name.endswith(SAMPLE_JSON):
                row = json.load(file)
                bucket = int(row["height"]), int(row["width"])
            stop = member.offset_data + -(-member.size // BLOCK) * BLOCK
            samples[-1] = SampleSpan(start, stop, bucket, latents, others)
    return group_samples(samples)


def _count_values(file: IO[bytes], size: int) -> int:
    """Return the bytes of the values in an .npy file of this size."""
    prefix = file.read(_NPY_PREFIX)
    return size - _NPY_PREFIX - int.from_bytes(prefix[-2:], "little")
