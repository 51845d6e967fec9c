"""The folder of a cache on any storage, for reading: a local path or a URL that fsspec supports."""

import inspect
import mmap
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from latentmill.byte_stream import ByteStream, name_url_in_errors, open_while
from latentmill.errors import StorageError, UsageError
from latentmill.pages import list_pages

RETRY_SECONDS = (0.5, 2.0, 8.0, 30.0)  # the waits before a ranged read is tried again


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A folder on a storage that fsspec supports. options: of the filesystem (`key`, `endpoint_url`, ...).

    Every method raises StorageError, which names the URL, if the storage refuses. `pipeline.storage.folder.Folder` can
    also be written to.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def _locate(self, name: str) -> tuple[Any, str]:
        """Return the filesystem, and the path of a name on it. `::` is part of a name, not fsspec's chain."""
        return open_filesystem(self.url_of(name), self.options)

    def url_of(self, name: str) -> str:
        """Return the full URL or path of a name."""
        return f"{self.url.rstrip('/')}/{name}" if name else self.url

    def list_files(self, below: str = "") -> list[str]:
        """Return the sorted names of the files directly in the sub-folder `below`, without hidden files.

        The list is empty if the sub-folder does not exist.
        """
        return self.list_entries(below)[0]

    def list_entries(self, below: str) -> tuple[list[str], list[str]]:
        """Return two sorted lists: the names of `list_files`, and all others (folders, hidden files, broken links)."""
        files, others = list[str](), list[str]()
        for name, is_file in self._iterate_entries(below):
            (files if is_file and not name.startswith(".") else others).append(name)
        return sorted(files), sorted(others)

    def iterate_names(self, below: str = "") -> Iterator[str]:
        """Yield the names of `list_files` in no particular order, page by page. There may be millions."""
        return (name for name, is_file in self._iterate_entries(below) if is_file and not name.startswith("."))

    def _iterate_entries(self, below: str) -> Iterator[tuple[str, bool]]:
        """Yield each name in a sub-folder, and whether it is a file."""
        with name_url_in_errors(self.url_of(below), "list"):
            filesystem, path = self._locate(below)
            if isinstance(filesystem, LocalFileSystem):
                yield from _scan(path)
                return
            for page in list_pages(filesystem, path):
                for entry in page:
                    name = entry["name"].rstrip("/")
                    if name != path.rstrip("/"):  # some stores list the folder itself
                        yield name.rpartition("/")[2], entry["type"] == "file"

    def read_if_exists(self, name: str) -> bytes | None:
        """Read a whole file. Return None if it does not exist."""
        with name_url_in_errors(self.url_of(name), "read"):
            filesystem, path = self._locate(name)
            try:
                return cast(bytes, filesystem.cat_file(path, **single_request_option(filesystem)))
            except FileNotFoundError:
                return None

    def list_sizes(self, below: str) -> dict[str, int]:
        """Return the bytes of each file of `list_files` by its name."""
        with name_url_in_errors(self.url_of(below), "list"):
            filesystem, path = self._locate(below)
            if isinstance(filesystem, LocalFileSystem):
                names = (name for name, is_file in _scan(path) if is_file and not name.startswith("."))
                return {name: os.stat(os.path.join(path, name)).st_size for name in names}
            sizes = dict[str, int]()
            for page in list_pages(filesystem, path):
                for entry in page:
                    name = entry["name"].rpartition("/")[2]
                    if entry["type"] == "file" and not name.startswith("."):
                        sizes[name] = filesystem.size(entry["name"]) if entry["size"] is None else entry["size"]
            return sizes

    def read_range(self, name: str, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop) of a file, by one request. `stop` is not beyond the end of the file.

        A local file is mapped, so it must not be changed in place while the result is used. Parts never are.

        A request that fails in a way that may pass is repeated, after RETRY_SECONDS. Raises StorageError.
        """
        for seconds in RETRY_SECONDS:
            try:
                return self._request_range(name, start, stop)
            except StorageError as error:
                if not error.may_pass:
                    raise
            time.sleep(seconds)
        return self._request_range(name, start, stop)

    def _request_range(self, name: str, start: int, stop: int) -> memoryview:
        with name_url_in_errors(self.url_of(name), "read"):
            filesystem, path = self._locate(name)
            if isinstance(filesystem, LocalFileSystem):
                data = _map_local(path, start, stop)
            else:
                data = memoryview(filesystem.cat_file(path, start=start, end=stop))
        if len(data) != stop - start:
            text = f"{self.url_of(name)} has {len(data)} bytes from byte {start} to {stop}: the transfer was cut short"
            raise StorageError(f"{text}, or the file was changed", may_pass=True)
        return data

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reads at any offset, for example of a Parquet footer.

        Raises StorageError if fewer bytes arrive than the file has.
        """
        with name_url_in_errors(self.url_of(name), "read"):
            filesystem, path = self._locate(name)
            # with a block cache, two columns of a Parquet file that are read in turn would fetch each byte many times
            file = filesystem.open(path, "rb", cache_type="none")
        with open_while(ByteStream(file, self.url_of(name), getattr(file, "size", None)), file) as stream:
            yield stream


def _scan(path: str) -> Iterator[tuple[str, bool]]:
    """Yield each name in a local directory, and whether it is a file or a link to one. No such directory: nothing."""
    with suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            yield entry.name, os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _map_local(path: str, start: int, stop: int) -> memoryview:
    """Return the bytes [start, stop) of a local file, or fewer at its end, in the system's own memory, without a copy.

    Each page is touched once, so that disks are waited for here, without the interpreter's lock.
    """
    with open(path, "rb") as file:
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size = min(stop, os.fstat(file.fileno()).st_size) - first
        if size <= start - first:
            return memoryview(b"")
        data = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=first))
    np.frombuffer(data, np.uint8)[:: mmap.PAGESIZE].max()
    return data[start - first :]


def open_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL or a local path, and the path on it. Raises what the library raises."""
    kind = fsspec.get_filesystem_class(url.partition("://")[0] if "://" in url else "file")
    filesystem = kind(**{**kind._get_kwargs_from_urls(url), "use_listings_cache": False, **options})
    return filesystem, cast(str, kind._strip_protocol(url))


def single_request_option(filesystem: Any) -> dict[str, int]:
    """Return the option of `cat_file` that keeps s3fs from requesting a file's size before the file.

    Versions before 2026.3 have no such option, and always read a file by one request.
    """
    if "s3" not in filesystem.protocol or "max_concurrency" not in inspect.signature(filesystem._cat_file).parameters:
        return {}
    return {"max_concurrency": 1}


def has_password(url: str) -> bool:
    """Return whether a URL contains a password."""
    return re.match(r"[^/]*://[^/]*:[^/]*@", url) is not None


def make_absolute(url: str) -> str:
    """Return a URL as it is, and a local path (or a `file://` URL) as an absolute path.

    Raises UsageError for a URL with a password, which errors would show.
    """
    if has_password(url):
        raise UsageError("a URL must not hold a password: errors would show it; use options={...}")
    if "://" in url and not url.startswith("file://"):
        return url
    return os.path.abspath(cast(str, fsspec.get_filesystem_class("file")._strip_protocol(url)))
