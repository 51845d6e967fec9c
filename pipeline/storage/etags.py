"""The version of a file, which is its size and its ETag, and whether two versions are the same."""

import os
import re
from collections.abc import Mapping
from typing import Any

from pipeline.storage.connection import is_local

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
