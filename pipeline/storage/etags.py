"""Whether a file is what was planned, by its size and its ETag (`storage.etag_of`)."""

import re

ROUNDED = (100, 10**3, 10**6, 10**9)  # nanoseconds, to which disks and tools round the time of a file


def same_etag(one: str, other: str) -> bool:
    """Whether two ETags can be of one content. One that is unknown tells nothing; some disks and tools round times."""
    if one == other or not one or not other:
        return True
    if not (re.fullmatch(r"m-?\d+", one) and re.fullmatch(r"m-?\d+", other)):
        return False
    times = int(one[1:]), int(other[1:])
    return any(times[0] // step == times[1] // step for step in ROUNDED for time in times if time % step == 0)


def same_version(planned: tuple[int, str], now: tuple[int, str]) -> bool:
    """Whether a file is what was planned. Both: its size, its ETag."""
    return planned[0] == now[0] and same_etag(planned[1], now[1])
