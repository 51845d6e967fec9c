"""Detect outputs of latentmill among the sources: caches by their cache.json, and previews by their report.json.

These files are read only if other files have names like those in a cache or in previews. So a source with a million
other files costs no further request.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable

MADE_BY = "latentmill decode"  # the field `made_by` in a report of previews
REPORT = "report.json"
CACHE = "cache.json"
LIMIT = 1 << 30  # bytes that are read of such a file: a report names every preview

IN_CACHE = re.compile(
    r"(.*)/(?:data/[^/]+-[0-9a-f]{16}-\d{5}(?:r\d+)?\.(?:parquet|tar)|_plan/\d{5}\.parquet)", re.DOTALL
)
IN_PREVIEWS = re.compile(
    r"(.*)/(?:images/[^/]+-[0-9a-f]{16}/(?:[^/]+/)?[^/]+\.png|(?:sheets|_cells)/(?:\d+x\d+-)?\d{5}\.png|"
    r"decoded/\d{5}-\d{3}\.(?:parquet|tar)|fidelity\.parquet/\d{5}\.parquet)",
    re.DOTALL,
)
MARKS = {  # one of them is in each match
    IN_CACHE: ("/data/", "/_plan/"),
    IN_PREVIEWS: ("/images/", "/sheets/", "/_cells/", "/decoded/", "/fidelity.parquet/"),
}

Read = Callable[[str], bytes | None]


def find_own_outputs(files: Collection[str], read: Read) -> dict[str, list[str]]:
    """Return the files that latentmill wrote, by a text that names their cache or previews.

    read: returns the content of a file by its path, or None if the file does not exist.
    """
    caches = [folder for folder in _find_folders(files, IN_CACHE) if is_cache(read(f"{folder}/{CACHE}"))]
    previews = [folder for folder in _find_folders(files, IN_PREVIEWS) if is_report(read(f"{folder}/{REPORT}"))]
    outputs = {f"the cache {folder}": [file for file in files if file.startswith(f"{folder}/")] for folder in caches}
    for folder in previews:
        drawn = (file for file in files if (match := IN_PREVIEWS.fullmatch(file)) and match[1] == folder)
        outputs[f"the previews {folder}"] = [*drawn, *(file for file in files if file == f"{folder}/{REPORT}")]
    return outputs


def _find_folders(files: Iterable[str], shape: re.Pattern[str]) -> list[str]:
    """Return the folders to which files of this shape would belong."""
    marks = MARKS[shape]  # a search for them is much faster than the expression, and there may be millions of files
    return sorted({m[1] for file in files if any(mark in file for mark in marks) and (m := shape.fullmatch(file))})


def is_cache(data: bytes | None) -> bool:
    """Whether a file's content is the cache.json of a latentmill cache."""
    content = _parse_object(data)
    return isinstance(content.get("identity"), dict) and {"format", "identity_sha256", "vae"} <= content.keys()


def is_report(data: bytes | None) -> bool:
    """Whether a file's content is the report.json of previews."""
    return _parse_object(data).get("made_by") == MADE_BY


def _parse_object(data: bytes | None) -> dict[str, object]:
    """Parse a JSON object. It is empty if the data are something else."""
    try:
        content = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
