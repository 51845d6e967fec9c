"""Single rows of a cache: choose some of them, and read them."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latentmill.group_spans import GroupSpan
from pipeline.cache.reader import read_rows
from pipeline.formats.schema import PassthroughColumns
from pipeline.records import Unit
from pipeline.storage.folder import Folder


@dataclass(frozen=True, slots=True)
class RowRef:
    """A row of a cache: its file, its index in that file, and the unit of its sample."""

    file: str
    index: int
    unit: Unit


@dataclass(frozen=True, slots=True)
class FileWithRows:
    """A file of a cache that has rows, and the unit of their samples. groups: its row groups, in order."""

    file: str
    sha256: str
    unit: Unit
    groups: Sequence[GroupSpan]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(group.rows for group in self.groups)


def choose_evenly(total: int, limit: int) -> Sequence[int]:
    """Return up to `limit` positions (0: all) of `total`, evenly spaced, in order."""
    if not limit or limit >= total:
        return range(total)
    return [position * total // limit for position in range(limit)]


def find_runs(files: Sequence[FileWithRows], positions: Sequence[int]) -> Iterator[tuple[FileWithRows, Sequence[int]]]:
    """Yield the files with chosen rows, and the indexes of these. positions: in the cache, sorted."""
    start = 0
    for file in files:
        stop = start + file.rows
        chosen = positions[bisect_left(positions, start) : bisect_left(positions, stop)]
        if isinstance(chosen, range):  # it takes no memory, however many rows it has
            yield file, range(chosen.start - start, chosen.stop - start)
        elif chosen:
            yield file, tuple(position - start for position in chosen)
        start = stop


def choose_rows(files: Sequence[FileWithRows], limit: int) -> list[RowRef]:
    """Choose up to `limit` rows (0: all), evenly spaced over the cache."""
    positions = choose_evenly(sum(file.rows for file in files), limit)
    return [RowRef(file.file, index, file.unit) for file, indexes in find_runs(files, positions) for index in indexes]


def read_refs(cache: Folder, refs: Sequence[RowRef], columns: PassthroughColumns) -> Iterator[dict[str, Any]]:
    """Yield the rows of these references, in the same order. The references of a file must follow one another."""
    indexes_by_file: dict[str, list[int]] = {}
    for ref in refs:
        indexes_by_file.setdefault(ref.file, []).append(ref.index)
    for file, indexes in indexes_by_file.items():
        yield from read_rows(cache, file, indexes, texts=columns.texts, binary=columns.binary)
