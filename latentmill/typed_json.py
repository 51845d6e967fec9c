"""JSON objects as frozen dataclasses: each field is checked against its type, and an error names the field."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")
_NAMES: Mapping[Any, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class FieldError(ValueError):
    """A field of a JSON object is missing, or has another type. `str(error)` names the field."""


def parse_fields(kind: type[T], value: Any, name: str = "") -> T:
    """Return a dataclass from a JSON object: nested objects as dataclasses, lists as tuples.

    kind: a dataclass. name: of the object in its file ("identity.preprocessing"); empty for the whole file.
    Fields that the dataclass does not have are left out, and a missing field has its default. Raises FieldError for a
    field that is missing without a default, and for one of another type.
    """
    if not isinstance(value, Mapping):
        raise FieldError(f"{_quote(name)} must be an object, not {_shorten(value)}")
    hints = typing.get_type_hints(kind)
    parsed = {}
    for field in fields(kind):  # type: ignore[arg-type]  # T cannot be bound to "any dataclass"
        full = f"{name}.{field.name}" if name else field.name
        if field.name not in value:
            if field.default is not MISSING:
                continue
            raise FieldError(f"the field '{full}' is missing")
        parsed[field.name] = _parse(hints[field.name], value[field.name], full)
    return kind(**parsed)


def _parse(kind: Any, value: Any, name: str) -> Any:
    """Return a value converted to its type hint. Raises FieldError for a value of another type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return parse_fields(typing.cast(type[Any], kind), value, name)
    if origin in (Union, types.UnionType):  # in this format: X | None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse(inner, value, name)
    if origin is tuple:
        return _parse_tuple(kind, arguments, value, name)
    if origin is Literal:
        is_valid = isinstance(value, str) and value in arguments
    elif origin is not None:  # Mapping[str, Any]
        is_valid = isinstance(value, Mapping)
    elif kind is float:
        is_valid = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        is_valid = type(value) is kind
    if not is_valid:
        raise FieldError(f"the field '{name}' must be {_describe(kind)}, not {_shorten(value)}")
    return value


def _parse_tuple(kind: Any, arguments: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise FieldError(f"the field '{name}' must be {_describe(kind)}, not {_shorten(value)}")
    items = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
    if len(items) != len(value):
        raise FieldError(f"the field '{name}' must have {len(items)} values, not {len(value)}")
    pairs = enumerate(zip(items, value, strict=True))
    return tuple(_parse(item, part, f"{name}[{index}]") for index, (item, part) in pairs)


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if origin is tuple:
        return "a list"
    return _NAMES.get(kind, "an object")


def _quote(name: str) -> str:
    return f"the field '{name}'" if name else "the file"


def _shorten(value: Any) -> str:
    return f"{value!r:.80}"
