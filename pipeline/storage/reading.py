"""Files read from any storage: as streams, whole, or copied to the local disk."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from latentmill.byte_stream import NO_SUCH_FILE, ByteStream, name_url_in_errors, open_while, read_up_to
from pipeline.errors import ChangedError, DamagedError, Rejected, SourceError, StorageError
from pipeline.records import PlannedFile, Unit
from pipeline.storage.connection import full_url, get_filesystem, get_protocols, http_status, is_local, is_s3, parent
from pipeline.storage.etags import can_open_version, fetch_version, is_other_version, open_version, same_version

READ_AHEAD = 8 << 20  # bytes per request, for files that are read from start to end


@contextmanager
def open_stream(
    url: str, options: Mapping[str, Any], planned: Unit | PlannedFile | None = None, seeking: bool = False
) -> Iterator[BinaryIO]:
    """Open a file for reading: from start to end in blocks, or at any offset (`seeking`).

    On S3, each read compares the ETag (`open_version`), so the only requests are those that read. On other storage, the
    size and the ETag are fetched before the first read and after the last one.
    Raises ChangedError if the size or the ETag differs from the plan, and SourceError if the file changes meanwhile.
    Raises StorageError if fewer bytes arrive than the file has, even if the caller turned that error into another.
    """
    # with a block cache, two columns of a Parquet file that are read in turn would fetch each byte many times
    mode: dict[str, Any] = {"cache_type": "none"} if seeking else {"block_size": READ_AHEAD}
    with name_url_in_errors(url, "read"):
        fs, path = get_filesystem(url, options)
        version = (0, "") if planned is None else (planned.bytes, planned.etag)
        if planned is not None and not can_open_version(fs, version):
            version = fetch_version(fs, path)
            _check_version(url, planned, version)
        is_compared = can_open_version(fs, version)
        file = open_version(fs, path, version, **mode) if is_compared else fs.open(path, "rb", **mode)

    def check() -> None:
        if planned is None:
            return
        with name_url_in_errors(url, "read"):
            after = fetch_version(fs, path)
        if is_compared:
            _check_version(url, planned, after)
        if after != version:
            raise SourceError(f"{url} changed while it was being read")

    size = planned.bytes if planned else getattr(file, "size", None)
    stream = (_VersionStream if is_compared else ByteStream)(file, url, size, check)
    try:
        with open_while(stream, file) as opened:
            yield opened
    except DamagedError:
        if not is_compared:
            check()
        raise
    if not is_compared:
        check()


class _VersionStream(ByteStream):
    """A stream of one version of a file (`open_version`)."""

    def _read_up_to(self, size: int) -> bytes:
        try:
            return super()._read_up_to(size)
        except (OSError, TypeError) as error:
            if is_other_version(error):
                self._check()
            raise


def _check_version(url: str, planned: Unit | PlannedFile, version: tuple[int, str]) -> None:
    """Raise ChangedError if a file has another size or ETag than was planned."""
    if not same_version((planned.bytes, planned.etag), version):
        difference = f"{planned.bytes} bytes then, {version[0]} now"
        difference = "its time or ETag" if version[0] == planned.bytes else difference
        raise ChangedError(
            f"{url} has changed since it was planned ({difference}); run latentmill encode, which says what to do"
        )


def fetch_file_version(url: str, options: Mapping[str, Any]) -> tuple[int, str]:
    """Return the size in bytes and the ETag that a file has now."""
    with name_url_in_errors(url, "read"):
        return fetch_version(*get_filesystem(url, options))


def read_file(url: str, options: Mapping[str, Any], limit: int, size: int | None = None) -> bytes:
    """Read at most `limit` + 1 bytes of a file. The extra byte shows that the file is longer than the limit.

    size: bytes that the file had when it was planned. Raises SourceError if its size differs.
    """
    with name_url_in_errors(url, "read"):
        fs, path = get_filesystem(url, options)
        data = read_slice(fs, path, 0, limit + 1) if is_s3(fs) else None
    if data is not None:
        if size is not None and len(data) != min(size, limit + 1):
            raise make_changed_error(url, size)
        return data
    with open_stream(url, options) as stream:
        if size is not None and stream.seek(0, 2) != size:
            raise make_changed_error(url, size)
        stream.seek(0)
        return stream.read(limit + 1)


def make_changed_error(url: str, size: int) -> SourceError:
    """Return the error for a file that differs from the plan. size: bytes that it had when it was planned."""
    return SourceError(f"{url} has changed since it was planned (then {size} bytes)")


def read_slice(fs: Any, path: str, start: int, end: int | None = None) -> bytes:
    """Read the bytes `[start:end]` of an object on S3 by one request, as of a Python sequence."""
    try:
        return cast(bytes, fs.cat_file(path, start=start, end=end))
    except OSError as error:
        if http_status(error) == 416:  # the slice is empty
            return b""
        raise


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
            return read_up_to(file, stop - start)
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
