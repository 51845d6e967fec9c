"""Turn the rows of a table, of a Parquet or an Arrow file, into samples."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from latentmill.arrow_values import has_times
from pipeline.errors import Rejected, ShardError
from pipeline.formats.schema import to_source_name
from pipeline.limits import Limits, check_key
from pipeline.readers.image_column import check_key_column, check_names, find_image_column, flatten_schema, get_column
from pipeline.records import Reject, Sample
from pipeline.text import escape_key, printable_key
from pipeline.values import to_json_value

BATCH_ROWS = 16  # rows whose values are Python objects at a time


@dataclass(frozen=True, slots=True)
class TableColumns:
    """The columns of a table that are read, by their names in its flattened schema.

    images: with the images. key: with the keys; None: the key is the number of the row. wanted: the columns to copy,
    with their names and types in the cache. names: all of these that the table has.
    """

    images: str
    key: str | None
    wanted: pa.Schema
    names: tuple[str, ...]


class TableRow(NamedTuple):
    """number: of the row in its file. A Rejected replaces text that is not UTF-8."""

    number: int
    key: Any
    image: Any
    columns: Mapping[str, Any]


def choose_columns(
    schema: pa.Schema, image_column: str | None, key_column: str | None, wanted: pa.Schema, url: str
) -> TableColumns:
    """Return the columns to read of a table with this schema. image_column: default: the only candidate.

    Raises NoImagesError if it has no images, and ShardError if it lacks a column or has several candidates.
    """
    schema = flatten_schema(schema)
    check_names(schema, url)
    images = find_image_column(schema, image_column, url)
    check_key_column(schema, key_column, images, url)
    names = {images, *([key_column] if key_column else []), *map(to_source_name, wanted.names)}
    return TableColumns(images, key_column, wanted, tuple(sorted(names & set(schema.names))))


def read_rows(batch: pa.RecordBatch, first: int, columns: TableColumns, url: str) -> Iterator[TableRow]:
    """Yield the rows of a small batch. first: the number of its first row."""
    values = convert_columns(batch, columns.wanted, url)
    keys = convert_keys(get_column(batch, columns.key), columns.key) if columns.key else [None] * len(batch)
    images = get_column(batch, columns.images)
    for index in range(len(batch)):
        row = {name: column[index] for name, column in values.items()}
        yield TableRow(first + index, keys[index], _convert_image(images[index], columns.images), row)


def make_row_samples(
    rows: Iterable[TableRow], has_keys: bool, earlier_keys: Container[str], limits: Limits
) -> Iterator[Sample | Reject]:
    """Yield a sample or a reject for each row. earlier_keys: of the rows of the file that precede these.

    Rejects (stage "read"): `no_key`, `bad_key`, `duplicate_key`, `no_image`, `image_not_embedded`, `several_images`,
    `too_many_bytes`, `bad_text`.
    """
    keys: set[str] = set()
    for position, (number, key, image, columns) in enumerate(rows):
        name = str(number) if key is None or isinstance(key, Rejected) else escape_key(key)
        try:
            for value in (key, image, *columns.values()):
                if isinstance(value, Rejected):
                    raise value
            if key is None and has_keys:
                raise Rejected("read", "no_key")
            check_key(name, limits)
            if name in keys or name in earlier_keys:
                raise Rejected("read", "duplicate_key")
            keys.add(name)
            yield Sample(position, name, _get_bytes(image, limits), columns)
        except Rejected as error:
            yield Reject.from_error(position, printable_key(name, limits.key_bytes), error)


def _convert_image(scalar: Any, name: str) -> Any:
    """Return the value of the image column: of a list, that of its only element."""
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        count = len(scalar.values) if scalar.is_valid else 0
        if count > 1:
            return Rejected("read", "several_images", count)
        return _convert_value(scalar.values[0], name) if count else None
    return _convert_value(scalar, name)


def _get_bytes(image: Any, limits: Limits) -> bytes:
    """Return the bytes of a value of the image column. Raises Rejected if there are none or too many."""
    if isinstance(image, dict):
        if image["bytes"] is None and image.get("path"):
            raise Rejected("read", "image_not_embedded")
        image = image["bytes"]
    if image is None:
        raise Rejected("read", "no_image")
    if len(image) > limits.image_bytes:
        raise Rejected("read", "too_many_bytes", len(image), limits.image_bytes)
    return bytes(image)


def convert_rows(rows: pa.Table, wanted: pa.Schema, url: str) -> list[dict[str, Any]]:
    """Return the wanted columns of each row, by name in the cache. A Rejected replaces text that is not UTF-8."""
    values = convert_columns(rows, wanted, url)
    return [{name: column[index] for name, column in values.items()} for index in range(len(rows))]


def convert_columns(batch: Any, wanted: pa.Schema, url: str) -> dict[str, list[Any]]:
    """Return the wanted columns that a batch has, by their names in the cache, cast to the wanted types."""
    values: dict[str, list[Any]] = {}
    for field in wanted:
        name = to_source_name(field.name)
        try:
            array = get_column(batch, name)
        except KeyError:
            continue
        try:
            array = array.cast(field.type)
        except pa.ArrowException as error:
            raise ShardError(
                f"{url}: the column {name} is {array.type}, but in the cache it is {field.type}"
            ) from error
        values[field.name] = _convert_values(array, name)
    return values


def convert_keys(array: Any, name: str) -> list[Any]:
    """Return keys as text, whatever their type: None for a missing key, a Rejected for one that is not UTF-8."""
    return [_convert_key(value, name) for value in _convert_values(array, name)]


def _convert_key(value: Any, name: str) -> Any:
    """Return one key as `convert_keys` does."""
    try:
        if isinstance(value, pa.Scalar):  # a time
            value = to_json_value(value)
        if isinstance(value, bytes):
            value = value.decode()
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)
    return value if value is None or isinstance(value, Rejected) else str(value)


def _convert_values(array: Any, name: str) -> list[Any]:
    """Return the values of a column as Python objects, but times as Arrow scalars, which cover more years.

    A Rejected replaces text that is not UTF-8, which Arrow does not check.
    """
    if has_times(array.type):
        return [_check_scalar(scalar, name) for scalar in array]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_convert_value(scalar, name) for scalar in array]


def _convert_value(scalar: Any, name: str) -> Any:
    """Return a scalar's Python object, or a Rejected if its text is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)


def _check_scalar(scalar: Any, name: str) -> Any:
    """Return an Arrow scalar with times unchanged, or a Rejected if it contains text that is not UTF-8."""
    try:
        to_json_value(scalar)
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)
    return scalar
