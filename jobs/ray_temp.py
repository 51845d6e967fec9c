"""The directory for the files of a local Ray: Ray's default, unless that cannot work.

Ray's sockets are in that directory, and the path of a socket has at most 107 bytes (103 on macOS). The temporary
directories that clusters create for each job are longer. Other temporary directories are full, or do not exist.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.messages import log_note
from pipeline.errors import UsageError

SOCKET = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"  # as Ray names it
MAX_BYTES = (103 if sys.platform == "darwin" else 107) - len(SOCKET)  # of the directory's path
VARIABLES = ("RAY_TMPDIR",) if sys.platform == "darwin" else ("RAY_TMPDIR", "TMPDIR")
OWN_NAME = "lm-12345678"  # as long as the names that mkdtemp makes
MIN_FREE = 100 << 20  # bytes for Ray's logs


@contextmanager
def directory_for_ray() -> Iterator[str]:
    """Return the directory in which a Ray that is started inside this block keeps its files.

    If Ray's default cannot work, the directory is a new one: its path is logged, and it is removed at the end.
    Raises UsageError if there is no usable directory.
    """
    name = next((name for name in VARIABLES if name in os.environ), "")
    default = os.environ[name] if name else "/tmp"
    reason = explain_unfit(default)
    if reason is None:
        yield default
        return
    explanation = f"{name} {default} {reason}".lstrip()
    others = ("/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", ""), os.path.expanduser("~"))
    parent = next((other for other in others if explain_unfit(other, OWN_NAME) is None), None)
    if parent is None:
        raise UsageError(
            f"no directory is usable for the files of a local Ray: {explanation}; set RAY_TMPDIR to a directory whose "
            f"path has at most {MAX_BYTES} bytes, or run without Ray: --workers 0"
        )
    directory = tempfile.mkdtemp(prefix="lm-", dir=parent)
    log_note(f"Ray's files are in {directory}: {explanation}")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = directory
    try:
        yield directory
    finally:
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(directory, ignore_errors=True)  # Ray's processes may still be ending


def explain_unfit(directory: str, subdirectory: str = "") -> str | None:
    """Return why Ray cannot keep its files in a directory or its subdirectory; None if it can."""
    if not os.path.isabs(directory):
        return "is not an absolute path"
    length = len(os.fsencode(os.path.join(directory, subdirectory).rstrip("/")))
    if length > MAX_BYTES:
        return f"is {length - MAX_BYTES} bytes too long for the paths of Ray's sockets"
    try:
        tempfile.TemporaryFile(dir=directory).close()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return f"cannot be written to: {os.strerror(error.errno or 0).lower()}"
    return None if free >= MIN_FREE else f"has only {free >> 20} MiB left, too few for Ray's files"
