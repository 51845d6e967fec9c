"""Where a local Ray keeps its files: where it would by itself, unless that cannot work.

Its sockets lie in that directory, and the path of a socket has at most 107 bytes (103 on macOS): the temporary
directories that clusters make for each job are longer. Others are full, or are not there.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.messages import log_note
from pipeline.errors import UsageError

BELOW = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"  # as Ray names it
LONGEST = (103 if sys.platform == "darwin" else 107) - len(BELOW)  # bytes of the directory's path
NAMED_BY = ("RAY_TMPDIR",) if sys.platform == "darwin" else ("RAY_TMPDIR", "TMPDIR")
OURS = "lm-12345678"  # as long as the names that mkdtemp makes
FREE = 100 << 20  # bytes for Ray's logs


@contextmanager
def directory_for_ray() -> Iterator[str]:
    """A directory where a Ray that is started inside this block keeps its files.

    Where it is one of our own, that is said, and it is removed at the end. Raises UsageError where there is none.
    """
    name = next((name for name in NAMED_BY if name in os.environ), "")
    usual = os.environ[name] if name else "/tmp"
    why = why_unfit(usual)
    if why is None:
        yield usual
        return
    said = f"{name} {usual} {why}".lstrip()
    others = ("/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", ""), os.path.expanduser("~"))
    fit = next((other for other in others if why_unfit(other, OURS) is None), None)
    if fit is None:
        raise UsageError(
            f"there is no place for the files of a local Ray: {said}; set RAY_TMPDIR to a directory whose path has at "
            f"most {LONGEST} bytes, or work without Ray: --workers 0"
        )
    ours = tempfile.mkdtemp(prefix="lm-", dir=fit)
    log_note(f"Ray's files are in {ours}: {said}")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = ours
    try:
        yield ours
    finally:
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(ours, ignore_errors=True)  # Ray's processes may still be ending


def why_unfit(directory: str, below: str = "") -> str | None:
    """Why Ray cannot keep its files in a directory, or `below` it; None where it can."""
    if not os.path.isabs(directory):
        return "is not an absolute path"
    length = len(os.fsencode(os.path.join(directory, below).rstrip("/")))
    if length > LONGEST:
        return f"is {length - LONGEST} bytes too long for the paths of its sockets"
    try:
        tempfile.TemporaryFile(dir=directory).close()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return f"cannot be written to: {os.strerror(error.errno or 0).lower()}"
    return None if free >= FREE else f"has {free >> 20} MiB left, too few for its files"
