"""One scan of a cache: what the commit log, the commits and the part files say about every part, each read once.

    commits listed --> log: which rows count --> files listed --> tables: log, then commits, then part files

A scan takes about a hundred bytes per part, because names are held in numpy arrays, and all else is read in pieces.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache import commit_log
from pipeline.cache.commits import iterate_commits, parse_summaries, read_commits, repair_commit, write_commit
from pipeline.cache.name_array import CHUNK, find_names, iterate_names, sort_names, split
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import make_table, parse_parts
from pipeline.cache.parts import (
    DATA,
    EMPTY,
    PART_FORMATS,
    inspect_part,
    iterate_part_files,
    parse_commit_name,
    strip_extension,
)
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError
from pipeline.records import Container, Unit
from pipeline.storage.folder import Folder

DATA_PREFIX = f"{DATA}/".encode()
PARTS_PER_TABLE = 1024  # of those that are not in the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """How commits are repaired, and added to the log.

    rehash: files may have been overwritten, so each one is read and hashed, and the log is not used.
    """

    identity_sha256: str
    container: Container
    rehash: bool = False


@dataclass(frozen=True, slots=True)
class PartTable:
    """Some parts of a cache.

    rows: one per part, with the schema of `pipeline.cache.part_table`. files: int64 [n], the index of each part's file
    in the listing.
    """

    rows: pa.Table
    files: np.ndarray


class CacheScan:
    """The names of a cache's commits and part files, and the parts that they describe.

    The commits are listed before the files. So every file that a listed commit names is in `files`, unless it is lost.

    commits: the names of the commits, sorted. files: the names of the part files, sorted, `_empty/` before `data/`.
    twins: the files in `_empty/` that do not count, because the same part is in `data/`, with rows.
    """

    def __init__(self, cache: Folder, repair: Repair | None = None) -> None:
        self.cache, self.repair = cache, repair
        self.commits = list_commit_names(cache)
        self._logs = [] if repair is not None and repair.rehash else commit_log.list_log_files(cache)
        self._log_commits = self._index_logs("commit", self.commits)
        self.files = list_files(cache)
        self.twins = _find_twins(self.files)

    @property
    def parts_with_rows(self) -> int:
        """The number of files in `data/`."""
        return len(self.files) - int(np.searchsorted(self.files, DATA_PREFIX))

    def _index_logs(self, column: str, names: np.ndarray) -> list[np.ndarray]:
        """Return, per file of the log, the index in `names` of each row's value of a column; -1 if it is not there."""
        columns = (commit_log.read_log_file(self.cache, name, [column])[column] for name in self._logs)
        return [find_names(names, pc.fill_null(each, "").to_pylist()).astype(np.int32) for each in columns]

    def read_tables(self, identity_sha256: str | None = None) -> Iterator[PartTable]:
        """Yield the parts, each once, in no order.

        identity_sha256: of the cache, to read also the parts that no commit names, from their files; None: without.
        Raises CacheError if a file that a commit names does not exist.
        """
        if self.repair is not None:
            self._repair_twins()
        is_seen = np.zeros(len(self.files), bool)
        is_left = np.ones(len(self.commits), bool)
        for table in self._read_log(is_left):
            is_seen[table.files] = True
            yield table
        for table in self._read_commits(self.commits[is_left]):
            is_seen[table.files] = True
            yield table
        if identity_sha256 is not None:
            yield from self._read_uncommitted(np.flatnonzero(~is_seen), identity_sha256)

    def _repair_twins(self) -> None:
        """Rewrite the commits that name twins. The log may have their rows from a worker that saw the other part."""
        indexes = find_names(self.commits, sorted({parse_commit_name(file) for file in self.twins}))
        for name, content in read_commits(self.cache, iterate_names(self.commits[indexes[indexes >= 0]])):
            self._parse_commit(name, content)

    def _read_log(self, is_left: np.ndarray) -> Iterator[PartTable]:
        """Yield the rows of the log that count, and clear their commits in `is_left`.

        A commit whose rows name a file that is not listed, or a twin, is left: its parts have changed since.
        """
        if not len(self.commits):
            return
        latest = np.full(len(self.commits), -1, np.int32)
        for number, commit in enumerate(self._log_commits):
            latest[commit[commit >= 0]] = number
        files = self._index_logs("file", self.files)
        twins = find_names(self.files, sorted(self.twins))
        is_valid = latest >= 0
        currents = []
        for number, (commit, file) in enumerate(zip(self._log_commits, files, strict=True)):
            is_current = (commit >= 0) & (latest[commit] == number)
            currents.append(is_current)
            is_valid[commit[is_current & ((file < 0) | np.isin(file, twins))]] = False
        is_left[is_valid] = False
        for name, commit, file, is_current in zip(self._logs, self._log_commits, files, currents, strict=True):
            counts = is_current & is_valid[commit]
            if counts.any():
                rows = commit_log.read_log_file(self.cache, name)
                yield PartTable(rows if counts.all() else rows.filter(pa.array(counts)), file[counts])

    def _read_commits(self, names: np.ndarray) -> Iterator[PartTable]:
        """Read these commits, and repair and log them if the scan does so. Yield their parts."""
        commits = read_commits(self.cache, iterate_names(names))
        for contents in split(commits, PARTS_PER_TABLE):
            parts = [(name, part) for name, content in contents for part in self._parse_commit(name, content)]
            rows = make_table(parts)
            indexes = find_names(self.files, [part.file for _, part in parts])
            is_listed = indexes >= 0
            check_files_exist(self.cache, [parts[index][1].file for index in np.flatnonzero(~is_listed)])
            if self.repair is not None and not self.repair.rehash:
                commit_log.append_table(self.cache, rows)
            yield PartTable(rows.filter(pa.array(is_listed)), indexes[is_listed])

    def _read_uncommitted(self, indexes: Iterable[int], identity_sha256: str) -> Iterator[PartTable]:
        """Read these parts from their own files. Write the commit of a retry part, if the scan repairs commits."""
        for some in split(indexes, PARTS_PER_TABLE):
            parts = [("", self._inspect(file, identity_sha256)) for file in iterate_names(self.files[some])]
            yield PartTable(make_table(parts), np.array(some))

    def _inspect(self, file: str, identity_sha256: str) -> PartSummary:
        part = inspect_part(self.cache, file, identity_sha256)
        if part is None:
            raise CacheError(f"{self.cache.url_of(file)} was listed, and was removed since; try again")
        if self.repair is not None and part.record.round and file not in self.twins:
            write_commit(self.cache, [part])  # the retry ended before it did
        return part.summary

    def _parse_commit(self, name: str, content: dict[str, Any]) -> list[PartSummary]:
        """Return the parts in a commit, after it was repaired. Raises CacheError if it does not describe its parts."""
        if self.repair is not None:
            repair = self.repair
            content = repair_commit(
                self.cache, name, content, self.twins, repair.identity_sha256, repair.container, repair.rehash
            )
        return parse_summaries(self.cache, name, content)


def list_commit_names(cache: Folder) -> np.ndarray:
    """Return the names of all commits, as a sorted array: finished units, and parts that `retry` wrote."""
    return sort_names(iterate_commits(cache))


def list_files(cache: Folder) -> np.ndarray:
    """Return the part files as a sorted array: `_empty/` before `data/`, each sorted by name."""
    return sort_names(iterate_part_files(cache))


def _find_twins(files: np.ndarray) -> frozenset[str]:
    """Return the files in `_empty/` whose part is also in `data/`, with rows. files: all part files, sorted."""
    empties = list(iterate_names(files[: np.searchsorted(files, DATA_PREFIX)]))
    stems = [strip_extension(file).removeprefix(f"{EMPTY}/") for file in empties]
    twins = set[str]()
    for part_format in PART_FORMATS.values():
        indexes = find_names(files, [f"{DATA}/{stem}{part_format.SUFFIX}" for stem in stems])
        twins.update(empties[number] for number in np.flatnonzero(indexes >= 0))
    return frozenset(twins)


def drop_twins(rows: pa.Table, twins: Iterable[str]) -> pa.Table:
    """Return the rows whose file is not a twin."""
    names = pa.array(twins, pa.string())
    return rows.filter(pc.invert(pc.is_in(rows["file"], value_set=names))) if len(names) else rows


def check_files_exist(cache: Folder, files: Collection[str]) -> None:
    """Raise CacheError if one of these committed files, which were not listed, does not exist now either."""
    for file in sorted(files):
        if cache.read_if_exists(file) is None:
            raise CacheError(f"{cache.url_of(file)} was committed, but is missing: the cache is damaged; {VERIFY_HINT}")


def read_summaries(cache: Folder, identity_sha256: str, repair: Repair | None = None) -> Iterator[PartSummary]:
    """Yield a summary of each part of a cache, in no order.

    It is read from the commit of the part, or from the part's file if no commit names it. A part without rows is left
    out if the same part exists with rows. Raises CacheError if a file that a commit names does not exist.
    """
    scan = CacheScan(cache, repair)
    for table in scan.read_tables(identity_sha256):
        for _, part in parse_parts(table.rows):
            if part.file not in scan.twins:
                yield part


def select_unfinished(commits: np.ndarray, units: Sequence[Unit]) -> list[Unit]:
    """Return the units that are not done. commits: of `list_commit_names`."""
    return [
        unit
        for some in split(units, CHUNK)
        for unit, index in zip(some, find_names(commits, [unit.name for unit in some]), strict=True)
        if index < 0
    ]


def remove_lost_commits(cache: Folder, commits: np.ndarray) -> None:
    """Write into the log that the rows of commits that do not exist any more do not count.

    commits: of `list_commit_names`.

    Otherwise they would count again if their units are encoded again, until the new commits are added to the log.
    """
    has_parts: dict[str, bool] = {}
    for name in commit_log.list_log_files(cache):
        rows = commit_log.read_log_file(cache, name, ["commit", "file"])
        is_lost = find_names(commits, rows["commit"].to_pylist()) < 0
        lost = rows.filter(pa.array(is_lost))
        # the last row of a commit counts; one that another job has added meanwhile is only read again
        has_parts.update(zip(lost["commit"].to_pylist(), lost["file"].is_valid().to_pylist(), strict=True))
    commit_log.remove_commits(cache, sorted(name for name, counts in has_parts.items() if counts))
