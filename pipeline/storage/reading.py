"""Files read from any storage: as streams, whole, or copied to the local disk."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, cast

from latentmill.stream import NO_SUCH_FILE, Stream, name_url_in_errors, open_while
from pipeline.errors import ChangedError, DamagedError, Rejected, SourceError, StorageError
from pipeline.records import PlannedFile, Unit
from pipeline.storage.connection import full_url, get_filesystem, get_protocols, is_local, parent
from pipeline.storage.etags import fetch_version, same_version

READ_AHEAD = 8 << 20  # bytes per request, for files that are read from start to end


@contextmanager
def open_stream(
    url: str, options: Mapping[str, Any], planned: Unit | PlannedFile | None = None, seeking: bool = False
) -> Iterator[BinaryIO]:
    """Open a file for reading: from start to end in blocks, or at any offset (`seeking`).

    Raises ChangedError if the size or the ETag differs from the plan, and SourceError if the file changes meanwhile.
    Raises StorageError if fewer bytes arrive than the file has, even if the caller turned that error into another.
    """
    with name_url_in_errors(url, "read"):
        fs, path = get_filesystem(url, options)
        before = fetch_version(fs, path) if planned is not None else (0, "")
        if planned and not same_version((planned.bytes, planned.etag), before):
            same_size = before[0] == planned.bytes
            difference = "its time or ETag" if same_size else f"{planned.bytes} bytes then, {before[0]} now"
            raise ChangedError(
                f"{url} has changed since it was planned ({difference}); run latentmill encode, which says what to do"
            )
        # with a block cache, two columns of a Parquet file that are read in turn would fetch each byte many times
        mode = {"cache_type": "none"} if seeking else {"block_size": READ_AHEAD}
        file = fs.open(path, "rb", **mode)

    def check() -> None:
        if planned is not None:
            with name_url_in_errors(url, "read"):
                after = fetch_version(fs, path)
            if after != before:
                raise SourceError(f"{url} changed while it was being read")

    stream = Stream(file, url, planned.bytes if planned else getattr(file, "size", None), check)
    try:
        with open_while(stream, file) as opened:
            yield opened
    except DamagedError:
        check()
        raise
    check()


def fetch_current_version(unit: Unit, options: Mapping[str, Any]) -> Unit:
    """Return the unit with the size and ETag that its input has now. Images of a folder are not pinned by a unit."""
    if unit.kind == "folder":
        return unit
    with name_url_in_errors(unit.url, "read"):
        fs, path = get_filesystem(unit.url, options)
        size, etag = fetch_version(fs, path)
    return replace(unit, bytes=size, etag=etag)


def read_file(url: str, options: Mapping[str, Any], limit: int, size: int | None = None) -> bytes:
    """Read at most `limit` + 1 bytes of a file. The extra byte shows that the file is longer than the limit.

    size: bytes that the file had when it was planned. Raises SourceError if its size differs.
    """
    with open_stream(url, options) as stream:
        if size is not None and stream.seek(0, 2) != size:
            raise SourceError(f"{url} has changed since it was planned (then {size} bytes)")
        stream.seek(0)
        return stream.read(limit + 1)


def read_range(url: str, options: Mapping[str, Any], start: int, stop: int) -> bytes:
    """Read the bytes from `start` to `stop` of a file: on a store, by one request.

    Raises StorageError if fewer bytes arrive, or if a web server delivers only whole files.
    """
    with name_url_in_errors(url, "read"):
        fs, path = get_filesystem(url, options)
        is_web = "http" in get_protocols(fs)  # `cat_file` would read the whole file if the server has no ranges
        data = _seek_and_read(fs, path, url, start, stop) if is_web else fs.cat_file(path, start=start, end=stop)
    if len(data) != stop - start:
        text = f"cannot read {url}: only {len(data)} of the {stop - start} bytes from byte {start} on were delivered"
        raise StorageError(text, may_pass=True)
    return cast(bytes, data)


def _seek_and_read(fs: Any, path: str, url: str, start: int, stop: int) -> bytes:
    """Read a part of a file on a web server. Raises StorageError if the server delivers only whole files."""
    try:
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            return cast(bytes, file.read(stop - start))
    except ValueError as error:
        raise StorageError(f"cannot read {url}: its server does not deliver parts of files") from error


def read_file_if_exists(url: str, options: Mapping[str, Any], limit: int, size: int | None = None) -> bytes | None:
    """Read a file as `read_file` does. Return None if it does not exist.

    Raises Rejected for a local file whose permissions forbid reading.
    """
    return read_or_none(url, options, lambda: read_file(url, options, limit, size))


def read_or_none(url: str, options: Mapping[str, Any], read: Callable[[], bytes]) -> bytes | None:
    """Return the result of `read`, or None if the file does not exist.

    Raises Rejected for a local file whose permissions forbid reading.
    """
    try:
        return read()
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            return None
        fs, path = get_filesystem(url, options)
        if is_local(fs) and isinstance(cause, OSError):
            if cause.errno in NO_SUCH_FILE:
                return None
            # if the folder is closed too, the file is not the cause: the ticket of a mount may have expired, say
            if isinstance(cause, PermissionError) and os.access(parent(path), os.R_OK | os.X_OK):
                raise Rejected("read", "unreadable") from error
        raise


def check_has_files(url: str, options: Mapping[str, Any]) -> None:
    """Raise SourceError if a directory is missing or empty, for example because its disk is no longer mounted."""
    with name_url_in_errors(url, "list"):
        fs, path = get_filesystem(url, options)
        if is_local(fs):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
                if next(entries, None) is not None:
                    return
        elif fs.exists(path):  # stores have no empty directories
            return
    raise SourceError(f"{url} is missing or empty, but had files when it was planned: check its disk or bucket")


@contextmanager
def fetch(ref: str, options: Mapping[str, Any], wanted: re.Pattern[str]) -> Iterator[str]:
    """Yield a local path for `ref`: a local path unchanged, or a temporary copy of the file or directory at a URL.

    wanted: pattern of the files to copy from a directory, matched against their paths below it.
    """
    if "://" not in ref:
        yield ref
        return
    with tempfile.TemporaryDirectory(prefix="latentmill-") as local:
        with name_url_in_errors(ref, "read"):
            fs, root = get_filesystem(ref, options)
            root = root.rstrip("/")
            if fs.isfile(root):
                copy = f"{local}/{root.rpartition('/')[2]}"
                _copy(fs, root, fs.size(root), copy)
            else:
                copy = local
                for path, info in fs.find(root, detail=True).items():
                    below = path[len(root) + 1 :]
                    if wanted.fullmatch(below):
                        os.makedirs(parent(f"{local}/{below}"), exist_ok=True)
                        _copy(fs, path, info["size"], f"{local}/{below}")
        yield copy


def _copy(fs: Any, path: str, size: int | None, local: str) -> None:
    """Copy a file to the local disk. size: its bytes. Raises StorageError if fewer bytes arrive."""
    fs.get_file(path, local)
    if size is not None and (received := os.path.getsize(local)) != size:
        message = f"{full_url(fs, path)} ended at byte {received}, but has {size} bytes: the transfer was cut short"
        raise StorageError(message, may_pass=True)
