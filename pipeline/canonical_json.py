"""Write JSON whose bytes follow from its content alone, and read JSON of a cache."""

import hashlib
from collections.abc import Mapping
from typing import Any

from latentmill.canonical_json import VERIFY_HINT, canonical_json, parse_json_object

__all__ = ["VERIFY_HINT", "canonical_json", "parse_json_object", "with_checksum"]


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's content with a `sha256` of all other fields, by which `verify` detects a changed byte."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest)).hexdigest()}
