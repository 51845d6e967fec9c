"""Added columns: overlays beside the parts of a cache, in versions.

A version adds columns to the rows of a cache, or replaces columns of the same names. `_columns/NNNNN.parquet` is
created last and lists the files of the version, so a version is complete or does not exist. Version N of a cache's
columns has the newest of each column among the versions 1 to N. Version 0 has the columns that `encode` wrote.
"""

import base64
import bisect
import hashlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from latentmill.arrow_values import to_python
from latentmill.canonical_json import VERIFY_HINT, cache_digest, canonical_json, parse_json_object
from latentmill.error_text import describe_error
from latentmill.errors import CacheError, IdentityError, LatentmillError, UsageError
from latentmill.folder import CacheFolder
from latentmill.overlay_files import OverlayEntry, OverlayFile
from latentmill.part_files import PARQUET_RECORD, count_rows, open_parquet_file
from latentmill.typed_json import FieldError, parse_fields

FOLDER = "_columns"
FORMAT = 1
KEY = "key"  # the first column of an overlay file: the key of each row
LIST_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("overlay", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """What a version says of itself.

    table: the name of the table that the columns came from; "" if they were read again from the sources.
    arrow_schema: the columns, as Arrow's serialized schema in base64. rows: of all files that the version covers.
    matched: those that had a row in the table. digest: see `Version`. latentmill: the version that wrote it.
    sha256: of all other fields as canonical JSON.
    """

    format: int
    table: str
    columns: tuple[str, ...]
    arrow_schema: str
    rows: int
    matched: int
    digest: str
    latentmill: str
    sha256: str = ""

    def seal(self) -> "VersionInfo":
        """Return the same fields with their sha256."""
        rest = {name: value for name, value in asdict(self).items() if name != "sha256"}
        return replace(self, sha256=hashlib.sha256(canonical_json(rest)).hexdigest())


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A version of the columns. info: what it says. schema: its columns. files: its overlays, sorted by part.

    Its digest is the sha256 of a line `SHA256  data/PART` per overlay file, sorted by part.
    """

    number: int
    info: VersionInfo
    schema: pa.Schema
    files: pa.Table

    def find(self, file: str) -> OverlayEntry | None:
        """Return the overlay of a part's file (`data/...`); None if the version does not cover it."""
        names = self.files["file"]
        index = bisect.bisect_left(range(len(names)), file, key=lambda number: names[number].as_py())
        return self[index] if index < len(names) and names[index].as_py() == file else None

    def __getitem__(self, index: int) -> OverlayEntry:
        file, name, rows, size, sha256 = (column[index].as_py() for column in self.files.columns)
        return OverlayEntry(file, name, rows, size, sha256.hex())

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, slots=True, eq=False)
class Overlays:
    """The added columns of a cache, at one version. versions: up to that version, in order."""

    folder: CacheFolder = field(default_factory=lambda: CacheFolder(""))
    versions: tuple[Version, ...] = ()

    @property
    def number(self) -> int:
        """The number of the version; 0 if no columns were added."""
        return self.versions[-1].number if self.versions else 0

    @property
    def providers(self) -> dict[str, Version]:
        """The version that gives each column: the newest one that has it."""
        return {name: version for version in self.versions for name in version.schema.names}

    @property
    def schema(self) -> pa.Schema:
        """The names and types of all added columns."""
        return pa.schema([version.schema.field(name) for name, version in self.providers.items()])

    def add_to(self, schema: pa.Schema) -> pa.Schema:
        """Return the columns of the sources with the added ones. schema: of the sources' columns."""
        later = self.schema
        return pa.schema([*(item for item in schema if item.name not in later.names), *later])

    @property
    def digest(self) -> str:
        """The columns digest: sha256 of the canonical JSON of an object with the version's digest for each column.

        A training run can pin it, as it pins the digest of the cache. It is empty if no columns were added.
        """
        return self.digest_of(self.schema.names)

    def digest_of(self, columns: Collection[str]) -> str:
        """Return the columns digest of some columns, for a program that reads no others. It is empty for none."""
        digests = {name: version.info.digest for name, version in self.providers.items() if name in columns}
        return hashlib.sha256(canonical_json(digests)).hexdigest() if digests else ""

    @property
    def summary(self) -> str:
        """The version, and its columns with the tables that they came from."""
        tables: dict[str, list[str]] = {}
        for name, version in self.providers.items():
            tables.setdefault(version.info.table or "the sources", []).append(name)
        return f"version {self.number}: " + "; ".join(f"{', '.join(tables[table])} from {table}" for table in tables)

    def to_dict(self) -> dict[str, Any] | None:
        """Return the version, its columns digest, and the table of each column, for JSON; None if there are none."""
        tables = {name: version.info.table for name, version in self.providers.items()}
        return {"version": self.number, "digest": self.digest, "tables": tables} if tables else None

    def read(
        self, file: str, columns: Collection[str] | None = None, start: int = 0, stop: int | None = None
    ) -> pa.Table:
        """Return the values of rows [start, stop) of a part's file, in its order.

        columns: those of `schema` to read; None for all. stop: None for all rows that follow. If a version does not
        cover the file, its columns are null, and a warning says so once. The overlay has a row group for each row group
        of the part, so rows of one group take one request, besides one for the footer of each overlay.
        Raises CacheError if an overlay is damaged, and StorageError if it cannot be read.
        """
        names = [name for name in self.schema.names if columns is None or name in columns]
        found: dict[str, pa.ChunkedArray] = {}
        for version, provided in self.group_by_version(names):
            if entry := self._find(version, file):
                table = _read_slice(self.folder, version, entry, provided, start, stop)
                found |= dict(zip(provided, table.columns, strict=True))
        if stop is None:
            stop = start + len(next(iter(found.values()))) if found else count_rows(self.folder, file)
        for name in names:
            if name not in found:
                found[name] = pa.chunked_array([pa.nulls(max(stop - start, 0), self.schema.field(name).type)])
        return pa.table({name: found[name] for name in names})

    def iterate_rows(
        self, file: str, columns: Collection[str], wanted: Sequence[int] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the values of these columns for the rows of a file. wanted: ascending numbers of rows; None for all.

        A row group is in memory at a time. Uncovered columns are null: if no version covers the file, forever.
        """
        readers, nulls = [], dict[str, Any]()
        for version, names in self.group_by_version(columns):
            if entry := self._find(version, file):
                readers.append(_iterate_version(self.folder, version, entry, names, wanted))
            else:
                nulls |= dict.fromkeys(names)
        while True:
            row = dict(nulls)
            for reader in readers:
                more = next(reader, None)
                if more is None:
                    return
                row |= more
            yield row

    def group_by_version(self, columns: Collection[str]) -> list[tuple[Version, list[str]]]:
        """Return the versions that give these columns, each with the names that it gives."""
        groups: dict[int, tuple[Version, list[str]]] = {}
        for name, version in self.providers.items():
            if name in columns:
                groups.setdefault(version.number, (version, []))[1].append(name)
        return list(groups.values())

    def _find(self, version: Version, file: str) -> OverlayEntry | None:
        entry = version.find(file)
        if entry is None:
            names = ", ".join(version.schema.names)
            text = f"version {version.number} of the columns of {self.folder.url} ({names}) does not cover all files"
            warnings.warn(f"{text}: the others have null; run latentmill annotate again", stacklevel=2)
        return entry


def open_overlays(folder: CacheFolder, version: int | str | None = None) -> Overlays:
    """Return the added columns of a cache.

    version: its number, 0 for none; or the columns digest that it must have; None for the newest.
    Raises UsageError if there is no such version, IdentityError if none has this digest, CacheError for a damaged file.
    """
    numbers = list_versions(folder) if version != 0 else []
    if isinstance(version, int) and version:
        if version not in numbers:
            known = ", ".join(map(str, numbers)) or "none"
            raise UsageError(f"the cache {folder.url} has no version {version} of its columns; it has: {known}")
        numbers = [number for number in numbers if number <= version]
    overlays = Overlays(folder, tuple(read_version(folder, number) for number in numbers))
    if not isinstance(version, str):
        return overlays
    for count in range(len(numbers), 0, -1):
        earlier = Overlays(folder, overlays.versions[:count])
        if earlier.digest == version:
            return earlier
    raise IdentityError(f"no version of the columns of {folder.url} has the digest {version}: see latentmill stats")


def list_versions(folder: CacheFolder) -> list[int]:
    """Return the numbers of the versions, ascending."""
    names = folder.list_files(FOLDER)
    return [int(name[:5]) for name in names if re.fullmatch(r"\d{5}\.parquet", name)]


def name_version(number: int) -> str:
    """Return the name of the file that lists a version."""
    return f"{FOLDER}/{number:05d}.parquet"


def read_version(folder: CacheFolder, number: int) -> Version:
    """Read the file that lists a version. Raises CacheError, which names it, if it is damaged or missing."""
    url, data = folder.url_of(name_version(number)), folder.read_if_exists(name_version(number))
    try:
        if data is None:
            raise CacheError(f"{url} is missing; {VERIFY_HINT}")
        with open_parquet_file(pa.BufferReader(data)) as file:
            info = parse_fields(VersionInfo, parse_json_object(file.metadata.metadata[PARQUET_RECORD], url))
            files = file.read(use_threads=False).cast(LIST_SCHEMA).combine_chunks()
        schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(info.arrow_schema)))
    except LatentmillError:
        raise
    except FieldError as error:
        raise CacheError(f"{url} is damaged: {error}; {VERIFY_HINT}") from error
    except Exception as error:  # damaged bytes can make Arrow raise anything
        message = describe_error(error)
        raise CacheError(f"{url} cannot be read as a version of columns: {message:.200}; {VERIFY_HINT}") from error
    if info != info.seal():
        raise CacheError(f"{url} was changed after it was written; {VERIFY_HINT}")
    if info.format != FORMAT:
        raise CacheError(f"{url} has format {info.format}; this version of latentmill knows {FORMAT}")
    return Version(number, info, schema, files)


def compute_digest(hashes: Mapping[str, str]) -> str:
    """Return the digest of a version. hashes: the sha256 in hex of each overlay, by the part's file."""
    return cache_digest(sorted(hashes.items()))


def _read_slice(
    folder: CacheFolder, version: Version, entry: OverlayEntry, names: Sequence[str], start: int, stop: int | None
) -> pa.Table:
    """Return rows [start, stop) of an overlay, from the row groups that have them."""
    tables, first = [], 0
    reader = OverlayFile(folder, entry, version.schema, names)
    stop = entry.rows if stop is None else stop
    for group, count in enumerate(reader.sizes):
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            tables.append(reader.read_group(group).slice(low, high - low))
        first += count
    schema = pa.schema([version.schema.field(name) for name in names])
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    if len(table) != max(stop - start, 0):
        raise CacheError(f"{reader.url} has no rows {start} to {stop}: it has {first}; {VERIFY_HINT}")
    return table


def _iterate_version(
    folder: CacheFolder, version: Version, entry: OverlayEntry, names: Sequence[str], wanted: Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    reader, first = OverlayFile(folder, entry, version.schema, names), 0
    for group, count in enumerate(reader.sizes):
        indexes = [index - first for index in wanted or () if first <= index < first + count]
        if wanted is None or indexes:
            table = reader.read_group(group)
            table = table if wanted is None else table.take(indexes)
            for values in zip(*map(to_python, table.columns), strict=True):
                yield dict(zip(names, values, strict=True))
        first += count
