"""Convert values that Arrow supports and Python or JSON may not: far years, nanoseconds, unknown time zones.

Such values stay Arrow scalars. Arrow also formats them as text. It needs neither pandas nor a time zone database for
that, and gives the same text on every machine.
"""

import base64
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

_SLOT = 32  # bytes of a number in a list, including its reference


def to_json_value(value: Any) -> Any:
    """Return a value for JSON: floats that are not finite as null, times and decimals as text, bytes as base64.

    Raises TypeError for other types.
    """
    if isinstance(value, pa.Scalar):
        return _scalar_to_json(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): to_json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot be converted to JSON")


def size_in_bytes(value: Any) -> int:
    """Return about how many bytes a value takes in memory: the length of text and bytes, 32 per number in a list."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, pa.Scalar):
        return int(pa.array([value], value.type).nbytes)
    if isinstance(value, Mapping):
        return sum(len(name) + _SLOT + size_in_bytes(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], int | float):  # all values of a column have one type
            return _SLOT * len(value)
        return sum(_SLOT + size_in_bytes(item) for item in value)
    return 0


def iter_texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value: the value itself, or the texts in a list, a struct or a map."""
    if isinstance(value, pa.Scalar):
        value = to_json_value(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from (name, *iter_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iter_texts(item)


def _scalar_to_json(value: Any) -> Any:
    """Return an Arrow scalar as a value for JSON."""
    kind = value.type
    if not value.is_valid:
        return None
    if pa.types.is_temporal(kind):
        return _format_time(value)
    if pa.types.is_dictionary(kind):
        return to_json_value(value.value)
    if pa.types.is_struct(kind):
        return {field.name: to_json_value(value[index]) for index, field in enumerate(kind)}
    if pa.types.is_map(kind):
        return [[to_json_value(pair[0]), to_json_value(pair[1])] for pair in value.values]
    if kind.num_fields:  # any list type
        return [to_json_value(item) for item in value.values]
    return to_json_value(value.as_py())


def _format_time(value: Any) -> str:
    """Return the text of a time: in UTC if it has a zone, with its unit if it is a duration.

    For a year that Arrow cannot format (beyond about 32,700 in either direction), the text states that the value is
    out of range, and its number.
    """
    kind, suffix = value.type, ""
    if pa.types.is_timestamp(kind) and kind.tz:
        value, suffix = value.cast(pa.timestamp(kind.unit)), "Z"
    elif pa.types.is_duration(kind):
        suffix = f" {kind.unit}"
    return f"{value.cast(pa.string()).as_py()}{suffix}"
