"""The version of a file, which is its size and its ETag: whether two are the same, and how only one of them is read."""

import os
import re
from collections.abc import Mapping
from typing import Any

from pipeline.storage.connection import http_status, is_local, is_s3

ROUNDING = (100, 10**3, 10**6, 10**9)  # nanoseconds to which disks and tools round a file's time


def get_etag(info: Mapping[str, Any]) -> str:
    """Return the version of a file's content, as its storage reports it. It is empty if nothing is reported.

    It is a store's ETag, or the hub's blob id or hash. For a local file it is `m` and the mtime in nanoseconds.
    """
    if "mtime_ns" in info:
        return f"m{info['mtime_ns']}"
    return str(info.get("ETag") or info.get("etag") or info.get("blob_id") or info.get("xet_hash") or "").strip('"')


def fetch_version(fs: Any, path: str) -> tuple[int, str]:
    """Return the size in bytes and the ETag of a file."""
    if is_local(fs):
        stat = os.stat(path)
        info: Mapping[str, Any] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    else:
        info = fs.info(path)
    return int(info["size"] or 0), get_etag(info)


def same_etag(first: str, second: str) -> bool:
    """Whether two ETags may belong to the same content.

    An unknown ETag matches any other. Times match if one of them is the other, rounded down by a disk or a tool.
    """
    if first == second or not first or not second:
        return True
    if not (re.fullmatch(r"m-?\d+", first) and re.fullmatch(r"m-?\d+", second)):
        return False
    times = int(first[1:]), int(second[1:])
    return any(times[0] // step == times[1] // step for step in ROUNDING for time in times if time % step == 0)


def same_version(planned: tuple[int, str], current: tuple[int, str]) -> bool:
    """Whether a file is the one that was planned. Both arguments are its size in bytes and its ETag."""
    return planned[0] == current[0] and same_etag(planned[1], current[1])


def can_open_version(fs: Any, version: tuple[int, str]) -> bool:
    """Whether `open_version` can open this version. An empty file cannot be compared, because nothing is read of it."""
    return is_s3(fs) and all(version)


def open_version(fs: Any, path: str, version: tuple[int, str], count: int | None = None, **mode: Any) -> Any:
    """Open one version of an object on S3 for reading. That takes no request.

    Each read compares the ETag, and raises an error if the object has another one (`is_other_version`).
    count: read only the first bytes, as if the object ended there. mode: further options of `fs.open`.
    """
    size, etag = version
    file = fs.open(path, "rb", size=size if count is None else count, **mode)
    # the details are known from the listing; otherwise s3fs would request them by a HEAD
    file.details = {"name": path, "type": "file", "size": size, "ETag": f'"{etag}"'}
    if not getattr(fs, "local_expiry_check", False):  # then s3fs compares the ETag of each answer
        name = "read_kw" if hasattr(file, "read_kw") else "req_kw"  # the latter before s3fs 2026.9
        setattr(file, name, {**getattr(file, name), "IfMatch": f'"{etag}"'})
    return file


def is_other_version(error: BaseException | None) -> bool:
    """Whether a read failed because the object has another ETag than `open_version` was given.

    s3fs raises a TypeError while it handles an answer without a message, as Ceph's are.
    """
    error = error.__context__ if isinstance(error, TypeError) else error
    return type(error).__name__ == "FileExpired" or http_status(error) == 412
