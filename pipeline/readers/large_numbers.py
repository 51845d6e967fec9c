"""Whole numbers of JSON that do not fit 64 bits, for which Arrow has no type: they become texts."""

import json
from collections.abc import Container, Iterator
from typing import Any

Path = tuple[str | None, ...]  # the keys of objects that lead to a value; None for the elements of a list
MAX_INT = (1 << 63) - 1


def find_large_numbers(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of each whole number in a JSON value that does not fit 64 bits."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from find_large_numbers(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            yield from find_large_numbers(item, (*path, None))
    elif isinstance(value, int) and not -MAX_INT - 1 <= value <= MAX_INT:
        yield path


def write_numbers_as_text(value: Any, paths: Container[Path], path: Path = ()) -> Any:
    """Return a JSON value in which the numbers at these paths are texts, so that a column has one type."""
    if isinstance(value, dict):
        return {name: write_numbers_as_text(item, paths, (*path, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [write_numbers_as_text(item, paths, (*path, None)) for item in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps(value) if is_number and path in paths else value
