"""Convert values of Arrow columns to Python objects. Times that Python cannot represent stay Arrow scalars.

Arrow has times in distant years, in nanoseconds and in time zones that Python does not support. If text is needed,
Arrow converts them itself: without pandas, without a list of zones, and to the same text on every machine.
"""

from typing import Any

import pyarrow as pa


def has_times(kind: Any) -> bool:
    """Return whether a type is one of dates, times or durations, or has such a type inside."""
    if pa.types.is_dictionary(kind):
        return has_times(kind.value_type)
    inside = (kind.field(index).type for index in range(kind.num_fields))
    return pa.types.is_temporal(kind) or any(has_times(inner) for inner in inside)


def to_python(array: Any) -> list[Any]:
    """Return the values of a column as Python's; as Arrow's own scalars if Python has no such time."""
    if not has_times(array.type):
        return list(array.to_pylist())
    return [_scalar_to_python(scalar) for scalar in array]


def _scalar_to_python(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, KeyError):  # KeyError: pytz, which Arrow prefers, has no such zone
        return scalar
