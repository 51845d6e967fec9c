"""Find the column with the images in the schema of a table, a Parquet or an Arrow file, and the columns beside it.

A column holds images as bytes, as Hugging Face's `{bytes, path}`, or as lists of one of either. A struct with bytes
inside is not a column itself: its fields are, as `STRUCT.FIELD`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.errors import NoImagesError, ShardError
from pipeline.formats.schema import to_cache_name

# preferred names if several columns have bytes
_IMAGE_COLUMN_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "bytes", "images")


def flatten_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema with the fields of structs that have bytes inside as columns of their own."""
    return pa.schema(_flatten_fields(schema))


def _flatten_fields(fields: Iterable[pa.Field]) -> Iterator[pa.Field]:
    for field in fields:
        if pa.types.is_struct(field.type) and contains_bytes(field.type) and not holds_bytes(field.type):
            yield from _flatten_fields(child.with_name(f"{field.name}.{child.name}") for child in field.type)
        else:
            yield field


def check_names(schema: pa.Schema, url: str) -> None:
    """Raise ShardError if two columns have one name."""
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise ShardError(f"{url} has {count} columns with the name {name}; rename or remove one of them")


def get_column(batch: pa.RecordBatch, name: str) -> Any:
    """Return a column of a batch by its name in the flattened schema."""
    return _get_array(dict(zip(batch.schema.names, batch.columns, strict=True)), name)


def _get_array(arrays: Mapping[str, Any], name: str) -> Any:
    if name in arrays:
        return arrays[name]
    for top, array in arrays.items():
        if name.startswith(f"{top}.") and pa.types.is_struct(array.type):
            inner = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
            return _get_array(inner, name[len(top) + 1 :])
    raise KeyError(name)


def find_image_column(schema: pa.Schema, wanted: str | None, url: str) -> str:
    """Return the name of the column with the images: `wanted`, or otherwise the only candidate.

    schema: flattened. A column without any value may have no type. If its name is an image column's, it is an image
    column without images.
    Raises NoImagesError if no column may hold images. Raises ShardError if a column may hold images in a form that is
    not supported, and if several columns hold bytes but none has the name of an image column.
    """
    if wanted is not None:
        if wanted not in schema.names or not _may_hold_images(schema.field(wanted).type):
            problem = (
                "holds no images" if wanted in schema.names else f"does not exist; columns: {', '.join(schema.names)}"
            )
            raise ShardError(f"{url}: the column {wanted} {problem}; name another one with --image-column")
        return wanted
    binary = [field.name for field in schema if holds_bytes(field.type)]
    empty = [name for name in _IMAGE_COLUMN_NAMES if name in schema.names and _has_no_type(schema.field(name).type)]
    lists = [field.name for field in schema if _is_list(field.type) and holds_bytes(field.type.value_type)]
    for candidates in (binary, empty, lists):
        if named := [name for name in _IMAGE_COLUMN_NAMES if name in candidates]:
            return named[0]
    for candidates in (binary, lists):
        inner = [name for name in candidates if name.rpartition(".")[2] in _IMAGE_COLUMN_NAMES]
        if len(inner or candidates) == 1:
            return str((inner or candidates)[0])
        if candidates:
            columns = ", ".join(inner or candidates)
            raise ShardError(f"{url} has several columns with bytes, {columns}; name one with --image-column")
    nothing = f"{url} has no column with the bytes of images: it has {', '.join(schema.names)}"
    if hint := _explain_unsupported_images(schema):
        raise ShardError(f"{nothing}; {hint}. If the file has no images, remove it from the sources")
    raise NoImagesError(nothing + _suggest_download(schema))


def _may_hold_images(kind: Any) -> bool:
    return holds_bytes(kind) or _has_no_type(kind) or (_is_list(kind) and holds_bytes(kind.value_type))


def _explain_unsupported_images(schema: pa.Schema) -> str:
    """Return which column may hold images in a form that is not supported, and a remedy; "" if there is none."""
    for field in schema:
        if contains_bytes(field.type):
            return f"{field.name} has bytes inside it ({field.type}): write them to a separate column"
    for name in _IMAGE_COLUMN_NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            return f"{name} is {kind}, not binary: decode base64 to bytes, or download the images that it names"
    return ""


def _suggest_download(schema: pa.Schema) -> str:
    """Return a remedy for a file with URLs of images; "" if there are none."""
    names = [name for name in schema.names if name.lower() in ("url", "urls", "image_url", "img_url")]
    remedy = "give the file itself as the source, or first download them, for example with img2dataset"
    return f"; to read the images that {names[0]} names, {remedy}" if names else ""


def check_key_column(schema: pa.Schema, key_column: str | None, images: str, url: str) -> None:
    """Raise ShardError if a file lacks the requested key column. images: the column with the images."""
    if key_column is not None and key_column not in schema.names:
        others = ", ".join(name for name in schema.names if name != images) or "no other column"
        raise ShardError(f"--key-column: {url} has no column {key_column}; it has {others}")


def select_passable(schema: pa.Schema, images: str | None) -> pa.Schema:
    """Return the columns that can be copied, by their names in a cache: all except the images.

    schema: flattened. Dictionaries have their value type, and views the type without views.
    """
    return pa.schema([(to_cache_name(field.name), _simplify(field.type)) for field in schema if field.name != images])


def _simplify(kind: Any) -> Any:
    if pa.types.is_dictionary(kind):
        return _simplify(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def holds_bytes(kind: Any) -> bool:
    """Whether a type can hold an image: binary, a struct with a binary field `bytes`, or a dictionary of these."""
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def contains_bytes(kind: Any) -> bool:
    """Whether a type is binary, or contains bytes in a dictionary, a list, a struct or a map."""
    if pa.types.is_dictionary(kind):
        return contains_bytes(kind.value_type)
    return _is_binary(kind) or any(contains_bytes(kind.field(index).type) for index in range(kind.num_fields))


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _has_no_type(kind: Any) -> bool:
    """Whether a type is null, as in a column without values, or is a struct whose `bytes` are null."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and bool(pa.types.is_null(kind.field(index).type))
    return bool(pa.types.is_null(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
