"""JSON whose bytes follow from its content, and how it is read back."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import CacheError

if TYPE_CHECKING:  # two seconds, which `latentmill --help` need not take
    pass


VERIFY_HINT = "latentmill verify says what to do"


def canonical_json(value: Any) -> bytes:
    """UTF-8, keys sorted, no spaces, floats as their shortest repr, no NaN: equal values, equal bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """An object that a cache's file holds as JSON. Raises CacheError, which names the file, for anything else."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CacheError(f"{where} cannot be understood: it is damaged; {VERIFY_HINT}")
    return content


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's content with the `sha256` of all else in it, by which `verify` finds a byte that has changed."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest)).hexdigest()}
