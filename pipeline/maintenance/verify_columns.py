"""Check the added columns: their versions, and each overlay against its version and its part."""

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from latentmill.cache_files import hash_files
from latentmill.overlay_files import FILES, OverlayEntry, OverlayFile, get_stored_type
from latentmill.overlays import FOLDER, KEY, Version, compute_digest, list_versions, name_version, read_version
from pipeline.annotation.publish import name_overlay
from pipeline.errors import CacheError, LatentmillError
from pipeline.maintenance.verify_part import PartCheck, Problem, digest_keys
from pipeline.prefetch import map_in_order
from pipeline.storage.folder import Folder

THREADS = 4
AWAY = "move it away"
AGAIN = f"{AWAY}, and run the annotate command again"


def check_columns(cache: Folder, parts: Iterable[PartCheck]) -> Iterator[Problem]:
    """Check everything in `_columns`. parts: the checks of all parts."""
    keys = {check.file: check.key_digest for check in parts if check.part is not None and len(check.keys)}
    files, others = cache.list_entries(FOLDER)
    known = re.compile(r"\d{5}\.parquet")
    unexpected = [name for name in files if not known.fullmatch(name)] + [name for name in others if name != "files"]
    yield from (Problem(f"{FOLDER}/{name}", "unexpected file", AWAY) for name in unexpected)
    numbers, overlays = list_versions(cache), dict[str, tuple[OverlayEntry, Version]]()
    for number in range(1, max(numbers, default=0) + 1):
        if number not in numbers:
            yield Problem(name_version(number), "it is missing, but a later version exists", "restore it from a backup")
            continue
        try:
            version = read_version(cache, number)
        except CacheError as error:
            yield Problem(name_version(number), str(error), AGAIN)
            continue
        yield from _check_version(version, keys)
        overlays |= {(entry := version[index]).name: (entry, version) for index in range(len(version))}
    with ThreadPoolExecutor(THREADS) as pool:
        checks = map_in_order(pool, lambda pair: _check_overlay(cache, *pair, keys), overlays.values(), window=THREADS)
        yield from (problem for problem in checks if problem)
    files, others = cache.list_entries(FILES)
    for name in sorted({*files, *others} - overlays.keys()):
        what = "no version lists it: an annotate command that was interrupted may have written it"
        yield Problem(f"{FILES}/{name}", what, f"run that command again, or {AWAY}")


def _check_version(version: Version, keys: Mapping[str, str]) -> Iterator[Problem]:
    """Check what a version says of its overlays."""
    file, entries = name_version(version.number), [version[index] for index in range(len(version))]
    names = [entry.file for entry in entries]
    if version.info.digest != compute_digest({entry.file: entry.sha256 for entry in entries}):
        yield Problem(file, "its digest is not that of the overlays that it lists", AGAIN)
    if version.info.rows != sum(entry.rows for entry in entries) or names != sorted(set(names)):
        yield Problem(file, "it has another number of rows than its overlays, or lists a part twice", AGAIN)
    for entry in entries:
        if entry.file not in keys:
            yield Problem(file, f"it has an overlay of {entry.file}, which is not a sound part of the cache", AGAIN)


def _check_overlay(cache: Folder, entry: OverlayEntry, version: Version, keys: Mapping[str, str]) -> Problem | None:
    """Compare an overlay with its version and its part. keys: by part, `digest_keys` of its rows."""
    file = f"{FILES}/{entry.name}"
    try:
        sha256 = hash_files(cache, [file])[file]
        if sha256 != entry.sha256 or entry.name != name_overlay(entry.file, sha256):
            return Problem(file, f"it differs from the overlay that version {version.number} lists", AGAIN)
        schema = pa.schema([pa.field(KEY, pa.string()), *version.schema])
        reader = OverlayFile(cache, entry, schema, [KEY])
        stored = [(item.name, get_stored_type(item.type)) for item in schema]
        if [(item.name, item.type) for item in reader.stored_schema] != stored:
            return Problem(file, f"its columns are not those of version {version.number}", AGAIN)
        groups = range(len(reader.sizes))
        own = digest_keys(key for group in groups for key in reader.read_group(group)[KEY].to_pylist())
    except LatentmillError as error:
        return Problem(file, str(error), AGAIN)
    if entry.file in keys and own != keys[entry.file]:
        return Problem(file, f"its keys are not those of {entry.file}", AGAIN)
    return None
