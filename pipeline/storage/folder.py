"""The directory that a cache or previews are written to, on any storage.

`create` is the one way to publish a file that must never change. `replace` is the one for files that are rewritten.
There is no open-for-write: an fsspec file that is closed by an exception publishes half of its content.

In memory and on most local disks, one of any number of concurrent calls of `create` wins, and no reader sees a partial
file. On object stores `create` is one conditional request. `supports_conditional_create` tests that.
"""

import base64
import contextlib
import hashlib
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

from latentmill.byte_stream import ByteStream, name_url_in_errors
from latentmill.folder import CacheFolder, single_request_option
from pipeline.prefetch import map_in_order
from pipeline.storage import local_disk
from pipeline.storage.connection import get_filesystem, get_protocols, http_status, is_local, is_memory, is_s3
from pipeline.storage.reading import read_slice

ONE_REQUEST = 5 << 30  # bytes up to which a body is sent as one request: not every store has atomic multipart uploads
PROBES = 3
READERS = 16  # threads that read small files at once
CONDITIONAL = frozenset({"s3", "gs", "abfs"})  # protocols whose fsspec library has a conditional create

_memory_lock = threading.Lock()  # memory:// checks and creates in two steps


@dataclass(frozen=True, slots=True)
class Folder(CacheFolder):
    """A directory to write to, by names relative to it. It is small enough to be sent to another process.

    exclusive: `supports_conditional_create` was true on the driver. A local disk without that support is then an error.
    """

    exclusive: bool = False

    def _locate(self, name: str) -> tuple[Any, str]:
        """Return the filesystem, and the path of a name on it."""
        fs, root = get_filesystem(self.url, self.options)
        return fs, f"{root.rstrip('/')}/{name}" if name else root

    def is_empty(self) -> bool:
        """Whether the directory has no entry, or does not exist."""
        fs, path = self._locate("")
        with name_url_in_errors(self.url, "list"):
            try:
                return not fs.ls(path, detail=False, refresh=True)
            except FileNotFoundError:
                return True

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises StorageError, also if the file does not exist."""
        fs, path = self._locate(name)
        with name_url_in_errors(self.url_of(name), "read"):
            return _read_whole(fs, path, self.url_of(name))

    def read_each(self, folder: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Read these files of a sub-folder, each name with its content. Many are read at once, as stores are slow."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from map_in_order(pool, lambda name: (name, self.read(f"{folder}/{name}")), names, window=4 * READERS)

    def read_if_exists(self, name: str) -> bytes | None:
        """Read a whole file. Return None if it does not exist."""
        fs, path = self._locate(name)
        with name_url_in_errors(self.url_of(name), "read"):
            try:
                return _read_whole(fs, path, self.url_of(name))
            except FileNotFoundError:
                return None

    def read_slice(self, name: str, start: int, end: int | None = None) -> bytes | None:
        """Read the bytes `[start:end]` of a file, as of a Python sequence. Return None if the file does not exist.

        On S3, this is one request.
        """
        fs, path = self._locate(name)
        with name_url_in_errors(self.url_of(name), "read"):
            try:
                if is_s3(fs):
                    return read_slice(fs, path, start, end)
                with fs.open(path, "rb") as file:
                    first, last, _ = slice(start, end).indices(file.size)
                    stream = ByteStream(file, self.url_of(name), file.size)
                    stream.seek(first)
                    return stream.read(max(0, last - first))
            except FileNotFoundError:
                return None

    def list_files_of(self, below: str, prefix: str) -> list[str]:
        """Return the sorted names of the files directly in the sub-folder `below` that begin with a prefix.

        On object stores, this is one request for up to 1,000 names. On other storage, the whole sub-folder is listed.
        """
        fs, path = self._locate(below)
        with name_url_in_errors(self.url_of(f"{below}/{prefix}"), "list"), contextlib.suppress(FileNotFoundError):
            if get_protocols(fs) & CONDITIONAL:
                found = [str(file)[len(path) + 1 :] for file in fs.find(path, prefix=prefix)]
                return sorted(name for name in found if "/" not in name)
        return sorted(name for name in self.iterate_names(below) if name.startswith(prefix))

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Publish a whole file if the name is free. Otherwise return False and leave the existing file untouched."""
        fs, path = self._locate(name)
        with name_url_in_errors(self.url_of(name), "write"):
            if is_local(fs):
                return local_disk.create(path, data, self._locate("_tmp")[1], self.exclusive)
            if is_memory(fs):
                with _memory_lock, contextlib.suppress(FileExistsError):
                    fs.pipe_file(path, bytes(data), mode="create")
                    return True
                return False
            return _create_object(fs, path, data)

    def supports_conditional_create(self) -> bool:
        """Whether one of several concurrent writers wins on this storage.

        If the storage may support that, a probe file is created twice and removed.
        """
        fs, _ = self._locate("")
        if is_memory(fs):
            return True
        if not is_local(fs) and not get_protocols(fs) & CONDITIONAL:
            return False
        probed = replace(self, exclusive=True)
        for _ in range(PROBES):
            name = f"_tmp/probe-{uuid.uuid4().hex}"
            try:
                first, second = probed.create(name, b"probe"), probed.create(name, b"probe")
            except local_disk.NotExclusive:
                return False
            with name_url_in_errors(self.url_of(name), "remove"):
                fs.rm_file(self._locate(name)[1])
            if first:  # otherwise the first answer was lost, and the library's own retry was refused
                return not second
        return False

    def replace(self, name: str, data: bytes) -> None:
        """Write a whole file, and overwrite an existing one."""
        fs, path = self._locate(name)
        with name_url_in_errors(self.url_of(name), "write"):
            if is_local(fs):
                local_disk.replace(path, data)
            else:
                fs.pipe_file(path, data)


def _read_whole(fs: Any, path: str, url: str) -> bytes:
    """Read a whole file. A store's library checks its length by the header of the answer, `ByteStream` on disks."""
    if not is_local(fs):
        return cast(bytes, fs.cat_file(path, **single_request_option(fs)))
    with fs.open(path, "rb") as file:
        return ByteStream(file, url, file.size).read()


def _create_object(fs: Any, path: str, data: bytes | memoryview) -> bool:
    """Send the whole body in one conditional request. Return False if the name is taken.

    Stores refuse a taken name in different ways: FileExistsError, or status 412.
    """
    for attempt in range(6):
        try:
            # a copy: a body that is read piece by piece was sent empty by a retry of s3fs after a 503
            fs.pipe_file(path, bytes(data), mode="create", chunksize=ONE_REQUEST, **_checksum_option(fs, data))
            return True
        except FileExistsError:
            return False
        except OSError as error:
            status = http_status(error)
            if status == 412:
                return False
            if status != 409 or attempt == 5:  # 409: another writer's request is in progress, and may still fail
                raise
            time.sleep(0.1 * 2**attempt)
    return False


def _checksum_option(fs: Any, data: bytes | memoryview) -> dict[str, str]:
    """Return the option that lets S3 refuse a body that was corrupted in transfer. GCS's library checks by itself."""
    if not is_s3(fs):
        return {}
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
