"""Single rows of a cache: choose some of them, and read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


def choose_rows(files: Sequence[tuple[str, int, Unit]], limit: int) -> list[RowRef]:
    """Choose up to `limit` rows (0: all), spread evenly over the cache.

    files: name, number of rows and unit of each file with rows.
    """
    total = sum(rows for _, rows, _ in files)
    count = min(limit, total) if limit else total
    chosen = {position * total // count for position in range(count)} if count else set()
    refs: list[RowRef] = []
    start = 0
    for file, rows, unit in files:
        refs += [RowRef(file, index, unit) for index in range(rows) if start + index in chosen]
        start += rows
    return refs


def read_refs(cache: Folder, refs: Sequence[RowRef], columns: PassthroughColumns) -> Iterator[dict[str, Any]]:
    """Yield the rows of these references, in the same order. The references of a file must follow one another."""
    indexes_by_file: dict[str, list[int]] = {}
    for ref in refs:
        indexes_by_file.setdefault(ref.file, []).append(ref.index)
    for file, indexes in indexes_by_file.items():
        yield from read_rows(cache, file, indexes, texts=columns.texts, binary=columns.binary)
