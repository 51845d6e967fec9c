"""The record of an export in its folder: which parts of which cache it has, and what was written of each.

_latentmill/FORMAT/export.json    the cache and the numbered parts; written first, and again at the end
_latentmill/FORMAT/NNNNN.json     one per finished part: its rows, its files, and entries for files of the whole export

A folder may have exports to several formats, such as those of two trainers beside the images.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline.cache.name_array import find_names, sort_names
from pipeline.canonical_json import indented_json
from pipeline.errors import CacheError, IdentityError
from pipeline.storage.folder import Folder

FOLDER = "_latentmill"
MADE_BY = "latentmill export"


@dataclass(frozen=True, slots=True)
class ExportedPart:
    """A part of the cache: its file, the sha256 of that, and its rows. Its number is its place in the manifest."""

    file: str
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportManifest:
    """An export to one format.

    options: what decides its files besides the cache and the format. digest: of the cache, at the end. state: `new`
    until the first file may be written.
    """

    format: str
    options: Mapping[str, Any]
    cache: str
    identity: str
    parts: tuple[ExportedPart, ...]
    digest: str | None = None
    state: Literal["new", "started", "finished"] = "new"

    def to_json(self) -> bytes:
        """Return the content of the file."""
        return indented_json({"made_by": MADE_BY, **asdict(self)}, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """What is known of a finished part.

    files: their names in the folder. refused: shard, key and reason of each row that was left out. entries: what the
    files of the whole export say of the rows.
    """

    rows: int
    files: tuple[str, ...]
    refused: tuple[tuple[str, str, str], ...] = ()
    entries: tuple[Any, ...] = ()


def open_manifest(out: Folder, wanted: ExportManifest) -> ExportManifest:
    """Return the manifest of a folder: a new one, which is written, or the one that is there, with parts that are new.

    Parts keep their number, so that an export can be completed after the cache has grown. Raises IdentityError if the
    folder has another export, or that of a cache whose parts have changed since.
    """
    name = name_manifest(wanted.format)
    if out.create(name, wanted.to_json()):
        return wanted
    found = read_manifest(out, name)
    if found.state == "new":
        out.replace(name, wanted.to_json())
        return wanted
    for name in ("identity", "options"):
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if ours != theirs:
            raise IdentityError(
                f"{out.url} has an export with another {name} ({theirs}, not {ours}); export to an empty folder"
            )
    now = {part.file: part for part in wanted.parts}
    for part in found.parts:
        if now.pop(part.file, None) != part:
            raise IdentityError(
                f"{out.url} has rows of {part.file}, which has changed in the cache {wanted.cache}, or is no longer in "
                "it; export to an empty folder"
            )
    return replace(found, parts=(*found.parts, *now.values())) if now else found


def name_manifest(form: str) -> str:
    """Return the name of the manifest of the export to a format."""
    return f"{FOLDER}/{form}/export.json"


def write_manifest(out: Folder, manifest: ExportManifest) -> None:
    """Write a manifest that was opened before."""
    out.replace(name_manifest(manifest.format), manifest.to_json())


def read_manifest(out: Folder, name: str) -> ExportManifest:
    """Read a manifest. Raises CacheError if it is not one."""
    url = out.url_of(name)
    try:
        content = json.loads(out.read(name))
        content.pop("made_by")
        parts = tuple(ExportedPart(**part) for part in content.pop("parts"))
        return ExportManifest(**content, parts=parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{url} is not the record of an export; remove it, or export to an empty folder") from error


def write_record(out: Folder, form: str, part: int, record: ExportRecord) -> None:
    """Write the record of a finished part."""
    out.replace(f"{FOLDER}/{form}/{name_record(part)}", json.dumps(asdict(record), ensure_ascii=False).encode())


def name_record(part: int) -> str:
    """Return the name of a part's record in the folder of the format."""
    return f"{part:05d}.json"


def read_records(out: Folder, form: str, parts: Iterable[int]) -> Iterator[ExportRecord]:
    """Yield the records of these parts, in their order."""
    for name, data in out.read_each(f"{FOLDER}/{form}", map(name_record, parts)):
        yield parse_record(data, out.url_of(f"{FOLDER}/{form}/{name}"))


def parse_record(data: bytes, url: str) -> ExportRecord:
    """Return a part's record. Raises CacheError if it is not one."""
    try:
        content = json.loads(data)
        refused = tuple((shard, key, reason) for shard, key, reason in content["refused"])
        files, entries = tuple(content["files"]), tuple(content["entries"])
        return ExportRecord(rows=content["rows"], files=files, refused=refused, entries=entries)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{url} is not the record of a part; remove it, and run the same command again") from error


def read_done(out: Folder, manifest: ExportManifest) -> dict[int, ExportRecord]:
    """Return the records, without the files, of the parts that have one and all of whose files exist, by number."""
    names = set(out.iterate_names(f"{FOLDER}/{manifest.format}"))
    recorded = [number for number in range(len(manifest.parts)) if name_record(number) in names]
    present: dict[str, np.ndarray] = {}
    return {
        number: replace(record, files=())
        for number, record in zip(recorded, read_records(out, manifest.format, recorded), strict=True)
        if has_files(out, record.files, present)
    }


def has_files(out: Folder, files: Sequence[str], present: dict[str, np.ndarray]) -> bool:
    """Return whether all files exist. present: the names in each sub-folder that was listed before; it grows."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        if folder not in present:
            present[folder] = sort_names(out.iterate_names(folder))
        if find_names(present[folder], names).min() < 0:
            return False
    return True
