"""Files of a local disk, published whole: under a name that is free (`create`), or over what stands there (`replace`).

A disk that has hard links lets one of any number of writers win. Some have none (exFAT, FAT, many that are mounted by
FUSE or SMB), or none from one directory to another (BeeGFS). There a rename that refuses a name that is taken does the
same, where the disk knows that kind of rename. Where it does not, two writers at once may both be told that they won.
In every case a reader sees a whole file or none.
"""

import contextlib
import ctypes
import errno
import os
import uuid
from collections.abc import Callable
from functools import cache
from typing import Any

from pipeline.errors import StorageError

# what a disk says that has no such call: EPERM by the manual of link(2), the others by some filesystem
REFUSED = frozenset(
    {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
    | {errno.EXDEV, errno.EMLINK}
)
AT_FDCWD, RENAME_NOREPLACE = -100, 1  # of Linux


class NotExclusive(StorageError):
    """The disk cannot let one writer win."""


def create(path: str, data: bytes, spool: str, exclusive: bool) -> bool:
    """Publish a file, unless the name is taken: then False, and what stands there is untouched.

    spool: a directory of the same disk, for the file on its way.
    exclusive: raise NotExclusive where the disk cannot let one writer win; otherwise do without.
    """
    directory = os.path.dirname(path)
    for needed in (directory, spool):
        os.makedirs(needed, exist_ok=True)
    file = _write_hidden(spool, data)
    try:
        created = _tried(os.link, file, path)
        if created is None:
            beside = os.path.join(directory, os.path.basename(file))
            os.rename(file, beside)
            file = beside
            created = _tried(os.link, file, path)  # BeeGFS links within a directory
        if created is None:
            created = _tried(_rename_to_free_name, file, path)
        if created is None:
            if exclusive:
                raise NotExclusive(
                    f"cannot write {path}: the disk has neither hard links nor exclusive renames on this machine"
                )
            created = not os.path.lexists(path)
            if created:
                os.rename(file, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)
    if created:
        _sync_directory(directory)
    return created


def replace(path: str, data: bytes) -> None:
    """Write a file whole, over what may stand there."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    os.replace(_write_hidden(directory, data), path)


def _tried(put: Callable[[str, str], Any], file: str, path: str) -> bool | None:
    """Whether `put` has published the file; None where this disk has no such call."""
    try:
        put(file, path)
    except FileExistsError:
        return os.path.exists(file) and os.path.samefile(file, path)  # NFS: won, and the first answer was lost
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return None
    return True


def _rename_to_free_name(file: str, path: str) -> None:
    """A rename that refuses a name that is taken, where `os.rename` overwrites it. Of Linux only."""
    rename = _renameat2()
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), file)
    if rename(AT_FDCWD, os.fsencode(file), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file, None, path)


@cache
def _renameat2() -> Any:
    """The C library's function; None where it has none."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _write_hidden(directory: str, data: bytes) -> str:
    """Write a hidden file under a name of its own, safe on the disk when this returns."""
    path = f"{directory}/.{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
    except BaseException:  # a signal, too
        if os.path.exists(path):
            os.unlink(path)
        raise
    return path


def _sync_directory(directory: str) -> None:
    """Make the names in a directory safe on the disk, as far as one may and it can."""
    try:
        number = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return
    try:
        _sync(number)
    finally:
        os.close(number)


def _sync(number: int) -> None:
    """fsync, but for disks that have none."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
