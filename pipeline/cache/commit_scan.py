"""One scan of a cache: what the commit log, the commits and the part files say about every part, each read once.

    commits listed --> log: which rows count --> files listed --> tables: log, then commits, then part files

A scan takes about a hundred bytes per part, because names are held in Arrow arrays and all else is read in pieces.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache import commit_log
from pipeline.cache.commits import COMMITS, read_commits, repair_commit, write_commit
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import check_lengths, make_table, parse_parts
from pipeline.cache.parts import DATA, EMPTY, PART_FORMATS, inspect_part, parse_commit_name, strip_extension
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError
from pipeline.records import Container, Unit
from pipeline.storage.folder import Folder

T = TypeVar("T")
NAMES_PER_CHUNK = 1 << 16
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
        self._latest = self._find_latest_logs()
        self.files = list_files(cache)
        self.twins = find_twins(self.files)

    def _find_latest_logs(self) -> np.ndarray:
        """Return the number of the last log file that has rows for each commit; -1 if none has."""
        latest = np.full(len(self.commits), -1, np.int32)
        for number, indexes in enumerate(self._index_logs("commit", self.commits)):
            latest[indexes[indexes >= 0]] = number
        return latest

    def _index_logs(self, column: str, names: pa.StringArray) -> Iterator[np.ndarray]:
        """Yield, per file of the log, the index in `names` of each row's value of a column; -1 if it is not there."""
        columns = [commit_log.read_log_file(self.cache, name, [column])[column] for name in self._logs]
        lengths = [len(each) for each in columns]
        chunks = [chunk for each in columns for chunk in each.chunks]
        del columns
        # one call for all files, because each call makes a hash table of all names
        indexes = pc.index_in(pa.chunked_array(chunks, pa.string()), value_set=names)
        flat = pc.fill_null(indexes, -1).to_numpy()
        yield from np.split(flat, np.cumsum(lengths)[:-1]) if lengths else ()

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
        names = self.commits.filter(pa.array(is_left))
        for table in self._read_commits(names):
            is_seen[table.files] = True
            yield table
        if identity_sha256 is not None:
            yield from self._read_uncommitted(np.flatnonzero(~is_seen), identity_sha256)

    def _repair_twins(self) -> None:
        """Rewrite the commits that name twins. The log may have their rows from a worker that saw the other part."""
        names = pa.array(sorted({parse_commit_name(file) for file in self.twins}), pa.string())
        names = names.filter(pc.is_in(names, value_set=self.commits))
        for name, content in read_commits(self.cache, names.to_pylist()):
            self._parse_commit(name, content)

    def _read_log(self, is_left: np.ndarray) -> Iterator[PartTable]:
        """Yield the rows of the log that count, and clear their commits in `is_left`.

        A commit whose rows name a file that is not listed, or a twin, is left: its parts have changed since.
        """
        if not len(self.commits):
            return
        commits = list(self._index_logs("commit", self.commits))
        files = list(self._index_logs("file", self.files))
        twins = pc.index_in(pa.array(sorted(self.twins), pa.string()), value_set=self.files).to_numpy()
        is_valid = self._latest >= 0
        currents = []
        for number, (commit, file) in enumerate(zip(commits, files, strict=True)):
            is_current = (commit >= 0) & (self._latest[commit] == number)
            currents.append(is_current)
            is_valid[commit[is_current & ((file < 0) | np.isin(file, twins))]] = False
        is_left[is_valid] = False
        for name, commit, file, is_current in zip(self._logs, commits, files, currents, strict=True):
            counts = is_current & is_valid[commit]
            if counts.any():
                rows = commit_log.read_log_file(self.cache, name)
                yield PartTable(rows if counts.all() else rows.filter(pa.array(counts)), file[counts])

    def _read_commits(self, names: pa.StringArray) -> Iterator[PartTable]:
        """Read these commits, and repair and log them if the scan does so. Yield their parts."""
        commits = read_commits(self.cache, iterate_strings(names))
        for contents in split(commits, PARTS_PER_TABLE):
            parts = [(name, part) for name, content in contents for part in self._parse_commit(name, content)]
            rows = make_table(parts)
            indexes = pc.index_in(rows["file"], value_set=self.files)
            check_files_exist(self.cache, rows["file"].filter(indexes.is_null()).to_pylist())
            if self.repair is not None and not self.repair.rehash:
                commit_log.append_table(self.cache, rows)
            is_listed = indexes.is_valid()
            yield PartTable(rows.filter(is_listed), indexes.filter(is_listed).to_numpy())

    def _read_uncommitted(self, indexes: Iterable[int], identity_sha256: str) -> Iterator[PartTable]:
        """Read these parts from their own files. Write the commit of a retry part, if the scan repairs commits."""
        for some in split(indexes, PARTS_PER_TABLE):
            files = self.files.take(pa.array(some)).to_pylist()
            yield PartTable(make_table([("", self._inspect(file, identity_sha256)) for file in files]), np.array(some))

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
        try:
            parts = [PartSummary.from_commit(entry) for entry in content["parts"]]
            for part in parts:
                check_lengths([*part.tally.values()])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            file = self.cache.url_of(f"{COMMITS}/{name}.json")
            raise CacheError(f"{file} is corrupt: it does not describe its parts; {VERIFY_HINT}") from error
        return parts


def list_commit_names(cache: Folder) -> pa.StringArray:
    """Return the names of all commits, sorted: finished units, and parts that `retry` wrote."""
    names = (strip_extension(name) for name in cache.list_files(COMMITS) if name.endswith(".json"))
    return sort_strings(names)


def list_files(cache: Folder) -> pa.StringArray:
    """Return the part files, `_empty/` before `data/`, each sorted by name."""
    return sort_strings(f"{folder}/{name}" for folder in (EMPTY, DATA) for name in cache.list_files(folder))


def sort_strings(strings: Iterable[str]) -> pa.StringArray:
    """Return strings as a sorted array, in the order of their UTF-8 bytes."""
    chunks = [pa.array(some, pa.string()) for some in split(strings, NAMES_PER_CHUNK)]
    array = pa.chunked_array(chunks, pa.string()).combine_chunks()
    return array.take(pc.sort_indices(array))


def iterate_strings(array: pa.StringArray) -> Iterator[str]:
    """Yield the strings of an array. Few of them are Python objects at the same time."""
    for start in range(0, len(array), NAMES_PER_CHUNK):
        yield from array[start : start + NAMES_PER_CHUNK].to_pylist()


def split(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def find_twins(files: pa.StringArray) -> frozenset[str]:
    """Return the files in `_empty/` whose part is also in `data/`, with rows. files: all part files."""
    empties = files.filter(pc.starts_with(files, f"{EMPTY}/"))
    stems = [strip_extension(file).removeprefix(f"{EMPTY}/") for file in iterate_strings(empties)]
    is_twin = np.zeros(len(stems), bool)
    for part_format in PART_FORMATS.values() if stems else ():
        names = pa.array([f"{DATA}/{stem}{part_format.SUFFIX}" for stem in stems], pa.string())
        is_twin |= pc.is_in(names, value_set=files).to_numpy(zero_copy_only=False)
    return frozenset(empties.filter(pa.array(is_twin)).to_pylist())


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


def select_unfinished(cache: Folder, units: Sequence[Unit]) -> list[Unit]:
    """Return the units that are not done."""
    names = pa.array((unit.name for unit in units), pa.string())
    is_done = pc.is_in(names, value_set=list_commit_names(cache)).to_numpy(zero_copy_only=False)
    return [unit for unit, done in zip(units, is_done, strict=True) if not done]


def remove_lost_commits(cache: Folder) -> None:
    """Write into the log that the rows of commits that do not exist any more do not count.

    Otherwise they would count again if their units are encoded again, until the new commits are added to the log.
    """
    logs = [commit_log.read_log_file(cache, name, ["commit", "file"]) for name in commit_log.list_log_files(cache)]
    if logs:
        rows = pa.concat_tables(logs)
        lost = rows.filter(pc.invert(pc.is_in(rows["commit"], value_set=list_commit_names(cache))))
        # the last row of a commit counts
        has_parts = dict(zip(lost["commit"].to_pylist(), lost["file"].is_valid().to_pylist(), strict=True))
        commit_log.remove_commits(cache, sorted(name for name, counts in has_parts.items() if counts))
