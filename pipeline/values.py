"""Values that Arrow knows and Python or JSON may not: times of far years, in nanoseconds, in zones nobody has heard of.

They go through as Arrow's own. Where text is wanted, Arrow makes it: it needs neither pandas nor a list of zones,
and makes the same one on every machine.
"""

import base64
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

_SLOT = 32  # bytes of a number in a list, and its place there


def to_json_value(value: Any) -> Any:
    """A value as JSON can say it: what is not finite as null, times and decimals as text, bytes as base64."""
    if isinstance(value, pa.Scalar):
        return _plain_scalar(value)
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
    raise TypeError(f"there is no rule for a {type(value).__name__} in JSON")


def size_in_bytes(value: Any) -> int:
    """The bytes that a value takes in memory, about: of texts and bytes their length, of a number in a list 32."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, pa.Scalar):
        return int(pa.array([value], value.type).nbytes)
    if isinstance(value, Mapping):
        return sum(len(name) + _SLOT + size_in_bytes(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], int | float):  # a column's values are all of one type
            return _SLOT * len(value)
        return sum(_SLOT + size_in_bytes(item) for item in value)
    return 0


def iter_texts(value: Any) -> Iterator[str]:
    """The texts in a value: itself, or those in a list, a struct or a map."""
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


def _plain_scalar(value: Any) -> Any:
    kind = value.type
    if not value.is_valid:
        return None
    if pa.types.is_temporal(kind):
        return _time(value)
    if pa.types.is_dictionary(kind):
        return to_json_value(value.value)
    if pa.types.is_struct(kind):
        return {field.name: to_json_value(value[index]) for index, field in enumerate(kind)}
    if pa.types.is_map(kind):
        return [[to_json_value(pair[0]), to_json_value(pair[1])] for pair in value.values]
    if kind.num_fields:  # lists of all kinds
        return [to_json_value(item) for item in value.values]
    return to_json_value(value.as_py())


def _time(value: Any) -> str:
    """The text of a time: in UTC where it has a zone, with its unit where it is a duration.

    Of one beyond the years that Arrow writes (some 32,700 each way), that it is out of range, and its number.
    """
    kind, end = value.type, ""
    if pa.types.is_timestamp(kind) and kind.tz:
        value, end = value.cast(pa.timestamp(kind.unit)), "Z"
    elif pa.types.is_duration(kind):
        end = f" {kind.unit}"
    return f"{value.cast(pa.string()).as_py()}{end}"
