"""Read the images that a manifest names: a table with the path or the URL of one image per row.

A unit has `ROWS_PER_UNIT` rows. Paths are relative to the manifest's folder, or to another root that the user gives.
The content of a manifest never leads to a file outside that root.
"""

import posixpath
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from latentmill.folder import has_password
from pipeline.errors import Rejected, ShardError, StorageError
from pipeline.limits import Limits, check_key
from pipeline.prefetch import map_in_order
from pipeline.readers.folder import READERS
from pipeline.readers.table import URL_COLUMNS, NameRule, Table, find_path_column, load_table
from pipeline.readers.table_rows import convert_rows
from pipeline.records import PlannedFile, Reject, Sample, Unit, is_image, join_url, stem
from pipeline.storage.connection import find_first_cause, http_status
from pipeline.storage.reading import check_has_files, read_file, read_file_if_exists
from pipeline.text import escape_key, hide_credentials, printable_key

ROWS_PER_UNIT = 256
HTTP = frozenset({"http", "https"})
SCHEMES = HTTP | {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf"}  # that rows may name
# Content that its server compresses would be decompressed in memory at once, whatever its size.
HTTP_OPTIONS: Mapping[str, Any] = {
    "headers": {"Accept-Encoding": "identity"},
    "client_kwargs": {"auto_decompress": False},
}
# tried in this order for a path without the extension of an image, such as a key of sd-scripts without --full_path
ADDED_EXTENSIONS = tuple(f".{end}" for ends in ("jpg", "png", "webp", "jpeg", "bmp") for end in (ends, ends.upper()))
# HTTP: the same answer for every try; 0 stands for too many redirects
REFUSED = frozenset({0, 400, 401, 402, 403, 404, 405, 406, 410, 414, 451})


def find_location_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """Return the column with the paths or URLs of the images; None if there is none."""
    return find_path_column(schema, wanted, URL_COLUMNS)


def read_manifest_unit(
    unit: Unit,
    options: Mapping[str, Any],
    wanted: pa.Schema,
    image_column: str | None,
    key_column: str | None,
    limits: Limits,
    encoding: str = "utf-8",
    with_images: bool = True,
) -> Iterator[Sample | Reject]:
    """Yield the images of a range of rows. Several are read at once by separate threads.

    wanted: the columns to copy. with_images: if not, images are not read, and have no bytes.
    Rejects (stage "read"): `no_image`, `no_key`, `bad_key`, `duplicate_key`, `not_found`,
    `outside_root`, `unreadable`, `bad_text`. Raises SourceError if the folder of the images is missing or empty.
    """
    root = unit.files or unit.root
    rule = make_key_rule(image_column, key_column, root)
    table = load_table(unit.url, options, PlannedFile(unit.path, unit.bytes, unit.etag), rule, limits, encoding)
    column = check_columns_exist(table, unit.url, image_column, key_column)
    first = unit.range[0] * ROWS_PER_UNIT if unit.range else 0
    rows = table.rows.slice(first, ROWS_PER_UNIT)
    paths, columns = rows[column].to_pylist(), convert_rows(rows, wanted, unit.url)

    def read_sample(position: int) -> Sample | Reject:
        key = table.names[first + position].as_py() or ""
        try:
            for value in columns[position].values():
                if isinstance(value, Rejected):
                    raise value
            location = resolve_path(paths[position], root)
            if not key and key_column is not None:
                raise Rejected("read", "no_key")
            check_key(key, limits)
            if table.find(key) != first + position:
                raise Rejected("read", "duplicate_key")
            image = _read_image(location, root, options, limits) if with_images else b""
            return Sample(position, key, image, columns[position])
        except Rejected as error:
            return Reject.from_error(position, printable_key(key, limits.key_bytes), error)

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
    try:
        yield from map_in_order(pool, read_sample, range(len(paths)), READERS)
    finally:
        pool.shutdown(cancel_futures=True)


def make_key_rule(image_column: str | None, key_column: str | None, root: str) -> NameRule:
    """Return how the rows get their keys: from the key column, or from the path below the root.

    The key of a URL is the number of its row.
    """

    def make_keys(values: pa.ChunkedArray) -> pa.ChunkedArray:
        texts = values.to_pylist()
        if key_column is None:
            texts = [_make_key(path, row, root) for row, path in enumerate(texts)]
        escaped = [text and escape_key(text) for text in texts]
        return pa.chunked_array([pa.array(escaped, pa.large_string())])

    def find_column(schema: pa.Schema) -> str | None:
        name = find_location_column(schema, image_column) if key_column is None else key_column
        return name if name in schema.names else None

    return NameRule(f"rows {image_column} {key_column} {root}", find_column, make_keys)


def _make_key(path: str | None, row: int, root: str) -> str:
    """Return the key of a row without a key column, before it is escaped."""
    try:
        location = resolve_path(path, root)
    except Rejected:
        return str(row)
    if "://" in location:
        return str(row)
    return stem(location) if is_image(location) else location


def check_columns_exist(table: Table, url: str, image_column: str | None, key_column: str | None) -> str:
    """Return the column with the paths of a manifest. Raises ShardError if it lacks this column, or the key column."""
    names = ", ".join(table.rows.schema.names) or "no columns"
    column = find_location_column(table.rows.schema, image_column)
    if column is None:
        raise ShardError(f"{url} has no column with the paths of images: it has {names}; name one with --image-column")
    if not table.column:
        raise ShardError(f"--key-column: {url} has no column {key_column}; it has {names}")
    return column


def resolve_path(path: str | None, root: str) -> str:
    """Return a row's path relative to the root, or its URL.

    Raises Rejected for a path that is outside the root, and for a URL that is not of a remote store, or has a password.
    """
    if not path:
        raise Rejected("read", "no_image")
    path = path.removeprefix("file://")
    scheme, separator, rest = path.partition("://")
    if separator:
        scheme = scheme.lower()
        if scheme not in SCHEMES or "\0" in path or has_password(path):
            raise Rejected("read", "outside_root")
        host, _, name = rest.partition("/")
        if not host or (not name and scheme not in HTTP):
            raise Rejected("read", "not_found")
        return f"{scheme}://{rest}"
    below = posixpath.normpath(path.replace("\\", "/"))
    if below.startswith("/"):
        folder = posixpath.normpath(root) + "/"
        if not below.startswith(folder):
            raise Rejected("read", "outside_root")
        below = below[len(folder) :]
    if below.split("/")[0] == ".." or "\0" in below:
        raise Rejected("read", "outside_root")
    return below


def _read_image(location: str, root: str, options: Mapping[str, Any], limits: Limits) -> bytes:
    """Return the bytes of an image. location: of `resolve_path`.

    Raises Rejected if there is no such image. No error contains the credentials of a URL.
    """
    if "://" not in location:
        url = join_url(root, location)
        for ending in ("",) if is_image(location) else ("", *ADDED_EXTENSIONS):
            data = read_file_if_exists(url + ending, options, limits.image_bytes)
            if data is not None:
                return data
        check_has_files(root, options)
        raise Rejected("read", "not_found")
    try:
        data = _read_url(location, root, options, limits)
    except StorageError as error:
        if _get_server(location)[0] in (*HTTP, "hf") and isinstance(find_first_cause(error), ValueError):
            raise Rejected("read", "not_found") from error  # the URL is not valid
        raise StorageError(hide_credentials(str(error)), may_pass=error.may_pass) from error
    if data is None:
        raise Rejected("read", "not_found")
    return data


def _read_url(url: str, root: str, options: Mapping[str, Any], limits: Limits) -> bytes | None:
    """Return the bytes of an image at a URL, or None if there is none."""
    if _get_server(url)[0] not in HTTP:
        return read_file_if_exists(url, options, limits.image_bytes)
    is_same_server = _get_server(url) == _get_server(root)  # for others, the options may be credentials of a stranger
    return _read_http(url, {**HTTP_OPTIONS, **(options if is_same_server else {})}, limits)


def _get_server(url: str) -> tuple[str, str]:
    """Return the scheme and the host of a URL, with its port."""
    scheme, _, rest = url.lower().partition("://")
    return scheme, rest.partition("/")[0]


def _read_http(url: str, options: Mapping[str, Any], limits: Limits) -> bytes | None:
    """Return the bytes of an image on a web server. Raises StorageError if the server does not answer.

    fsspec raises FileNotFoundError for any error. Only its first cause shows what happened.
    """
    try:
        return read_file(url, options, limits.image_bytes)
    except StorageError as error:
        cause = find_first_cause(error)
        if http_status(error) in REFUSED or isinstance(cause, FileNotFoundError):
            return None
        reason = str(cause) or type(cause).__name__
        raise StorageError(f"cannot read {url}: {reason:.200}", may_pass=True) from error
