"""Find the manifests among the sources: tables of image paths or URLs that the user names as files."""

import contextlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import Rejected, ShardError, SourceError
from pipeline.readers.image_column import contains_bytes
from pipeline.readers.manifest import check_columns_exist, find_location_column, make_key_rule, resolve_path
from pipeline.readers.table import TEXT_TABLES, select_columns
from pipeline.records import ListedFile, Manifest, extension, is_image, join_url, stem
from pipeline.sources.listing import abbreviate
from pipeline.sources.metadata import TableReader


@dataclass(frozen=True, slots=True)
class Manifests:
    """The files, with the manifests marked, the columns that these offer, and lines about them."""

    files: list[ListedFile]
    schemas: list[pa.Schema]
    notes: list[str]


def find_manifests(
    files: Sequence[ListedFile], reader: TableReader, key_column: str | None, image_root: str
) -> Manifests:
    """Mark the manifests among the files that the user named.

    image_root: URL of the folder of their images; "": the manifest's own. Raises SourceError if a named table has no
    paths of images, or no rows, and there are no other inputs, and if its images are listed themselves.
    """
    found: dict[str, ListedFile] = {}
    schemas: list[pa.Schema] = []
    notes: list[str] = []
    problems: list[str] = []
    named = [file for file in files if file.is_named]
    images = {stem(file.path) for file in files if is_image(file.path)} if named else set[str]()
    listed = [file.url for file in files if is_image(file.path)] if named else []
    urls = {*listed, *map(stem, listed)}  # a path in a manifest may lack its extension
    for file in named:
        if stem(file.path) in images or not _may_be_manifest(file, reader):
            continue
        root = image_root or file.root
        rule = make_key_rule(reader.image_column, key_column, root)
        try:
            table = reader.load(file, rule)
            column = check_columns_exist(table, file.url, reader.image_column, key_column)
        except ShardError as error:
            problems.append(str(error))
            continue
        if not table.rows.num_rows:
            problems.append(f"{file.url} lists no images: it has no rows")
            continue
        if urls and (twice := _find_listed(table.rows[column], root, urls)):
            raise SourceError(
                f"images of {file.path} are in the sources themselves, and would be encoded twice: {len(twice):,} "
                f"({abbreviate(twice)}); leave out the manifest, or the images"
            )
        found[file.path] = replace(file, manifest=Manifest(table.rows.num_rows, image_root))
        schemas.append(select_columns(table.rows.schema))
        notes.append(f"{file.path} lists {table.rows.num_rows:,} images, in the column {column}")
    if problems and not found and all(file.is_named and extension(file.path) in TEXT_TABLES for file in files):
        raise SourceError(problems[0])
    marked = [found.get(file.path, file) for file in files] if found else list(files)
    return Manifests(marked, schemas, notes + problems)


def _may_be_manifest(file: ListedFile, reader: TableReader) -> bool:
    """Whether a named file is a table: of text, or a Parquet file with paths and without images."""
    if extension(file.path) != "parquet":
        return extension(file.path) in TEXT_TABLES
    try:
        schema = reader.read_schema(file)
    except ShardError:  # its unit fails by name
        return False
    has_bytes = any(contains_bytes(field.type) for field in schema)
    return not has_bytes and bool(find_location_column(schema, reader.image_column))


def _find_listed(paths: pa.ChunkedArray, root: str, urls: Container[str]) -> list[str]:
    """Return the rows whose image has one of the URLs. paths: of the rows, as for `resolve_path`."""
    found = []
    for path in paths.to_pylist():
        with contextlib.suppress(Rejected):
            location = resolve_path(path, root)
            if (location if "://" in location else join_url(root, location)) in urls:
                found.append(location)
    return found
