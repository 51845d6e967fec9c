"""The record of an export in its folder: which parts of which cache it has, and what was written of each.

latentmill-export.json    the cache, the format, and the numbered parts; written first, and again at the end
_latentmill/NNNNN.json    one per finished part: its counts, its refused rows, and entries for the whole export's files
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline.canonical_json import indented_json
from pipeline.errors import CacheError, IdentityError
from pipeline.storage.folder import Folder

NAME = "latentmill-export.json"
RECORDS = "_latentmill"
MADE_BY = "latentmill export"


@dataclass(frozen=True, slots=True)
class ExportedPart:
    """A part of the cache: its file, the sha256 of that, and its rows. Its number is its place in the manifest."""

    file: str
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An export.

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
class PartRecord:
    """What is known of a finished part. refused: shard, key and reason of each row that was left out."""

    rows: int
    refused: tuple[tuple[str, str, str], ...] = ()
    entries: tuple[Any, ...] = ()


def open_manifest(out: Folder, wanted: Manifest) -> Manifest:
    """Return the manifest of a folder: a new one, which is written, or the one that is there, with parts that are new.

    Parts keep their number, so that an export can be completed after the cache has grown. Raises IdentityError if the
    folder has another export, or that of a cache whose parts have changed since.
    """
    if out.create(NAME, wanted.to_json()):
        return wanted
    found = read_manifest(out)
    if found.state == "new":
        out.replace(NAME, wanted.to_json())
        return wanted
    for name in ("format", "identity", "options"):
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


def read_manifest(out: Folder) -> Manifest:
    """Read the manifest of a folder. Raises CacheError if it is not one."""
    url = out.url_of(NAME)
    try:
        content = json.loads(out.read(NAME))
        content.pop("made_by")
        parts = tuple(ExportedPart(**part) for part in content.pop("parts"))
        return Manifest(**content, parts=parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{url} is not the record of an export; remove it, or export to an empty folder") from error


def name_record(part: int) -> str:
    """Return the name of a part's record."""
    return f"{RECORDS}/{part:05d}.json"


def write_record(out: Folder, part: int, record: PartRecord) -> None:
    """Write the record of a finished part."""
    out.replace(name_record(part), json.dumps(asdict(record), ensure_ascii=False).encode())


def read_records(out: Folder, parts: Iterable[int]) -> list[PartRecord]:
    """Read the records of these parts, in their order."""
    names = [name_record(part).removeprefix(f"{RECORDS}/") for part in parts]
    return [parse_record(data, out.url_of(f"{RECORDS}/{name}")) for name, data in out.read_each(RECORDS, names)]


def parse_record(data: bytes, url: str) -> PartRecord:
    """Return a part's record. Raises CacheError if it is not one."""
    try:
        content = json.loads(data)
        refused = tuple((shard, key, reason) for shard, key, reason in content["refused"])
        return PartRecord(rows=content["rows"], refused=refused, entries=tuple(content["entries"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{url} is not the record of a part; remove it, and run the same command again") from error


def list_done(out: Folder, parts: Sequence[ExportedPart]) -> set[int]:
    """Return the numbers of the parts that have a record."""
    names = set(out.iterate_names(RECORDS))
    return {number for number in range(len(parts)) if name_record(number).removeprefix(f"{RECORDS}/") in names}
