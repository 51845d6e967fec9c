"""A look at the sources before a cache is begun: which columns they offer to be passed through.

A few files of each kind are looked at, spread evenly; what the others have is checked when they are read. Damaged ones
are passed over: they are named when their units fail.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import islice

import pyarrow as pa

from pipeline.errors import DamagedError, NoImagesError, ShardError, SourceError, StorageError
from pipeline.formats.schema import BASE_SCHEMA, PassthroughColumns
from pipeline.limits import Limits
from pipeline.readers import parquet
from pipeline.readers.tar import read_members
from pipeline.records import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, Shard, Unit, extension
from pipeline.storage import store

FILES = 16
MORE_FILES = 256
MEMBERS = 64  # of a tar


def find_columns(
    shards: Sequence[Shard],
    units: Sequence[Unit],
    options: Mapping[str, str],
    image_column: str | None,
    wanted: Sequence[str] | None,
    limits: Limits,
) -> PassthroughColumns:
    """The columns to pass through: those that are wanted, else all but the binary ones.

    shards: as listed; units: what is made of them. Raises SourceError for a wanted one that is nowhere, for types that
    do not go together, and for Parquet files without images.
    """
    parquets = {unit.url for unit in units if unit.kind == "parquet"}
    tars = [unit.url for unit in units if unit.kind == "tar"]
    try:
        _check_tars(tars, options, limits)
        alone = all(unit.kind == "parquet" for unit in units)
        schema = _schema(sorted(parquets), tars, options, image_column, limits, alone)
        texts = _texts(shards, tars, options, wanted, limits)
    except ShardError as error:
        raise SourceError(str(error)) from error
    if wanted is None:
        texts = [name for name in texts if name in TEXT_EXTENSIONS]
        chosen = [field.name for field in schema if not parquet.holds_bytes(field.type)]
        wanted = [*texts, *(name for name in chosen if name not in texts)]
    for name in wanted:
        if name not in texts and name not in schema.names:
            there = [*texts, *(name for name in schema.names if name not in texts)]
            near = get_close_matches(name, there, 1)
            raise SourceError(
                f"--columns: there is no column {name} in the sources"
                + (f"; did you mean {near[0]}?" if near else f"; they have {', '.join(there) or 'none'}")
            )
    types = {name: pa.string() for name in texts} | {field.name: field.type for field in schema}
    _check_texts(types, texts, wanted)
    members = [name for name in wanted if name in texts or (name in TEXT_EXTENSIONS and is_text(types[name]))]
    return PassthroughColumns(pa.schema([(name, types[name]) for name in wanted]), tuple(members))


def _schema(
    parquets: list[str],
    tars: list[str],
    options: Mapping[str, str],
    image_column: str | None,
    limits: Limits,
    alone: bool,
) -> pa.Schema:
    """The columns of Parquet files with images, and of img2dataset's beside tars, in one schema.

    alone: whether the sources have nothing but Parquet files. What has no type anywhere, as nothing but null is seen of
    it, is text.
    """

    def of_images(url: str) -> pa.Schema:
        with store.open_stream(url, options) as stream:
            return parquet.available_columns(stream, url, image_column, limits)

    def beside(tar: str) -> pa.Schema | None:
        url = store.sibling_url(tar)
        if not store.exists(url, options):
            return None
        with store.open_stream(url, options) as stream:
            return parquet.available_metadata_columns(stream, url, limits)

    schemas = [*_with_images(of_images, parquets, alone), *_sound(beside, _some(tars))]
    try:
        fields = pa.unify_schemas(schemas, promote_options="permissive") if schemas else ()
        return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in fields])
    except pa.ArrowException as error:
        raise SourceError(f"the sources have columns of one name whose types do not go together: {error}") from error


def _check_tars(tars: list[str], options: Mapping[str, str], limits: Limits) -> None:
    """Raise ShardError where one of a few tars is compressed. All else that is wrong with one fails its unit alone."""

    def look(url: str) -> None:
        with contextlib.suppress(DamagedError, StorageError), store.open_stream(url, options, seeking=True) as stream:
            next(read_members(stream, url, limits=limits), None)

    with ThreadPoolExecutor(FILES) as pool:
        list(pool.map(look, _some(tars)))


def _with_images(look: Callable[[str], pa.Schema], urls: list[str], alone: bool) -> list[pa.Schema]:
    """What is seen of a few files; where none of them has images, of the next ones until one has.

    Raises NoImagesError where no file has, if they are all that there is (`alone`). Else not all are looked at.
    """
    refused: list[NoImagesError] = []

    def seen(url: str) -> pa.Schema | None:
        try:
            return look(url)
        except NoImagesError as error:
            refused.append(error)
            return None

    schemas = _sound(seen, _some(urls))
    most = len(urls) if alone else MORE_FILES
    for start in range(0, min(len(urls), most), FILES):
        if schemas or not refused:
            break
        with contextlib.suppress(DamagedError):
            schemas = _sound(seen, urls[start : start + FILES])
    if refused and alone and not schemas:
        raise refused[0]
    return schemas


def _sound(look: Callable[[str], pa.Schema | None], urls: list[str]) -> list[pa.Schema]:
    """What is seen of the files that are there and sound: of those that are damaged, the units fail, each by its name.

    Raises DamagedError where all that are there are damaged: then nobody knows the columns.
    """

    def seen(url: str) -> pa.Schema | DamagedError | None:
        try:
            return look(url)
        except DamagedError as error:
            return error

    with ThreadPoolExecutor(FILES) as pool:
        found = [one for one in pool.map(seen, urls) if one is not None]
    schemas = [one for one in found if not isinstance(one, DamagedError)]
    for error in found:
        if isinstance(error, DamagedError) and not schemas:
            raise error
    return schemas


def _some(urls: list[str]) -> list[str]:
    """Up to FILES of them, spread evenly."""
    count = min(FILES, len(urls))
    return [urls[number * len(urls) // count] for number in range(count)]


def _texts(
    shards: Sequence[Shard],
    tars: list[str],
    options: Mapping[str, str],
    wanted: Sequence[str] | None,
    limits: Limits,
) -> list[str]:
    """The text members that tars and folders offer: captions and metadata always, others where one is seen."""
    seen: set[str] = set()
    if set(wanted or ()) - set(TEXT_EXTENSIONS):
        seen |= _members(tars, options, limits)
    images = any(extension(shard.path) in IMAGE_EXTENSIONS for shard in shards)
    if images:
        seen |= {extension(shard.path) for shard in shards} - {"tar", "parquet"}
    if tars or images:
        seen |= set(TEXT_EXTENSIONS)
    taken = {*BASE_SCHEMA.names, "latent.npy", "latent.json", "moments.npy"}  # what we call things ourselves
    others = sorted(seen - IMAGE_EXTENSIONS - set(TEXT_EXTENSIONS) - taken)
    return [*(name for name in TEXT_EXTENSIONS if name in seen), *others]


def _members(tars: list[str], options: Mapping[str, str], limits: Limits) -> set[str]:
    """The extensions of a tar's first members: of the first one that is sound so far, or of all up to their damage."""
    seen: set[str] = set()
    for tar in _some(tars):
        try:
            with store.open_stream(tar, options) as stream:
                for member in islice(read_members(stream, tar, limits=limits), MEMBERS):
                    seen.add(member.extension)
            break
        except DamagedError:
            continue
    return seen


def is_text(kind: object) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _check_texts(types: Mapping[str, object], texts: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise SourceError where a name is a text here and something else in a Parquet file."""
    for name in wanted:
        if name in texts and not is_text(types[name]):
            raise SourceError(
                f"{name} is text beside images and {types[name]} in a Parquet file; leave it out with --columns"
            )
