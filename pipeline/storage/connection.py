"""URLs, and the filesystems behind them. In pipeline/, only this module imports fsspec.

Failed requests are retried with growing pauses by each store's own library (S3: `RETRIES`). A request that still fails
then fails the unit.
"""

import contextlib
import datetime
import inspect
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import glob_translate

from latentmill.byte_stream import name_url_in_errors
from latentmill.error_text import first_line
from latentmill.folder import has_password, open_filesystem
from pipeline.errors import StorageError, UsageError
from pipeline.records import get_shard_stem

RETRIES = {"mode": "standard", "max_attempts": 8}  # of botocore, for 500, 503 and resets: about a minute in total
CONNECTIONS = 64  # per S3 server. With botocore's default of 10, the readers of folders would wait for each other.


def get_filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the filesystem of a URL or a local path, and the path on that filesystem.

    `::` is part of a name. It does not chain filesystems as in fsspec.
    Raises UsageError if the URL contains a password, StorageError if the library refuses the URL or its options.
    """
    _check_password(url)
    if "://" not in url:
        local = LocalFileSystem()
        return local, cast(str, local._strip_protocol(url))
    protocol = url.partition("://")[0]
    extra: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        retries = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"retries": RETRIES}
        extra["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **retries}
        if _can_compare_etags():  # of each answer, because some servers ignore or refuse the header If-Match
            extra["local_expiry_check"] = True
    try:
        fs, path = open_filesystem(url, {**extra, **options})
        if protocol in ("s3", "s3a"):
            _parse_times_fast(fs)
        return fs, path
    except Exception as error:  # libraries check their options here, each with its own exceptions
        hint = "; the extra hub has it" if protocol == "hf" and isinstance(error, ImportError) else ""
        raise StorageError(f"cannot reach {url}: {first_line(error) or type(error).__name__}{hint}") from error


def _parse_times_fast(fs: Any) -> None:
    """Let a filesystem on S3 parse the times in answers by Python's own parser.

    A listing has a time for each name. botocore's parser takes 60 of the 80 ms of CPU of a page of 1,000 names.
    """
    if fs.session is not None:
        return
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession(**fs.kwargs)  # as s3fs makes it when it connects
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
    fs.session = session


def parse_time(value: Any) -> datetime.datetime:
    """Return a time in an answer of S3, as botocore does, but faster for ISO 8601."""
    try:
        return datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):  # a number, or the form of a header
        from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

        return cast(datetime.datetime, parse_timestamp(value))


@cache
def _can_compare_etags() -> bool:
    """Whether s3fs can compare the ETag of each answer with an expected one: from version 2026.3 on."""
    return "local_expiry_check" in inspect.signature(fsspec.get_filesystem_class("s3").__init__).parameters


def _check_password(url: str) -> None:
    """Raise UsageError if a URL contains a password."""
    if has_password(url):
        raise UsageError(
            "a URL must not contain a password, because URLs are written to the cache; "
            "use --storage-option KEY=env:NAME instead"
        )


def make_absolute(url: str) -> str:
    """Return a URL unchanged, and a local path as an absolute one: workers have another working directory.

    Raises UsageError if the URL contains a password.
    """
    _check_password(url)
    if "://" in url and not url.startswith("file://"):
        return url
    return os.path.abspath(get_filesystem(url, {})[1])


def is_local(fs: Any) -> bool:
    """Whether a filesystem is this machine's. Only a local one has links, pipes and permissions."""
    return isinstance(fs, LocalFileSystem)


def is_directory(fs: Any, path: str) -> bool:
    """Whether an existing path is a directory. s3fs's `isdir` would list the whole directory."""
    return bool(fs.info(path)["type"] == "directory" if is_s3(fs) else fs.isdir(path))


def is_memory(fs: Any) -> bool:
    """Whether a filesystem is in this process's memory (`memory://`)."""
    return isinstance(fs, MemoryFileSystem)


def get_protocols(fs: Any) -> set[str]:
    """Return the protocols with which URLs of a filesystem may begin."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def is_s3(fs: Any) -> bool:
    """Whether a filesystem is that of s3fs."""
    return "s3" in get_protocols(fs)


def full_url(fs: Any, path: str) -> str:
    """Return the URL of a path, valid on any machine. A local path is returned unchanged."""
    return path if is_local(fs) else cast(str, fs.unstrip_protocol(path))


def to_listed_url(url: str) -> str:
    """Return a URL or a path in the spelling of `full_url`.

    It does not connect to the store, because the store may need options that are not known here.
    """
    filesystem = fsspec.get_filesystem_class(url.partition("://")[0] if "://" in url else "file")
    path = cast(str, filesystem._strip_protocol(url))
    if filesystem is LocalFileSystem:
        return path
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    return f"{protocol}://{path}"


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Return the expression that matches the paths which a glob names, as fsspec reads it."""
    return re.compile(glob_translate(pattern))


def parent(path: str) -> str:
    """Return the path up to its last `/`. It is empty if the path has none."""
    return path.rsplit("/", 1)[0] if "/" in path else ""


def sibling_url(tar: str) -> str:
    """Return the URL at which img2dataset stores the metadata of a tar's samples."""
    return get_shard_stem(tar) + ".parquet"


def exists(url: str, options: Mapping[str, Any]) -> bool:
    """Whether a file or a directory exists at a URL."""
    with name_url_in_errors(url, "look for"):
        fs, path = get_filesystem(url, options)
        return bool(fs.exists(path))


def check_reachable(url: str, options: Mapping[str, Any]) -> None:
    """Raise StorageError if the storage of a URL does not answer. "No such file" counts as an answer."""
    with name_url_in_errors(url, "reach"), contextlib.suppress(FileNotFoundError):
        fs, path = get_filesystem(url, options)
        fs.info(path)


def http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status that caused an error. It is None if no store answered."""
    while error is not None:
        if response := getattr(error, "response", None):
            return cast(int | None, response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        if isinstance(status := getattr(error, "status", None), int):  # of aiohttp
            return status
        error = error.__cause__
    return None


def find_first_cause(error: BaseException) -> BaseException:
    """Return the error from which an error was raised in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
