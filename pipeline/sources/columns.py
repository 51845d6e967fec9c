"""Find the columns that the sources offer, before a cache is created.

A few files of each kind are inspected, spread evenly. The others are checked when they are read. Damaged files are
skipped here, and named when their units fail.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import islice

import pyarrow as pa

from pipeline.errors import DamagedError, NoImagesError, ShardError, SourceError, StorageError
from pipeline.formats.schema import RESERVED_NAMES, PassthroughColumns
from pipeline.limits import Limits
from pipeline.readers import parquet
from pipeline.readers.tar import read_members
from pipeline.records import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, ListedFile, Unit, extension
from pipeline.storage import connection, reading

FILES = 16
MORE_FILES = 256
IN_TARS = {"latent.npy", "latent_flipped.npy", "moments.npy", "moments_flipped.npy", "latent.json"}  # of a cache
RESERVED = IN_TARS | RESERVED_NAMES  # names in the cache's own files
MEMBERS = 64  # members of a tar that are inspected


def find_columns(
    files: Sequence[ListedFile],
    units: Sequence[Unit],
    options: Mapping[str, str],
    image_column: str | None,
    wanted: Sequence[str] | None,
    limits: Limits,
    key_column: str | None = None,
    captions: Sequence[str] = TEXT_EXTENSIONS,
    tables: Sequence[pa.Schema] = (),
) -> PassthroughColumns:
    """Return the columns to copy. wanted: their names; default: all except binary ones.

    files: as listed. units: made of these files. captions: the texts that are copied by default.
    tables: the columns of metadata.
    Raises SourceError if no source has a wanted column, if types are incompatible, if Parquet files have no images, or
    if a Parquet file lacks `image_column` or `key_column`.
    """
    parquets = {unit.url for unit in units if unit.kind == "parquet"}
    tars = [unit.url for unit in units if unit.kind == "tar"]
    try:
        _check_tars(tars, options, limits)
        only_parquet = all(unit.kind == "parquet" for unit in units)
        schema = _read_schema(sorted(parquets), tars, options, image_column, key_column, limits, only_parquet, tables)
        texts = _find_texts(files, tars, options, wanted, limits, captions)
    except ShardError as error:
        raise SourceError(str(error)) from error
    if wanted is None:
        texts = [name for name in texts if name in captions]
        chosen = [field.name for field in schema if not parquet.holds_bytes(field.type)]
        wanted = [*texts, *(name for name in chosen if name not in texts)]
    for name in wanted:
        if name not in texts and name not in schema.names:
            available = [*texts, *(name for name in schema.names if name not in texts)]
            near = get_close_matches(name, available, 1)
            raise SourceError(
                f"--columns: there is no column {name} in the sources"
                + (f"; did you mean {near[0]}?" if near else f"; they have {', '.join(available) or 'none'}")
            )
    types = {name: pa.string() for name in texts} | {field.name: field.type for field in schema}
    _check_texts(types, texts, wanted)
    members = [name for name in wanted if name in texts or (name in captions and is_text(types[name]))]
    return PassthroughColumns(pa.schema([(name, types[name]) for name in wanted]), tuple(members))


def _read_schema(
    parquets: list[str],
    tars: list[str],
    options: Mapping[str, str],
    image_column: str | None,
    key_column: str | None,
    limits: Limits,
    only_parquet: bool,
    tables: Sequence[pa.Schema],
) -> pa.Schema:
    """Return one schema of the columns of Parquet files with images, of img2dataset's metadata beside tars, and tables.

    only_parquet: whether the sources have only Parquet files. A column that has no type in any inspected file, because
    it has only nulls, becomes text.
    """

    def read_image_file_columns(url: str) -> pa.Schema:
        with reading.open_stream(url, options) as stream:
            return parquet.read_available_columns(stream, url, image_column, limits, key_column)

    def read_metadata_columns(tar: str) -> pa.Schema | None:
        url = connection.sibling_url(tar)
        if not connection.exists(url, options):
            return None
        with reading.open_stream(url, options) as stream:
            return parquet.read_available_metadata_columns(stream, url, limits)

    schemas = [
        *_read_image_schemas(read_image_file_columns, parquets, only_parquet),
        *_read_undamaged(read_metadata_columns, _pick_spread(tars)),
        *tables,
    ]
    try:
        fields = pa.unify_schemas(schemas, promote_options="permissive") if schemas else ()
        return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in fields])
    except pa.ArrowException as error:
        raise SourceError(
            f"the sources have columns with the same name and incompatible types; rename them: {error}"
        ) from error


def _check_tars(tars: list[str], options: Mapping[str, str], limits: Limits) -> None:
    """Raise ShardError if one of a few tars is compressed. Any other problem of a tar fails only its own unit."""

    def check(url: str) -> None:
        with contextlib.suppress(DamagedError, StorageError), reading.open_stream(url, options, seeking=True) as stream:
            next(read_members(stream, url, limits=limits), None)

    with ThreadPoolExecutor(FILES) as pool:
        list(pool.map(check, _pick_spread(tars)))


def _read_image_schemas(inspect: Callable[[str], pa.Schema], urls: list[str], only_parquet: bool) -> list[pa.Schema]:
    """Return the schemas of a few files. If none of them has images, inspect more files until one has.

    Raises NoImagesError if no file has images and the sources have nothing else (`only_parquet`). Otherwise at most
    MORE_FILES files are inspected.
    """
    refused: list[NoImagesError] = []

    def inspect_or_note(url: str) -> pa.Schema | None:
        try:
            return inspect(url)
        except NoImagesError as error:
            refused.append(error)
            return None

    schemas = _read_undamaged(inspect_or_note, _pick_spread(urls))
    limit = len(urls) if only_parquet else MORE_FILES
    for start in range(0, min(len(urls), limit), FILES):
        if schemas or not refused:
            break
        with contextlib.suppress(DamagedError):
            schemas = _read_undamaged(inspect_or_note, urls[start : start + FILES])
    if refused and only_parquet and not schemas:
        raise refused[0]
    return schemas


def _read_undamaged(inspect: Callable[[str], pa.Schema | None], urls: list[str]) -> list[pa.Schema]:
    """Return the schemas of the files that exist and are not damaged. Units of damaged files fail later, by name.

    Raises DamagedError if all existing files are damaged, because the columns are then unknown.
    """

    def inspect_or_return_error(url: str) -> pa.Schema | DamagedError | None:
        try:
            return inspect(url)
        except DamagedError as error:
            return error

    with ThreadPoolExecutor(FILES) as pool:
        results = [result for result in pool.map(inspect_or_return_error, urls) if result is not None]
    schemas = [result for result in results if not isinstance(result, DamagedError)]
    for error in results:
        if isinstance(error, DamagedError) and not schemas:
            raise error
    return schemas


def _pick_spread(urls: list[str]) -> list[str]:
    """Return up to FILES of the URLs, spread evenly."""
    count = min(FILES, len(urls))
    return [urls[number * len(urls) // count] for number in range(count)]


def _find_texts(
    files: Sequence[ListedFile],
    tars: list[str],
    options: Mapping[str, str],
    wanted: Sequence[str] | None,
    limits: Limits,
    captions: Sequence[str],
) -> list[str]:
    """Return the texts that tars and folders offer: captions always, others if one is found."""
    found: set[str] = set()
    if set(wanted or ()) - set(captions):
        found |= _find_member_extensions(tars, options, limits)
    has_images = any(extension(file.path) in IMAGE_EXTENSIONS for file in files)
    if has_images:
        found |= {extension(file.path) for file in files} - {"tar", "parquet"}
    if tars or has_images:
        found |= set(captions)
    others = sorted(found - IMAGE_EXTENSIONS - set(captions) - RESERVED)
    return [*(name for name in captions if name in found), *others]


def _find_member_extensions(tars: list[str], options: Mapping[str, str], limits: Limits) -> set[str]:
    """Return the extensions of the first members of the first undamaged tar, and of damaged tars before it."""
    found: set[str] = set()
    for tar in _pick_spread(tars):
        try:
            with reading.open_stream(tar, options) as stream:
                for member in islice(read_members(stream, tar, limits=limits), MEMBERS):
                    found.add(member.extension)
            break
        except DamagedError:
            continue
    return found


def is_text(kind: object) -> bool:
    """Whether an Arrow type is text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _check_texts(types: Mapping[str, object], texts: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise SourceError if a name is a text beside images and has another type in a Parquet file."""
    for name in wanted:
        if name in texts and not is_text(types[name]):
            raise SourceError(
                f"{name} is text beside images and {types[name]} in a Parquet file; leave it out with --columns"
            )
