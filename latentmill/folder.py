"""The folder of a cache on any storage, for reading: a local path or a URL that fsspec knows."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

import fsspec

from latentmill.errors import UsageError
from latentmill.stream import Stream, name_url_in_errors


class ReadableFolder(Protocol):
    """What the reader needs of a folder. `pipeline.storage.store.Folder` is one that can be written to."""

    @property
    def url(self) -> str:
        """The URL of the folder, or its absolute path."""

    def at(self, name: str) -> str:
        """Return the full URL or path of a name in the folder."""

    def names(self, below: str = "") -> list[str]:
        """Return the files directly in the sub-folder `below`, sorted, without hidden ones."""

    def read_if_there(self, name: str) -> bytes | None:
        """Return all of a file, or None if it does not exist."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for reading."""


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A folder on a storage that fsspec knows. options: of the filesystem (`key`, `endpoint_url`, ...).

    Every method raises StorageError, which names the URL, if the storage refuses.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def _connect(self, name: str) -> tuple[Any, str]:
        """Return the filesystem, and the path of a name on it. `::` is part of a name, not fsspec's chain."""
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        kind = fsspec.get_filesystem_class(protocol)
        filesystem = kind(**{**kind._get_kwargs_from_urls(self.url), "use_listings_cache": False, **self.options})
        return filesystem, cast(str, kind._strip_protocol(self.at(name)))

    def at(self, name: str) -> str:
        """Return the full URL or path of a name."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def names(self, below: str = "") -> list[str]:
        """Return the files directly in the sub-folder `below`, sorted, without hidden ones; none if it is missing."""
        with name_url_in_errors(self.at(below), "list"):
            filesystem, path = self._connect(below)
            try:
                entries = filesystem.ls(path, detail=True, refresh=True)
            except FileNotFoundError:
                return []
            files = [
                entry["name"]
                for entry in entries
                if entry["type"] == "file" or (entry.get("islink") and filesystem.isfile(entry["name"]))
            ]
        # stores list an empty object that stands for the folder
        names = (PurePosixPath(file).name for file in files if file.rstrip("/") != path.rstrip("/"))
        return sorted(name for name in names if not name.startswith("."))

    def read_if_there(self, name: str) -> bytes | None:
        """Return all of a file, or None if it does not exist."""
        with name_url_in_errors(self.at(name), "read"):
            filesystem, path = self._connect(name)
            try:
                return cast(bytes, filesystem.cat_file(path))
            except FileNotFoundError:
                return None

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading here and there. A read that gets fewer bytes than the file has is a StorageError."""
        with name_url_in_errors(self.at(name), "read"):
            filesystem, path = self._connect(name)
            # with blocks, two columns of a Parquet file read in turn would fetch each byte many times
            file = filesystem.open(path, "rb", cache_type="none")
        stream = Stream(file, self.at(name), getattr(file, "size", None))
        with file:
            try:
                yield cast(BinaryIO, stream)
            except Exception as error:
                if stream.error is not None and error is not stream.error:
                    raise stream.error from error
                raise
        if stream.error is not None:  # its reader took the end of the bytes for the end of the file
            raise stream.error


def absolute(url: str) -> str:
    """Return a URL as it is, and a local path (or a `file://` URL) as an absolute path.

    Raises UsageError for a URL with a password, which errors would show.
    """
    if re.match(r"[^/]*://[^/]*:[^/]*@", url):
        raise UsageError("a URL must not hold a password: errors would show it; use options={...}")
    if "://" in url and not url.startswith("file://"):
        return url
    return os.path.abspath(cast(str, fsspec.get_filesystem_class("file")._strip_protocol(url)))
