"""JSON of a cache: with bytes that follow from the content alone, with a checksum, or indented for people."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from latentmill.canonical_json import VERIFY_HINT, canonical_json, parse_json_object

REBUILD_HINT = "run latentmill verify --rebuild, which writes it again"

__all__ = ["REBUILD_HINT", "VERIFY_HINT", "canonical_json", "indented_json", "parse_json_object", "with_checksum"]


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's content with a `sha256` of all other fields, by which `verify` detects a changed byte."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest)).hexdigest()}


def indented_json(value: Any, ensure_ascii: bool = True) -> bytes:
    """Return a value as JSON with one field per line, for the files that people also read.

    ensure_ascii: escape all characters that are not ASCII. The files of a cache differ in this.
    """
    return json.dumps(value, indent=1, ensure_ascii=ensure_ascii, allow_nan=False).encode()
