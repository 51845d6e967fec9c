"""One part of a cache written in the format of a trainer: rows -> convert -> pack -> files that are published."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError, Stopped
from pipeline.exports.formats import FORMATS
from pipeline.exports.job import ExportJob, OutFile, RefusedRow, Row
from pipeline.exports.manifest import ExportRecord, write_record
from pipeline.prefetch import map_in_order
from pipeline.readers.folder import make_folder_key
from pipeline.records import FIRST_ATTEMPT, Attempt
from pipeline.storage.folder import Folder
from pipeline.text import hash_text

WRITERS = 16  # threads that write the small files of a part: a disk or a store is slow to confirm each of them
NAME_COLUMNS = ("key", "shard")

# Whether a file was written, was there already, or is another one that a user has made.
Outcome = Literal["written", "equal", "kept"]


@dataclass(frozen=True, slots=True)
class ExportTask:
    """A part to be exported. rows: in it. names_only: return the hashes of the names of its images instead.

    images: the paths of the image files that the part is of, for a format that needs their extensions.
    """

    part: int
    file: str
    rows: int
    names_only: bool = False
    images: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the task in messages."""
        return self.file


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """A part that was exported. written, existing: rows whose files were written, or were there. kept: captions."""

    part: int
    written: int = 0
    existing: int = 0
    kept: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class PartNames:
    """names: uint64 [rows], a hash of the name of each row's image."""

    part: int
    names: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """All that a worker needs to export. It is small enough to be sent to another process.

    ignores_case: whether `a` and `A` are one file in the folder.
    """

    job: ExportJob
    format: str
    out: Folder
    ignores_case: bool = False

    def build(self, stop: threading.Event) -> "ExportWorker":
        """Return the worker. stop: set once the job is to stop."""
        return ExportWorker(self, stop)


class ExportWorker:
    """A worker that exports parts. images, steps: rows read so far. busy_seconds: 0, as it has no model."""

    busy_seconds = 0.0

    def __init__(self, spec: ExportSpec, stop: threading.Event) -> None:
        self.spec, self.stop = spec, stop
        self.form = FORMATS[spec.format]
        self.images = 0

    @property
    def steps(self) -> int:
        return self.images

    def run(self, task: ExportTask, attempt: Attempt = FIRST_ATTEMPT) -> ExportReport | PartNames:
        """Export a part, or return the names of its files."""
        return self.hash_names(task) if task.names_only else self.export(task)

    def export(self, task: ExportTask) -> ExportReport:
        """Write the files of a part that do not exist, and then its record."""
        written = existing = kept = rows = 0
        names, entries = list[str](), list[Any]()
        refused: list[tuple[str, str, str]] = []
        files = self.form.pack(self.convert(task, refused), self.spec.job, task.part)
        with ThreadPoolExecutor(WRITERS) as pool:
            for file, outcome in map_in_order(
                pool, self.publish, files, window=WRITERS, weight=weigh, budget=256 << 20
            ):
                names.append(file.name)
                rows += file.rows
                written += file.rows if outcome == "written" else 0
                existing += file.rows if outcome == "equal" else 0
                kept += outcome == "kept"
                entries += [] if file.entry is None else [file.entry]
        if rows + len(refused) != task.rows:
            raise CacheError(
                f"{self.spec.job.cache.folder.url_of(task.file)} has {rows + len(refused)} rows, not {task.rows}; "
                f"{VERIFY_HINT}"
            )
        record = ExportRecord(rows=rows, files=tuple(names), refused=tuple(refused), entries=tuple(entries))
        write_record(self.spec.out, self.spec.format, task.part, record)
        return ExportReport(part=task.part, written=written, existing=existing, kept=kept, refused=len(refused))

    def convert(self, task: ExportTask, refused: list[tuple[str, str, str]]) -> Iterator[Any]:
        """Yield the rows of a part as the format stores them. Rows that it cannot store go to `refused`."""
        columns = None if self.form.all_columns else self.spec.job.columns
        for row in self.read(task, columns):
            try:
                yield self.form.convert(row, self.spec.job)
            except RefusedRow as reason:
                refused.append((row["shard"], row["key"], str(reason)))

    def read(self, task: ExportTask, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows of a part. Raises Stopped once the job is to stop."""
        files = {make_folder_key(path): path.rpartition("/")[2] for path in task.images}
        for row in self.spec.job.cache.rows(task.file, columns):
            if self.stop.is_set():
                raise Stopped
            self.images += 0 if task.names_only else 1
            yield {**row, "image_name": files[row["key"]]} if files else row

    def publish(self, file: OutFile) -> tuple[OutFile, Outcome]:
        """Write a file if its name is free.

        Raises CacheError if something else has the name: nothing is ever overwritten.
        """
        out = self.spec.out
        if out.create(file.name, file.data):
            return file, "written"
        if out.read(file.name) == file.data:
            return file, "equal"
        if file.keeps_existing:
            return file, "kept"
        raise CacheError(
            f"{out.url_of(file.name)} exists and is not the file of this export; remove it, or export to an empty "
            "folder"
        )

    def hash_names(self, task: ExportTask) -> PartNames:
        """Return a hash of the name of each row's image."""
        names = (hash_text(name) for _, _, name in self.name_rows(task))
        return PartNames(task.part, np.fromiter(names, np.uint64))

    def name_rows(self, task: ExportTask) -> Iterator[tuple[str, str, str]]:
        """Yield shard, key and the name of the image of each row. Those that are refused have a name of their own."""
        for index, row in enumerate(self.read(task, NAME_COLUMNS)):
            try:
                name = self.spec.job.make_stem(row)
                name = name.casefold() if self.spec.ignores_case else name
            except RefusedRow:
                name = f"/{task.part}/{index}"
            yield row["shard"], row["key"], name


def weigh(file: OutFile) -> int:
    """Return the bytes of a file."""
    return len(file.data)


def find_equal(names: Sequence[PartNames]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield pairs of rows whose names have the same hash, each as its part and its place in the part."""
    hashes = np.concatenate([part.names for part in names]) if names else np.zeros(0, np.uint64)
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    ends = np.cumsum([len(part.names) for part in names])

    def locate(row: int) -> tuple[int, int]:
        index = int(np.searchsorted(ends, row, side="right"))
        return names[index].part, row - int(ends[index] - len(names[index].names))

    for place in equal:
        yield locate(int(order[place])), locate(int(order[place + 1]))
