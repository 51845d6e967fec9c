"""What latentmill itself wrote is no source: caches, known by their cache.json, and previews, by their report.json.

Only files whose names look like those of a cache or of previews lead to a look at what marks them, so that a source
with a million files costs no request more.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable

MADE_BY = "latentmill decode"  # what a report of previews says
REPORT = "report.json"
CACHE = "cache.json"
LIMIT = 1 << 30  # bytes of a file that is looked at: a report names every preview

IN_CACHE = re.compile(
    r"(.*)/(?:data/[^/]+-[0-9a-f]{16}-\d{5}(?:r\d+)?\.(?:parquet|tar)|_plan/\d{5}\.parquet)", re.DOTALL
)
IN_PREVIEWS = re.compile(r"(.*)/(?:images/[^/]+-[0-9a-f]{16}/[^/]+\.png|sheets/\d{5}\.png)", re.DOTALL)

Read = Callable[[str], bytes | None]


def find_own_outputs(files: Collection[str], read: Read) -> dict[str, list[str]]:
    """Those of the files that latentmill wrote, by what they belong to: a text that names it.

    read: the content of a file by its path; None if there is no such file.
    """
    caches = [folder for folder in _folders_of(files, IN_CACHE) if is_cache(read(f"{folder}/{CACHE}"))]
    previews = [folder for folder in _folders_of(files, IN_PREVIEWS) if is_report(read(f"{folder}/{REPORT}"))]
    found = {f"the cache {folder}": [file for file in files if file.startswith(f"{folder}/")] for folder in caches}
    for folder in previews:
        drawn = (file for file in files if (match := IN_PREVIEWS.fullmatch(file)) and match[1] == folder)
        found[f"the previews {folder}"] = [*drawn, *(file for file in files if file == f"{folder}/{REPORT}")]
    return found


def _folders_of(files: Iterable[str], shape: re.Pattern[str]) -> list[str]:
    """The folders that files of this shape would belong to."""
    return sorted({match[1] for file in files if (match := shape.fullmatch(file))})


def is_cache(data: bytes | None) -> bool:
    """Whether this is the cache.json of a latentmill cache."""
    content = _object(data)
    return isinstance(content.get("identity"), dict) and {"format", "identity_sha256", "vae"} <= content.keys()


def is_report(data: bytes | None) -> bool:
    """Whether this is the report.json of previews."""
    return _object(data).get("made_by") == MADE_BY


def _object(data: bytes | None) -> dict[str, object]:
    try:
        content = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
