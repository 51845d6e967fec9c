"""Read single files of a folder: each whole, by one request on a store, and checked against the plan."""

from collections.abc import Mapping
from typing import Any, cast

from latentmill.stream import name_url_in_errors
from pipeline.errors import SourceError, StorageError
from pipeline.readers.image_files import is_same_file
from pipeline.records import PlannedFile
from pipeline.storage.connection import get_filesystem, get_protocols, http_status, is_local
from pipeline.storage.etags import fetch_version


def read_planned_file(url: str, options: Mapping[str, Any], limit: int, planned: PlannedFile) -> bytes:
    """Read at most `limit` + 1 bytes of a file. The extra byte shows that the file is longer than the limit.

    Raises SourceError if the file differs from the plan, and StorageError if it does not but arrived incomplete.
    """
    with name_url_in_errors(url, "read"):
        fs, path = get_filesystem(url, options)
        expected = min(planned.bytes, limit + 1)
        if is_local(fs):
            with fs.open(path, "rb") as file:
                data = cast(bytes, file.read(limit + 1))
            if not planned.bytes and not planned.etag:  # a broken link when it was planned: there is nothing to compare
                return data
        elif not planned.bytes:
            data = b""  # stores refuse a range of nothing
        elif planned.etag and "s3" in get_protocols(fs) and not getattr(fs, "local_expiry_check", False):
            data = _read_version(fs, path, url, planned, expected)
        else:
            data = cast(bytes, fs.cat_file(path, start=0, end=expected + 1))[: limit + 1]
        in_doubt = is_local(fs) or not planned.bytes or len(data) != expected
        if in_doubt and not is_same_file(planned, PlannedFile(planned.path, *fetch_version(fs, path))):
            raise _make_changed_error(url, planned)
        if len(data) != expected:
            text = f"cannot read {url}: only {len(data)} of {planned.bytes} bytes were delivered"
            raise StorageError(text, may_pass=True)
        return data


def _read_version(fs: Any, path: str, url: str, planned: PlannedFile, count: int) -> bytes:
    """Read the first bytes of an object on S3 by one GET, on the condition that its ETag is the planned one."""
    with fs.open(path, "rb", size=count, cache_type="none") as file:
        # the details are known from the listing; otherwise s3fs would request them by a HEAD
        file.details = {"name": path, "type": "file", "size": count, "ETag": f'"{planned.etag}"'}
        name = "read_kw" if hasattr(file, "read_kw") else "req_kw"  # the latter before s3fs 2026.9
        setattr(file, name, {**getattr(file, name), "IfMatch": f'"{planned.etag}"'})
        try:
            return cast(bytes, file.read())
        except OSError as error:
            if http_status(error) == 412:
                raise _make_changed_error(url, planned) from error
            raise


def _make_changed_error(url: str, planned: PlannedFile) -> SourceError:
    """Return the error for a file that differs from the plan."""
    return SourceError(f"{url} has changed since it was planned (then {planned.bytes} bytes)")
