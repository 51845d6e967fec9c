"""Find the columns that the sources offer, before a cache is created.

A few files of each kind are inspected, spread evenly. The others are checked when they are read. Damaged files are
skipped here, and named when their units fail.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from typing import TypeVar

import pyarrow as pa

from latentmill.part_files import FLIPPED_MEMBERS, LATENT_MEMBERS, SAMPLE_JSON
from pipeline.errors import DamagedError, NoImagesError, ShardError, SourceError
from pipeline.formats.schema import RESERVED_NAMES, PassthroughColumns
from pipeline.limits import Limits
from pipeline.readers import arrow, parquet
from pipeline.readers.image_column import contains_bytes, is_text
from pipeline.readers.partitions import parse_partitions
from pipeline.records import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, ListedFile, extension, get_shard_kind
from pipeline.sources.archives import FILES, check_archives, find_member_extensions, get_member_type, pick_spread
from pipeline.storage import connection, reading

T = TypeVar("T")
MORE_FILES = 256
IN_TARS = {name.removeprefix(".") for name in (*LATENT_MEMBERS, *FLIPPED_MEMBERS, SAMPLE_JSON)}  # of a cache
RESERVED = IN_TARS | RESERVED_NAMES  # names in the cache's own files


def find_columns(
    files: Sequence[ListedFile],
    inputs: Mapping[str, Sequence[ListedFile]],
    options: Mapping[str, str],
    image_column: str | None,
    wanted: Sequence[str] | None,
    limits: Limits,
    key_column: str | None = None,
    captions: Sequence[str] = TEXT_EXTENSIONS,
    tables: Sequence[pa.Schema] = (),
) -> PassthroughColumns:
    """Return the columns to copy. wanted: their names; default: all except binary ones.

    files: as listed. inputs: those that units are made of, by kind (`units.group_inputs`). captions: the texts that are
    copied by default. tables: the columns of metadata.
    Raises SourceError if no source has a wanted column, if types are incompatible, if Parquet files have no images, or
    if a Parquet file lacks `image_column` or `key_column`.
    """
    paths = {file.url: file.path for kind in ("parquet", "arrow") for file in inputs.get(kind, ())}
    tars = inputs.get("tar", ())
    archives = [*tars, *inputs.get("zip", ())]
    try:
        check_archives(archives, options, image_column, limits, only_zips=inputs.keys() == {"zip"})
        only_tables = inputs.keys() <= {"parquet", "arrow"}
        schema = _read_schema(paths, tars, options, image_column, key_column, limits, only_tables, tables)
        texts = _find_texts(files, archives, options, wanted, image_column, limits, captions)
    except ShardError as error:
        raise SourceError(str(error)) from error
    if wanted is None:
        texts = [name for name in texts if name in captions]
        chosen = [field.name for field in schema if not contains_bytes(field.type)]
        wanted = [*texts, *(name for name in chosen if name not in texts)]
    for name in wanted:
        if name not in texts and name not in schema.names:
            available = [*texts, *(name for name in schema.names if name not in texts)]
            near = get_close_matches(name, available, 1)
            raise SourceError(
                f"--columns: there is no column {name} in the sources"
                + (f"; did you mean {near[0]}?" if near else f"; they have {', '.join(available) or 'none'}")
            )
    types = {name: get_member_type(name) for name in texts} | {field.name: field.type for field in schema}
    _check_texts(types, texts, wanted)
    if empty := [name for name in wanted if _has_empty_struct(types[name])]:
        raise SourceError(f"the column {empty[0]} has objects without fields only; leave it out with --columns")
    members = [name for name in wanted if name in texts or (name in captions and is_text(types[name]))]
    return PassthroughColumns(pa.schema([(name, types[name]) for name in wanted]), tuple(members))


def _read_schema(
    paths: Mapping[str, str],
    tars: Sequence[ListedFile],
    options: Mapping[str, str],
    image_column: str | None,
    key_column: str | None,
    limits: Limits,
    only_tables: bool,
    tables: Sequence[pa.Schema],
) -> pa.Schema:
    """Return one schema of the columns of tables with images, of img2dataset's metadata beside tars, and of `tables`.

    paths: of Parquet and Arrow files, by URL. only_tables: whether the sources have nothing else. A column
    that has no type in any inspected file, because it has only nulls, becomes text.
    """

    def read_image_file_columns(url: str) -> pa.Schema:
        reader = parquet if get_shard_kind(url) == "parquet" else arrow
        with reading.open_stream(url, options) as stream:
            schema = reader.read_available_columns(stream, url, image_column, limits, key_column)
        partitions = parse_partitions(paths[url])
        return pa.schema([*schema, *((name, pa.string()) for name in partitions if name not in schema.names)])

    def read_metadata_columns(tar: ListedFile) -> pa.Schema | None:
        url = connection.sibling_url(tar.url)
        if not connection.exists(url, options):
            return None
        with reading.open_stream(url, options) as stream:
            return parquet.read_available_metadata_columns(stream, url, limits)

    schemas = [
        *_read_image_schemas(read_image_file_columns, sorted(paths), only_tables),
        *_read_undamaged(read_metadata_columns, pick_spread(tars)),
        *tables,
    ]
    try:
        fields = pa.unify_schemas(schemas, promote_options="permissive") if schemas else ()
        return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in fields])
    except pa.ArrowException as error:
        raise SourceError(
            f"the sources have columns with the same name and incompatible types; rename them: {error}"
        ) from error


def _read_image_schemas(inspect: Callable[[str], pa.Schema], urls: list[str], only_tables: bool) -> list[pa.Schema]:
    """Return the schemas of a few files. If none of them has images, inspect more files until one has.

    Raises NoImagesError if no file has images and the sources have nothing else (`only_tables`). Otherwise at most
    MORE_FILES files are inspected.
    """
    refused: list[NoImagesError] = []

    def inspect_or_note(url: str) -> pa.Schema | None:
        try:
            return inspect(url)
        except NoImagesError as error:
            refused.append(error)
            return None

    schemas = _read_undamaged(inspect_or_note, pick_spread(urls))
    limit = len(urls) if only_tables else MORE_FILES
    for start in range(0, min(len(urls), limit), FILES):
        if schemas or not refused:
            break
        with contextlib.suppress(DamagedError):
            schemas = _read_undamaged(inspect_or_note, urls[start : start + FILES])
    if refused and only_tables and not schemas:
        raise refused[0]
    return schemas


def _read_undamaged(inspect: Callable[[T], pa.Schema | None], files: Sequence[T]) -> list[pa.Schema]:
    """Return the schemas of the files that exist and are not damaged. Units of damaged files fail later, by name.

    Raises DamagedError if all existing files are damaged, because the columns are then unknown.
    """

    def inspect_or_return_error(file: T) -> pa.Schema | DamagedError | None:
        try:
            return inspect(file)
        except DamagedError as error:
            return error

    with ThreadPoolExecutor(FILES) as pool:
        results = [result for result in pool.map(inspect_or_return_error, files) if result is not None]
    schemas = [result for result in results if not isinstance(result, DamagedError)]
    for error in results:
        if isinstance(error, DamagedError) and not schemas:
            raise error
    return schemas


def _find_texts(
    files: Sequence[ListedFile],
    archives: Sequence[ListedFile],
    options: Mapping[str, str],
    wanted: Sequence[str] | None,
    image: str | None,
    limits: Limits,
    captions: Sequence[str],
) -> list[str]:
    """Return the texts that archives and folders offer: captions always, others if one is found."""
    found: set[str] = set()
    if set(wanted or ()) - set(captions):
        found |= find_member_extensions(archives, options, limits)
    has_images = any(extension(file.path) in IMAGE_EXTENSIONS for file in files)
    if has_images:
        found |= {extension(file.path) for file in files if not get_shard_kind(file.path)}
    if archives or has_images:
        found |= set(captions)
    images = {image.lower()} if image and not has_images else IMAGE_EXTENSIONS
    others = sorted(found - images - set(captions) - RESERVED)
    return [*(name for name in captions if name in found), *others]


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether a type is or contains a struct without fields, which a Parquet file cannot have."""
    fields = [kind.field(index).type for index in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not fields) or any(map(_has_empty_struct, fields))


def _check_texts(types: Mapping[str, object], texts: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise SourceError if a name is a text or a member beside images and has another type in a Parquet file."""
    for name in wanted:
        kind = get_member_type(name)
        if name in texts and types[name] != kind and not (is_text(kind) and is_text(types[name])):
            raise SourceError(
                f"{name} is {'text' if is_text(kind) else 'bytes'} beside images and {types[name]} in a Parquet file; "
                "leave it out with --columns"
            )
