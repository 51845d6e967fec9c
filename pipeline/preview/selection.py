"""Choose the rows of a cache that are decoded, and divide them into tasks. Neither depends on the workers."""

import hashlib
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.cache.rows import FileWithRows, choose_evenly, find_runs
from pipeline.cache.tally import format_bucket
from pipeline.canonical_json import canonical_json
from pipeline.records import Unit

IMAGES_PER_SHEET = 12
IMAGES_PER_BUCKET = 4 * IMAGES_PER_SHEET  # that are on contact sheets, evenly spaced
SMALL_SELECTION = 1024  # rows up to which a task has only IMAGES_PER_SHEET, so that every worker gets some
ROWS_PER_TASK = 512
FILES_PER_TASK = 12  # the originals of each file's rows are read on their own
LATENT_BYTES_PER_TASK = 128 << 20  # they are in memory while the originals are read


@dataclass(frozen=True, slots=True)
class RowRun:
    """Some rows of one file of a cache, by their indexes in it, in order."""

    file: str
    unit: Unit
    indexes: Sequence[int]


@dataclass(frozen=True, slots=True)
class RenderTask:
    """Rows that are decoded by one worker. cells: the names of the cells of those that are on contact sheets.

    A cell is found by the row's file and index.
    """

    number: int
    runs: tuple[RowRun, ...]
    cells: Mapping[tuple[str, int], str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the task in messages."""
        return f"part {self.number}"

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(len(run.indexes) for run in self.runs)


def choose_positions(total: int, limit: int, sample: int, seed: int) -> Sequence[int]:
    """Return positions of `total`, in order: `sample` at random, if it is not 0; otherwise `limit` (0: all) evenly."""
    if not sample:
        return choose_evenly(total, limit)
    return sorted(random.Random(seed).sample(range(total), min(sample, total)))


def make_tasks(files: Sequence[FileWithRows], positions: Sequence[int]) -> list[RenderTask]:
    """Divide the rows at these positions into tasks, in the order of the cache."""
    cells = name_cells(files, positions)
    limit = min(ROWS_PER_TASK, max(1, LATENT_BYTES_PER_TASK // max(measure_largest_row(files), 1)))
    if len(positions) <= SMALL_SELECTION:
        limit = min(limit, IMAGES_PER_SHEET)
    tasks, runs, rows = list[RenderTask](), list[RowRun](), 0

    def end_task() -> None:
        shown = {place: name for run in runs for place, name in cells.get(run.file, {}).items() if has_row(run, place)}
        tasks.append(RenderTask(len(tasks), tuple(runs), shown))
        runs.clear()

    for file, indexes in find_runs(files, positions):
        while indexes:
            taken, indexes = indexes[: limit - rows], indexes[limit - rows :]
            runs.append(RowRun(file.file, file.unit, taken))
            rows += len(taken)
            if rows == limit or len(runs) == FILES_PER_TASK:
                end_task()
                rows = 0
    if runs:
        end_task()
    return tasks


def has_row(run: RowRun, place: tuple[str, int]) -> bool:
    """Return whether a row, given by its file and index, is one of a run's."""
    return place[0] == run.file and place[1] in run.indexes


def measure_largest_row(files: Sequence[FileWithRows]) -> int:
    """Return about how many bytes the largest row of these files has."""
    return max((-(-(group.stop - group.start) // group.rows) for file in files for group in file.groups), default=1)


def list_bucket_runs(file: FileWithRows, indexes: Sequence[int]) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the bucket of each row group of a file, with those of these indexes that are in the group."""
    start = 0
    for group in file.groups:
        chosen = indexes[bisect_left(indexes, start) : bisect_left(indexes, start + group.rows)]
        if chosen:
            yield format_bucket(group.height, group.width), chosen
        start += group.rows


def name_cells(files: Sequence[FileWithRows], positions: Sequence[int]) -> dict[str, dict[tuple[str, int], str]]:
    """Return the names of the cells of contact sheets, by file, then by file and index of the row.

    Each bucket has up to IMAGES_PER_BUCKET, evenly spaced over its chosen rows.
    """
    counts = count_buckets(files, positions)
    shown = {bucket: choose_evenly(count, IMAGES_PER_BUCKET) for bucket, count in counts.items()}
    names, seen = defaultdict[str, dict[tuple[str, int], str]](dict), Counter[str]()
    for file, indexes in find_runs(files, positions):
        for bucket, chosen in list_bucket_runs(file, indexes):
            start, stop = seen[bucket], seen[bucket] + len(chosen)
            for number in range(bisect_left(shown[bucket], start), bisect_left(shown[bucket], stop)):
                names[file.file][file.file, chosen[shown[bucket][number] - start]] = name_cell(bucket, number)
            seen[bucket] = stop
    return names


def count_buckets(files: Sequence[FileWithRows], positions: Sequence[int]) -> Counter[str]:
    """Return the number of chosen rows of each bucket."""
    counts = Counter[str]()
    for file, indexes in find_runs(files, positions):
        for bucket, chosen in list_bucket_runs(file, indexes):
            counts[bucket] += len(chosen)
    return counts


def name_cell(bucket: str, number: int) -> str:
    """Return the name of a bucket's cell of this number."""
    return f"_cells/{bucket}-{number:05d}.png"


def parse_cell(name: str) -> str:
    """Return the bucket of a cell."""
    return name.removeprefix("_cells/").partition("-")[0]


def hash_selection(identity_sha256: str, settings: object, files: Sequence[FileWithRows]) -> str:
    """Return a hash of what decides the output: the cache's identity and files, and the settings as JSON values."""
    digest = hashlib.sha256(canonical_json([identity_sha256, settings]))
    for file in files:
        digest.update(f"\n{file.file} {file.sha256}".encode())
    return digest.hexdigest()
