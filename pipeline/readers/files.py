"""Read single files of a folder: each whole, by one request on a store, and checked against the plan."""

from collections.abc import Mapping
from typing import Any, cast

from latentmill.byte_stream import name_url_in_errors
from pipeline.errors import StorageError
from pipeline.readers.image_files import is_same_file
from pipeline.records import PlannedFile
from pipeline.storage.connection import get_filesystem, is_local
from pipeline.storage.etags import can_open_version, fetch_version, is_other_version, open_version
from pipeline.storage.reading import make_changed_error


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
        elif can_open_version(fs, (planned.bytes, planned.etag)):
            data = _read_version(fs, path, url, planned, expected)
        else:
            data = cast(bytes, fs.cat_file(path, start=0, end=expected + 1))[: limit + 1]
        in_doubt = is_local(fs) or not planned.bytes or len(data) != expected
        if in_doubt and not is_same_file(planned, PlannedFile(planned.path, *fetch_version(fs, path))):
            raise make_changed_error(url, planned.bytes)
        if len(data) != expected:
            text = f"cannot read {url}: only {len(data)} of {planned.bytes} bytes were delivered"
            raise StorageError(text, may_pass=True)
        return data


def _read_version(fs: Any, path: str, url: str, planned: PlannedFile, count: int) -> bytes:
    """Read the first bytes of an object on S3 by one GET, provided that its ETag is the planned one."""
    try:
        with open_version(fs, path, (planned.bytes, planned.etag), count, cache_type="none") as file:
            return cast(bytes, file.read())
    except (OSError, TypeError) as error:
        if is_other_version(error):
            raise make_changed_error(url, planned.bytes) from error
        raise
