"""Whether a file is the one that was planned, judged by its size and its ETag (`reading.get_etag`)."""

import re

ROUNDING = (100, 10**3, 10**6, 10**9)  # nanoseconds to which disks and tools round a file's time


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
