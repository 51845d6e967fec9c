"""The objects of `bench.scale`: names and sizes in an SQLite file, so that a million cost a process no memory.

Two kinds of objects exist by a rule alone. A bucket `shards-COUNT` (or `buckets-COUNT`) holds that number of tars, all
of them the same. The objects that simulated workers write have the content of one real unit, with another unit's name.
"""

import hashlib
import io
import json
import pickle
import sqlite3
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

CACHES = "caches"  # the bucket of all caches
FOLDER = "shards/"  # of the tars in their bucket
LAST = chr(0x10FFFF)  # sorts behind every character of a name
ASPECTS = {"shards": (1.0,) * 3, "buckets": tuple(1.09 ** (number - 15) for number in range(31))}

Entry = tuple[str, int, str]  # key, size in bytes, ETag


@dataclass(frozen=True, slots=True)
class Template:
    """What a real worker left behind for one unit. The names of all units have one length, as have their paths.

    objects: each object whose key contains the unit's name. report: the pickled report to the driver.
    """

    unit: str
    path: str
    report: bytes
    objects: tuple[tuple[str, bytes], ...]

    def copy(self, data: bytes, unit: str, path: str) -> bytes:
        """Return these bytes for another unit."""
        return data.replace(self.unit.encode(), unit.encode()).replace(self.path.encode(), path.encode())

    def make_objects(self, cache_key: str, unit: str) -> list[tuple[str, int]]:
        """Return the key and the size of each object of another unit. cache_key: of the cache that it is in."""
        return [(f"{cache_key}/{key.replace(self.unit, unit)}", len(data)) for key, data in self.objects]

    def make_body(self, key: str) -> bytes:
        """Return the content of an object that `make_objects` named. key: without that of the cache."""
        for name, data in self.objects:
            before, _, after = name.partition(self.unit)
            unit = key[len(before) : len(before) + len(self.unit)]
            if key == f"{before}{unit}{after}":
                path = f"{self.path.rpartition('/')[0]}/{unit.partition('-')[0]}.tar"
                body = self.copy(data, unit, path)
                return _with_checksum(body) if name.endswith(".json") else body
        raise KeyError(key)

    def save(self, file: Path) -> None:
        """Write the template to a file."""
        file.write_bytes(pickle.dumps((self.unit, self.path, self.report, self.objects)))

    @classmethod
    def load(cls, file: Path) -> "Template":
        """Read a template that `save` wrote."""
        return cls(*pickle.loads(file.read_bytes()))


def _with_checksum(body: bytes) -> bytes:
    """Return the JSON of a commit with the checksum of its own content."""
    content = json.loads(body)
    if "sha256" in content:
        del content["sha256"]
        content["sha256"] = hashlib.sha256(_encode(content)).hexdigest()
    return _encode(content)


def _encode(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


class ObjectStore:
    """The objects in an SQLite file. Several processes may use it at once."""

    def __init__(self, file: Path, template: Template | None = None) -> None:
        self.template = template
        self.connection = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=OFF")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, size INTEGER, body BLOB) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def put(self, key: str, body: bytes, is_new: bool = False) -> bool:
        """Write an object. is_new: only if there is none with this key. Returns whether it was written."""
        verb = "IGNORE" if is_new else "REPLACE"
        rows = self.connection.execute(f"INSERT OR {verb} INTO objects VALUES (?, ?, ?)", (key, len(body), body))
        return rows.rowcount > 0

    def add_by_rule(self, objects: Iterable[tuple[str, int]]) -> None:
        """Add objects whose content follows from the template, in one transaction."""
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?, NULL)", objects)
        self.connection.execute("COMMIT")

    def delete(self, key: str) -> None:
        """Remove an object."""
        self.connection.execute("DELETE FROM objects WHERE key = ?", (key,))

    def head(self, bucket: str, key: str) -> Entry | None:
        """Return the entry of an object; None if there is none."""
        if bucket != CACHES:
            return next((entry for entry in list_shards(bucket, key) if entry[0] == key), None)
        row = self.connection.execute("SELECT key, size FROM objects WHERE key = ?", (key,)).fetchone()
        return row and (*row, _make_etag(row[0]))

    def get(self, bucket: str, key: str) -> bytes:
        """Return the content of an object that exists."""
        if bucket != CACHES:
            return make_tar(bucket)
        (body,) = self.connection.execute("SELECT body FROM objects WHERE key = ?", (key,)).fetchone()
        if body is not None:
            return bytes(body)
        assert self.template is not None, "no template was given"
        return self.template.make_body(key.partition("/")[2])

    def list_page(
        self, bucket: str, prefix: str, delimiter: str, after: str, limit: int
    ) -> tuple[list[Entry], list[str], str]:
        """Return a page of a listing as S3 does: entries, folders, and where the next page starts; empty: no more."""
        entries, folders = list[Entry](), list[str]()
        while len(entries) + len(folders) < limit:
            wanted = limit - len(entries) - len(folders)
            rows = self._list_after(bucket, prefix, after, wanted)
            for entry in rows:
                after = entry[0]
                below, slash, _ = after[len(prefix) :].partition("/")
                if delimiter and slash:
                    folders.append(f"{prefix}{below}/")
                    after = f"{folders[-1]}{LAST}"  # all that is in the folder is passed over
                    break
                entries.append(entry)
            else:
                if len(rows) < wanted:
                    return entries, folders, ""
        return entries, folders, after if self._list_after(bucket, prefix, after, 1) else ""

    def _list_after(self, bucket: str, prefix: str, after: str, limit: int) -> Sequence[Entry]:
        if bucket != CACHES:
            return list_shards(bucket, prefix, after, limit)
        query = "SELECT key, size FROM objects WHERE key > ? AND key >= ? AND key < ? ORDER BY key LIMIT ?"
        rows = self.connection.execute(query, (after, prefix, prefix + LAST, limit))
        return [(key, size, _make_etag(key)) for key, size in rows]

    def find(self, text: str) -> Iterator[tuple[str, bytes]]:
        """Yield each object whose key contains a text. It reads all keys."""
        query = "SELECT key, body FROM objects WHERE instr(key, ?) ORDER BY key"
        yield from ((key, bytes(body)) for key, body in self.connection.execute(query, (text,)))


def list_shards(bucket: str, prefix: str, after: str = "", limit: int = 1) -> list[Entry]:
    """Return the first tars of a bucket whose key begins with a prefix and is behind `after`."""
    count, size = int(bucket.partition("-")[2]), len(make_tar(bucket))
    first, last = 0, count - 1
    digits = prefix[len(FOLDER) : len(FOLDER) + 8]
    if not prefix.startswith(FOLDER):
        last = last if FOLDER.startswith(prefix) else -1
    elif digits:
        if not digits.isdigit() or not ".tar".startswith(prefix[len(FOLDER) + 8 :]):
            return []
        first, last = int(digits.ljust(8, "0")), min(last, int(digits.ljust(8, "9")))
    if LAST in after:
        return []
    if after:
        first = max(first, int(after[len(FOLDER) : len(FOLDER) + 8]) + 1)
    numbers = range(first, min(last + 1, first + limit))
    return [(f"{FOLDER}{number:08d}.tar", size, f'"{number:032x}"') for number in numbers]


def _make_etag(key: str) -> str:
    return f'"{zlib.crc32(key.encode()):032x}"'


@cache
def make_tar(bucket: str) -> bytes:
    """Return the content of every tar of a bucket: small images, and one that cannot be opened."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        images = [_make_image(aspect, number) for number, aspect in enumerate(ASPECTS[bucket.partition("-")[0]])]
        for number, image in enumerate([*images, b"not an image"]):
            for name, data in (("jpg", image), ("txt", b"a caption")):
                header = tarfile.TarInfo(f"{number:05d}.{name}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def _make_image(aspect: float, number: int) -> bytes:
    buffer = io.BytesIO()
    size = round(64 * aspect**0.5), round(64 / aspect**0.5)
    Image.linear_gradient("L").resize(size).rotate(10 * number).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()
