"""Find the tables of metadata among the files of the sources, and compare their rows with the images.

A table lies in the folder of its images or above it, under one of the names of `METADATA_NAMES`. The nearest one
counts. img2dataset writes `00000.parquet` beside the folder `00000`. A table with a column `key` also belongs to the
tars in its folder and below.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ShardError, SourceError
from pipeline.limits import Limits
from pipeline.readers.image_column import contains_bytes
from pipeline.readers.image_files import get_folder
from pipeline.readers.metadata import KEY_RULE, LABEL_TABLE, METADATA_NAMES, find_metadata, make_rule, name_in_table
from pipeline.readers.parquet import open_parquet
from pipeline.readers.table import LABELS, NameRule, Table, load_table, select_columns
from pipeline.records import ListedFile, extension, get_shard_kind, get_shard_stem, is_image, stem
from pipeline.sources.listing import abbreviate
from pipeline.sources.sidecars import MetadataIndex
from pipeline.storage.reading import open_stream, read_file


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of the sources. files: the other files. schemas: the columns that the tables offer. notes: lines."""

    index: MetadataIndex
    files: list[ListedFile]
    schemas: list[pa.Schema]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class TableReader:
    """The settings with which tables are read."""

    options: Mapping[str, Any]
    limits: Limits
    encoding: str
    image_column: str | None

    def load(self, file: ListedFile, rule: NameRule) -> Table:
        """Return a table as it is now."""
        return load_table(file.url, self.options, None, rule, self.limits, self.encoding)

    def is_metadata(self, file: ListedFile) -> bool:
        """Whether a file that may be metadata is a table: not a Parquet file with images, nor another JSON file."""
        if file.path.endswith(f"/{LABEL_TABLE}"):
            content = read_file(file.url, self.options, self.limits.table_bytes)
            try:
                parsed = json.loads(content)
            except (ValueError, RecursionError):
                return False
            return isinstance(parsed, dict) and isinstance(parsed.get(LABELS), list)
        if extension(file.path) != "parquet":
            return True
        return not any(contains_bytes(column.type) for column in self.read_schema(file))

    def read_schema(self, file: ListedFile) -> pa.Schema:
        """Return the columns of a Parquet file."""
        url, limits = file.url, self.limits
        with open_stream(url, self.options, seeking=True) as stream, open_parquet(stream, url, limits) as parquet:
            return parquet.schema_arrow


@dataclass(slots=True)
class Comparison:
    """Rows without an image, and images without a row."""

    rows: int = 0
    images: int = 0
    without_image: list[str] = field(default_factory=list)
    without_row: list[str] = field(default_factory=list)

    def add(self, path: str, table: Table, images: Sequence[str]) -> None:
        """Compare a table with the images to which it is the nearest one. Raises SourceError for repeated rows."""
        names = {name_in_table(image, path): image for image in images}
        if repeated := [name for name in table.find_repeated_names() if name in names]:
            raise SourceError(
                f"{path} has several rows of one image: {abbreviate(repeated)}; keep one of them, or give the table "
                "itself as the source, with --key-column"
            )
        wanted = pa.array(list(names), pa.large_string())
        is_known = pc.is_in(table.names, wanted)
        self.rows += len(table.names)
        self.images += len(images)
        self.without_image += table.names.filter(pc.invert(is_known)).to_pylist()
        self.without_row += [
            names[name] for name in wanted.filter(pc.invert(pc.is_in(wanted, table.names))).to_pylist()
        ]

    def describe(self) -> Iterator[str]:
        """Yield a line for each kind."""
        if self.without_row:
            images = f"{len(self.without_row):,} of {self.images:,} ({abbreviate(self.without_row)})"
            yield f"images without a row in their metadata, whose columns are null: {images}"
        if self.without_image:
            names = abbreviate([str(name) for name in self.without_image])
            rows = f"{len(self.without_image):,} of {self.rows:,} ({names})"
            yield f"rows of metadata without an image: {rows}"


def find_tables(files: Sequence[ListedFile], reader: TableReader) -> Metadata:
    """Separate the tables of metadata from the other files, and compare their rows with the images.

    Raises SourceError if a folder has two tables, if one cannot be read, or if two of its rows are of one sample.
    """
    images = [file.path for file in files if is_image(file.path)]
    tars = [file.path for file in files if get_shard_kind(file.path) in ("tar", "zip")]
    candidates = {file.path: file for file in _find_candidates(files, images, tars)}
    for_images: dict[str, ListedFile] = {}
    for_tars: dict[str, ListedFile] = {}
    schemas: list[pa.Schema] = []
    comparison, unusable = Comparison(), list[str]()
    try:
        candidates = {path: file for path, file in candidates.items() if reader.is_metadata(file)}
        _check_single(candidates)
        by_table: dict[str, list[str]] = {}
        for path in (*images, *tars) if candidates else ():
            if nearest := find_metadata(path, candidates):
                by_table.setdefault(nearest, []).append(path)
        for path, inputs in sorted(by_table.items()):
            file, below = candidates[path], [image for image in inputs if is_image(image)]
            if below and (table := reader.load(file, make_rule(path, reader.image_column))).column:
                for_images[path] = file
                schemas.append(select_columns(table.rows.schema, table.column))
                comparison.add(path, table, below)
            if len(below) < len(inputs) and (table := reader.load(file, KEY_RULE)).column:
                _check_keys(path, table)
                for_tars[path] = file
                schemas.append(select_columns(table.rows.schema))
            if path not in for_images and path not in for_tars:
                unusable.append(path)
    except ShardError as error:
        raise SourceError(str(error)) from error
    notes = [*comparison.describe()]
    if unusable:
        notes.append(f"metadata without a column that names images (file_name; for tars: key): {abbreviate(unusable)}")
    index = MetadataIndex(for_images, for_tars)
    tables = index.files
    others = [file for file in files if file.path not in tables] if tables else list(files)
    return Metadata(index, others, schemas, notes)


def _find_candidates(files: Sequence[ListedFile], images: Sequence[str], tars: Sequence[str]) -> Iterator[ListedFile]:
    """Yield the files that may be metadata, by their names. They may also be Parquet files with images."""
    folders = {get_folder(image) for image in images}
    candidates = []
    for file in files:
        is_named = file.path.rpartition("/")[2] in METADATA_NAMES
        if is_named or (extension(file.path) == "parquet" and f"{stem(file.path)}/" in folders):
            candidates.append(file)
    if candidates:
        stems = {stem(path) for path in images} | {get_shard_stem(path) for path in tars}
        yield from (file for file in candidates if stem(file.path) not in stems)


def _check_keys(path: str, table: Table) -> None:
    """Raise SourceError if a table of tars has a key twice, because it is unknown which row is the sample's."""
    if repeated := table.find_repeated_names():
        raise SourceError(
            f"{path} has several rows of one sample: {abbreviate(repeated)}; keep one of them, or put a table with the "
            "keys of its tars into the folder of each tar"
        )


def _check_single(tables: Iterable[str]) -> None:
    """Raise SourceError if a folder has two tables."""
    by_folder: dict[str, str] = {}
    for path in tables:
        if path.rpartition("/")[2] in METADATA_NAMES:
            other = by_folder.setdefault(get_folder(path), path)
            if other != path:
                raise SourceError(f"{other} and {path} are both metadata of one folder; leave one out with --exclude")
