"""The commit log: the files `_log/NNNNN.parquet`, which hold the content of many commits each.

Reading a million small files takes hours on a store. So a driver also writes what its workers report into the log. A
log file is created under a free number and never changed. It is a copy: if it is lost, the commits are read instead.

The rows of a commit count only while the commit exists in `_commits`. All of them are in one file: the last one that
has rows for it. `pipeline.cache.commit_scan` decides whether they agree with the files that exist.
"""

import io
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.error_text import describe_error
from latentmill.part_files import open_parquet_file
from pipeline.cache.numbered_files import get_next_number, list_numbered_files, name_numbered_file
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import SCHEMA, make_removals, make_table
from pipeline.cache.parts import parse_commit_name
from pipeline.canonical_json import REBUILD_HINT
from pipeline.errors import CacheError, StorageError
from pipeline.storage.folder import Folder

FOLDER = "_log"
MAX_PARTS = 2048  # of a log file that is written during a run
MAX_BYTES = 16 << 20  # of the tallies in it, before compression
MAX_SECONDS = 600.0  # between two log files of a run
BYTES_PER_CHANNEL = 40  # of a tally


def list_log_files(cache: Folder) -> list[str]:
    """Return the names of the log's files, in order."""
    return list_numbered_files(cache, FOLDER)


def encode_log(table: pa.Table) -> bytes:
    """Return the bytes of a log file with these rows."""
    sink = io.BytesIO()
    names = ["commit", "file", "source", "rows"]  # values of the others seldom repeat
    pq.write_table(table, sink, compression="zstd", use_dictionary=names[2:], write_page_checksum=True)
    return sink.getvalue()


def read_log_file(cache: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a log file. columns: to read less; default: all. Raises CacheError if it is damaged."""
    return parse_log(cache.read(f"{FOLDER}/{name}"), cache.url_of(f"{FOLDER}/{name}"), columns)


def parse_log(data: bytes, url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows in the bytes of a log file. url: for the error. Raises CacheError if it is damaged."""
    schema = pa.schema([SCHEMA.field(name) for name in columns]) if columns else SCHEMA
    try:
        with open_parquet_file(pa.BufferReader(data)) as file:
            return file.read(columns=columns, use_threads=False).cast(schema)
    except Exception as error:  # damaged bytes can make Arrow raise anything
        message = describe_error(error)
        raise CacheError(f"{url} cannot be read as a commit log: {message:.200}; {REBUILD_HINT}") from error


def is_as_written(data: bytes, table: pa.Table) -> bool:
    """Return whether a log file has the bytes with which it was written. table: its rows.

    The bytes of another version of pyarrow cannot be compared; their rows can.
    """
    written = encode_log(table)
    versions = [pq.read_metadata(pa.BufferReader(each)).created_by for each in (data, written)]
    return data == written or versions[0] != versions[1]


def append_table(cache: Folder, table: pa.Table, number: int | None = None) -> int:
    """Create a log file with these rows. number: of the file, if it is known; another one if that is taken.

    Returns the number after it.
    """
    data = encode_log(table)
    while True:
        if number is None:
            number = get_next_number(list_log_files(cache))
        if cache.create(f"{FOLDER}/{name_numbered_file(number)}", data):
            return number + 1
        number = None


def remove_commits(cache: Folder, commits: Sequence[str]) -> None:
    """Write that the rows of these commits no longer count. Their commits are then read until they are added again."""
    if commits:
        append_table(cache, make_removals(commits))


class LogWriter:
    """Collects the parts of finished units, and writes them into the log, many at a time.

    Nothing depends on it: what is not written is read from the commits. So an error of the storage is only returned.
    """

    def __init__(self, cache: Folder) -> None:
        self.cache = cache
        self._commits: dict[str, Sequence[PartSummary]] = {}
        self._parts = self._bytes = 0
        self._number: int | None = None
        self._written_at = time.monotonic()

    def add(self, parts: Sequence[PartSummary]) -> None:
        """Add all parts of a commit. On a store without conditional creates there is no log."""
        if not self.cache.exclusive or not parts:
            return
        self._commits[parse_commit_name(parts[0].file)] = parts
        self._parts += len(parts)
        self._bytes += BYTES_PER_CHANNEL * sum(len(tally.mean) for part in parts for tally in part.tally.values())

    @property
    def is_due(self) -> bool:
        """Whether enough parts have been added, or enough time has passed, to write a log file."""
        is_full = self._parts >= MAX_PARTS or self._bytes >= MAX_BYTES
        return is_full or (self._parts > 0 and time.monotonic() - self._written_at > MAX_SECONDS)

    def write(self) -> StorageError | None:
        """Write the commits so far. Returns the error if the storage refuses; then these are not written."""
        parts = [(name, part) for name, parts in self._commits.items() for part in parts]
        self._commits, self._parts, self._bytes, self._written_at = {}, 0, 0, time.monotonic()
        try:
            if parts:
                self._number = append_table(self.cache, make_table(parts), self._number)
        except StorageError as error:
            return error
        return None
