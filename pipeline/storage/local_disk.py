"""Publish whole files on a local disk: under a free name (`create`), or over an existing file (`replace`).

On a disk with hard links, one of any number of concurrent writers wins. Some disks have no hard links (exFAT, FAT,
many FUSE and SMB mounts), or none between directories (BeeGFS). On those, an exclusive rename has the same effect, if
the disk supports it. If it does not, `create` may return True for two concurrent writers of one name.
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

# errno values of an unsupported call: EPERM by the manual of link(2), the others from various filesystems
UNSUPPORTED = frozenset(
    {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
    | {errno.EXDEV, errno.EMLINK}
)
AT_FDCWD, RENAME_NOREPLACE = -100, 1  # constants of Linux


class NotExclusive(StorageError):
    """The disk cannot make sure that one of several concurrent writers wins."""


def create(path: str, data: bytes | memoryview, spool: str, exclusive: bool) -> bool:
    """Publish a file if the name is free. Otherwise return False and leave the existing file untouched.

    spool: a directory on the same disk, for the temporary file.
    exclusive: raise NotExclusive if the disk cannot make sure that one of several concurrent writers wins. Otherwise
    the file is written without that guarantee.
    """
    directory = os.path.dirname(path)
    for folder in (directory, spool):
        os.makedirs(folder, exist_ok=True)
    file = _write_hidden(spool, data)
    try:
        created = _try_publish(os.link, file, path)
        if created is None:
            neighbour = os.path.join(directory, os.path.basename(file))
            os.rename(file, neighbour)
            file = neighbour
            created = _try_publish(os.link, file, path)  # BeeGFS links within a directory
        if created is None:
            created = _try_publish(_rename_to_free_name, file, path)
        if created is None:
            if exclusive:
                raise NotExclusive(
                    f"cannot write {path}: the disk has neither hard links nor exclusive renames on this machine; "
                    "mount it as on the driver's machine, or write the cache to another disk"
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
    """Write a whole file, and overwrite an existing one."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    os.replace(_write_hidden(directory, data), path)


def _try_publish(operation: Callable[[str, str], Any], file: str, path: str) -> bool | None:
    """Return whether `operation` published the file, or None if this disk does not support it."""
    try:
        operation(file, path)
    except FileExistsError:
        return os.path.exists(file) and os.path.samefile(file, path)  # NFS: the call succeeded, but its answer was lost
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def _rename_to_free_name(file: str, path: str) -> None:
    """Rename a file, but refuse a taken name, which `os.rename` would overwrite. Linux only."""
    rename = _renameat2()
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), file)
    if rename(AT_FDCWD, os.fsencode(file), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file, None, path)


@cache
def _renameat2() -> Any:
    """Return the C library's function, or None if it has none."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _write_hidden(directory: str, data: bytes | memoryview) -> str:
    """Write a hidden file under a unique name, and return its path once the content is safe on the disk."""
    path = f"{directory}/.{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
    except BaseException:  # also for a signal
        if os.path.exists(path):
            os.unlink(path)
        raise
    return path


def _sync_directory(directory: str) -> None:
    """Make the names in a directory safe on the disk, as far as permissions and the disk allow."""
    try:
        number = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return
    try:
        _sync(number)
    finally:
        os.close(number)


def _sync(number: int) -> None:
    """Call fsync. Ignore disks that do not support it."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
