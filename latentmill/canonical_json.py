"""JSON whose bytes follow from its content, and the digest of a cache's files."""

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

from latentmill.errors import CacheError

VERIFY_HINT = "run latentmill verify, which says what to do"


def canonical_json(value: Any) -> bytes:
    """Return a value as UTF-8 JSON: keys sorted, no spaces, floats as their shortest repr, no NaN.

    Equal values have equal bytes.
    """
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in a cache's file. Raises CacheError, which names the file, for anything else."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CacheError(f"{where} is corrupt: it is not a JSON object; {VERIFY_HINT}")
    return content


def cache_digest(hashes: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 of the output of `LC_ALL=C sha256sum _empty/* data/*` in a cache.

    hashes: each file with its sha256 in hex, sorted by file.
    """
    digest = hashlib.sha256()
    lines = (f"{sha256}  {file}\n" for file, sha256 in hashes)
    while some := "".join(islice(lines, 1024)):
        digest.update(some.encode())
    return digest.hexdigest()
