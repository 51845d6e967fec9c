"""Write JSON whose bytes follow from its content alone, and read JSON of a cache."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import CacheError

VERIFY_HINT = "run latentmill verify, which says what to do"


def canonical_json(value: Any) -> bytes:
    """Return UTF-8 JSON with sorted keys, no spaces, shortest float repr, no NaN. Equal values give equal bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in a cache's file. Raises CacheError, which names the file, if it is not an object.

    where: URL of the file, or a text that names it.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CacheError(f"{where} is corrupt: it is not a JSON object; {VERIFY_HINT}")
    return content


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's content with a `sha256` of all other fields, by which `verify` detects a changed byte."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest)).hexdigest()}
