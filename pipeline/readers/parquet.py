"""Images in a Parquet file: a column of bytes, or of Hugging Face's `{bytes, path}`; and columns beside them.

Only the columns that are needed are read, a few pages at a time, whatever the size of a row group. A unit is a range of
the file's bytes and has the row groups whose middle byte falls in it, so that units follow from the file's size alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.arrow_values import has_times
from pipeline.errors import DamagedError, NoImagesError, Rejected, ShardError
from pipeline.formats.schema import cache_column_name, source_column_name
from pipeline.limits import DEFAULT_LIMITS, Limits, check_key, printable_key
from pipeline.readers import parquet_footer
from pipeline.readers.parquet_keys import FileKeys, Known
from pipeline.records import Reject, Sample
from pipeline.values import to_json_value

SMALLEST = 12  # bytes of a Parquet file: two marks and the size of its footer
ROWS_AT_ONCE = 16
READ_AT_ONCE = 4 << 20  # bytes of one column
NO_IMAGES = "no_images"  # what a unit's report counts of files that it passed over
KEY = "key"  # of img2dataset's metadata
_IMAGE_COLUMN_NAMES = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "img",
    "picture",
    "bytes",
)  # where several columns are binary


@contextmanager
def open_parquet(stream: BinaryIO, url: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[pq.ParquetFile]:
    """A Parquet file. Raises DamagedError, which names the URL, where it or what is read of it is damaged: at the place
    of its footer, where nothing else is known."""
    size = stream.seek(0, 2)
    if size < SMALLEST:  # checked first: stores refuse to seek before the start, each in its own way
        raise DamagedError(f"{url} is not a Parquet file: it has {size} bytes", at=0)
    stream.seek(size - 8)
    end = stream.read(8)
    if end[4:] != b"PAR1":
        raise DamagedError(f"{url} is not a Parquet file, or is cut off: it has no end mark", at=size - 8)
    footer = max(0, size - 8 - int.from_bytes(end[:4], "little"))
    if int.from_bytes(end[:4], "little") > limits.footer_bytes:
        said = f"{url} has a footer of more than {limits.footer_bytes} bytes: that is more than is read"
        raise DamagedError(said, at=footer)
    stream.seek(0)
    with damage_at(footer, url):
        file = pq.ParquetFile(stream, buffer_size=READ_AT_ONCE, pre_buffer=False, page_checksum_verification=True)
        for name, count in Counter(file.schema_arrow.names).items():
            if count > 1:
                raise ShardError(f"{url} has {count} columns called {name}")
        yield file


@contextmanager
def damage_at(place: int, url: str) -> Iterator[None]:
    """Take Arrow's errors for damage of the file at this byte."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns that are no text
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{url} cannot be read as Parquet: {reason}", at=place) from error


def find_image_column(schema: pa.Schema, wanted: str | None, url: str) -> str:
    """The column with the images: `wanted`, else the only one there can be.

    A column without any value may have no type: where it is called like one of images, it is one without images.
    Raises NoImagesError where nothing in the file may be images; ShardError where something may be, but is nothing
    that is read, and where there is more than one column and none is called like one.
    """
    there = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in _IMAGE_COLUMN_NAMES if name in there]
    empty = [name for name in _IMAGE_COLUMN_NAMES if name in schema.names and _has_no_type(schema.field(name).type)]
    if wanted is not None:
        if wanted not in there and not (wanted in schema.names and _has_no_type(schema.field(wanted).type)):
            what = "holds no bytes" if wanted in schema.names else f"is not there: it has {', '.join(schema.names)}"
            raise ShardError(f"{url}: the column {wanted} {what}; name another one with --image-column")
        return wanted
    if len(there) > 1 and not named and not empty:
        raise ShardError(f"{url} has several columns with bytes, {', '.join(there)}; name one with --image-column")
    if found := [*named, *empty, *there]:
        return str(found[0])
    nothing = f"{url} has no column with the bytes of images: it has {', '.join(schema.names)}"
    if near := _looks_like_images(schema):
        raise ShardError(f"{nothing}; {near}. If it is not a file of images, leave it out of the sources")
    raise NoImagesError(nothing + _addresses(schema))


def _looks_like_images(schema: pa.Schema) -> str:
    """What in a file without an image column may be images in a form that is not read, and what to do; or ""."""
    for field in schema:
        if _has_bytes_inside(field.type) and _is_list(field.type):
            return f"{field.name} is a list of images: write a row for each"
        if _has_bytes_inside(field.type):
            return f"{field.name} has bytes inside it: make them a column of their own"
    for name in _IMAGE_COLUMN_NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            return f"{name} is {kind}, not binary: decode base64 to bytes, or fetch the images that it names"
    return ""


def _addresses(schema: pa.Schema) -> str:
    """What to do with a file of addresses."""
    names = [name for name in schema.names if name.lower() in ("url", "urls", "image_url", "img_url")]
    return f"; download the images that {names[0]} names first, with img2dataset for example" if names else ""


def available_columns(
    stream: BinaryIO, url: str, image_column: str | None, limits: Limits = DEFAULT_LIMITS
) -> pa.Schema:
    """The columns that a file of images offers beside them, by their names in a cache."""
    with open_parquet(stream, url, limits) as file:
        images = find_image_column(file.schema_arrow, image_column, url)
        return _passable(file.schema_arrow, images)


def available_metadata_columns(stream: BinaryIO, url: str, limits: Limits = DEFAULT_LIMITS) -> pa.Schema:
    """The columns that img2dataset's metadata offers, the file beside a tar. Raises ShardError for another file."""
    with open_parquet(stream, url, limits) as file:
        _check_metadata(file.schema_arrow, url)
        return _passable(file.schema_arrow, None)


def read_metadata(
    stream: BinaryIO, url: str, wanted: pa.Schema, limits: Limits = DEFAULT_LIMITS
) -> dict[str, dict[str, Any]]:
    """The wanted columns of img2dataset's metadata, by key; a Rejected in place of a text that is none."""
    with open_parquet(stream, url, limits) as file:
        _check_metadata(file.schema_arrow, url)
        rows: dict[str, dict[str, Any]] = {}
        there = [
            source_column_name(name) for name in wanted.names if source_column_name(name) in file.schema_arrow.names
        ]
        for batch in file.iter_batches(columns=sorted({KEY, *there}), use_threads=False):
            values = _columns(batch, wanted, url)
            for index, key in enumerate(_keys(batch.column(KEY), KEY)):
                if isinstance(key, str):  # no sample has another one
                    rows[key] = {name: column[index] for name, column in values.items()}
        return rows


def read_parquet(
    stream: BinaryIO,
    url: str,
    size: int,
    part: tuple[int, int],
    image_column: str | None,
    key_column: str | None,
    wanted: pa.Schema,
    limits: Limits = DEFAULT_LIMITS,
    known: FileKeys | None = None,
    passed: Counter[str] | None = None,
) -> Iterator[Sample | Reject]:
    """The samples of range k of n of a Parquet file, in the order of its rows.

    size: of the file, in bytes. image_column: None for the only one there is.
    key_column: None for the number of the row in the file.
    wanted: the columns that come along, as the cache names and types them; those that are not there are left out.
    known: what is known of the file's keys. passed: a file without images has no samples, and is counted there once.
    Rejects (stage "read"): `no_key`, `bad_key`, `duplicate_key`, `no_image`, `image_not_embedded`,
    `too_many_bytes`, `bad_text`.
    Raises DamagedError where the file is damaged, ShardError where a column has another type than the cache's.
    """
    with open_parquet(stream, url, limits) as file:
        schema = file.schema_arrow
        try:
            images = find_image_column(schema, image_column, url)
        except NoImagesError:
            if passed is not None:
                passed[NO_IMAGES] += part[0] == 0
            return
        if key_column is not None and key_column not in schema.names:
            raise ShardError(f"{url} has no column {key_column} for keys: it has {', '.join(schema.names)}")
        groups = row_groups(parquet_footer.row_group_middles(stream, url), part, size)
        rows_of_groups = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        if rows_of_groups != file.metadata.num_rows:
            footer = stream.seek(0, 2) - 8 - file.metadata.serialized_size
            raise DamagedError(f"{url} is damaged: its footer says two different numbers of rows", at=footer)
        before = _keys_before(file, groups, key_column, known or FileKeys())
        seen: set[str] = set()
        names = {images, *([key_column] if key_column else []), *map(source_column_name, wanted.names)}
        rows = _rows(file, groups, sorted(names & set(schema.names)), images, key_column, wanted, url)
        for position, (row, key, image, columns) in enumerate(rows):
            name = str(row) if key is None or isinstance(key, Rejected) else _escaped(key)
            try:
                for value in (key, image, *columns.values()):
                    if isinstance(value, Rejected):
                        raise value
                if key is None and key_column is not None:
                    raise Rejected("read", "no_key")
                check_key(name, limits)
                if name in seen or name in before:
                    raise Rejected("read", "duplicate_key")
                seen.add(name)
                yield Sample(position, name, _bytes(image, limits), columns)
            except Rejected as why:
                yield Reject.of(position, printable_key(name, limits), why)


def row_groups(middles: Sequence[int], part: tuple[int, int], size: int) -> list[int]:
    """The row groups whose middle byte falls in range k of n of the file's bytes."""
    k, n = part
    return [group for group, middle in enumerate(middles) if k * size <= middle * n < (k + 1) * size]


def _rows(
    file: Any,
    groups: list[int],
    names: list[str],
    images: str,
    key_column: str | None,
    wanted: pa.Schema,
    url: str,
) -> Iterator[tuple[int, Any, Any, Mapping[str, Any]]]:
    """Number in the file, key, image and columns of each row; a few rows are held at a time."""
    for group in groups:
        first, count = sum(file.metadata.row_group(before).num_rows for before in range(group)), 0
        with damage_at(_start(file, group), url):
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names, use_threads=False):
                values = _columns(batch, wanted, url)
                keys = _keys(batch.column(key_column), key_column) if key_column else [None] * len(batch)
                for index in range(len(batch)):
                    columns = {name: column[index] for name, column in values.items()}
                    yield first + count + index, keys[index], _value(batch.column(images)[index], images), columns
                count += len(batch)
        if count != file.metadata.row_group(group).num_rows:
            said = f"{url} is damaged: row group {group} has {count} rows, its footer says otherwise"
            raise DamagedError(said, at=_start(file, group))


def _start(file: Any, group: int) -> int:
    """The first byte of a row group. Only where `footers.middles` has found that this ends no process."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    return max(0, min(int(chunk.dictionary_page_offset or chunk.data_page_offset) for chunk in chunks))


def _keys_before(file: Any, groups: list[int], key_column: str | None, known: FileKeys) -> Known:
    """The keys of the rows in front of a range, so that each is unique in the whole file."""

    def read(group: int) -> Iterator[str]:
        for batch in file.iter_batches(row_groups=[group], columns=[key_column], use_threads=False):
            yield from (_escaped(key) for key in _keys(batch.column(0), str(key_column)) if isinstance(key, str))

    return known.before(groups[0] if groups and key_column is not None else 0, read)


def _columns(batch: Any, wanted: pa.Schema, url: str) -> dict[str, list[Any]]:
    """The wanted columns that a batch has, by their names in the cache, as values of the wanted types."""
    values: dict[str, list[Any]] = {}
    for field in wanted:
        name = source_column_name(field.name)
        if name not in batch.schema.names:
            continue
        try:
            array = batch.column(name).cast(field.type)
        except pa.ArrowException as error:
            have = batch.schema.field(name).type
            raise ShardError(f"{url}: the column {name} is {have}, in the cache it is {field.type}") from error
        values[field.name] = _values(array, name)
    return values


def _keys(array: Any, name: str) -> list[Any]:
    """Keys as text, whatever their type; None where there is none, a Rejected in place of one that is no text."""
    return [_key(value, name) for value in _values(array, name)]


def _key(value: Any, name: str) -> Any:
    try:
        if isinstance(value, pa.Scalar):  # a time
            value = to_json_value(value)
        if isinstance(value, bytes):
            value = value.decode()
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)
    return value if value is None or isinstance(value, Rejected) else str(value)


def _values(array: Any, name: str) -> list[Any]:
    """The values of a column for Python, times as Arrow's own: it knows more of them.

    A Rejected in place of a text that is none (Arrow does not check them).
    """
    if has_times(array.type):
        return [_with_texts(scalar, name) for scalar in array]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar, name) for scalar in array]


def _value(scalar: Any, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)


def _with_texts(scalar: Any, name: str) -> Any:
    """A value of Arrow's whose texts, where it has some beside its times, are looked at."""
    try:
        to_json_value(scalar)
    except UnicodeDecodeError:
        return Rejected("read", "bad_text", name)
    return scalar


def _bytes(image: Any, limits: Limits) -> bytes:
    """The bytes of a value of the image column."""
    if isinstance(image, dict):
        if image["bytes"] is None and image.get("path"):
            raise Rejected("read", "image_not_embedded")
        image = image["bytes"]
    if image is None:
        raise Rejected("read", "no_image")
    if len(image) > limits.image_bytes:
        raise Rejected("read", "too_many_bytes", len(image), limits.image_bytes)
    return bytes(image)


def _escaped(key: str) -> str:
    """A key that webdataset can split: `%` and `.` written %25 and %2E."""
    return key.replace("%", "%25").replace(".", "%2E")


def _passable(schema: pa.Schema, images: str | None) -> pa.Schema:
    """What may be passed through: all but the images, dictionaries as their values."""
    types = {field.name: field.type for field in schema if field.name != images}
    plain = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in types.items()}
    return pa.schema([(cache_column_name(name), kind) for name, kind in plain.items()])


def holds_bytes(kind: Any) -> bool:
    """Whether a type is one of images: binary, or a struct with a binary field `bytes`; or a dictionary of such."""
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _has_no_type(kind: Any) -> bool:
    """Whether a type is that of a column in which all is null, or of a struct whose `bytes` are."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and bool(pa.types.is_null(kind.field(index).type))
    return bool(pa.types.is_null(kind))


def _has_bytes_inside(kind: Any) -> bool:
    """Whether a type has bytes in a list, a struct or a map."""
    inside = [kind.field(index).type for index in range(kind.num_fields)]
    return any(_is_binary(inner) or _has_bytes_inside(inner) for inner in inside)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _check_metadata(schema: pa.Schema, url: str) -> None:
    if any(holds_bytes(field.type) for field in schema):
        raise ShardError(
            f"{url} stands beside a tar of its name but has images of its own; rename it, or move it to a folder"
        )
    if KEY not in schema.names:
        raise ShardError(f"{url} stands beside a tar of its name but has no column '{KEY}' that its rows are joined by")
