"""A file that is read: its errors name its URL, and it gives all the bytes that it should have."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from latentmill.errors import LatentmillError, StorageError

# What a disk says of a name that no file has, or can have: a caption's may be too long although the image's is not.
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
# What will not pass by itself: no room, a quota, a disk that is read-only, a name or file that is too large.
FINAL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, *NOT_THERE})


@contextmanager
def name_url_in_errors(url: str, doing: str) -> Iterator[None]:
    """Turn the storage's errors into ours, which name the URL. Its libraries have errors of many kinds."""
    try:
        yield
    except LatentmillError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"cannot {doing} {url}: no such file or directory") from error
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"cannot {doing} {url}: {os.strerror(error.errno or 13).lower()}") from error
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        known = os.strerror(number).lower() if number else type(error).__name__
        said = (str(error).splitlines() or [""])[0][:200]
        local = "://" not in url
        text = f"cannot {doing} {url}: {known}" + ("" if local or not said else f" ({said})")
        raise StorageError(text, may_pass=number not in FINAL) from error


class Stream:
    """A file open for reading; what is not said here is the file's own.

    size: of the whole file; None where nobody knows it. check: raises SourceError where the file has changed by now.
    error: what went wrong in a read. Readers may turn it into an error of their own; `open_stream` raises this one.
    """

    def __init__(self, file: Any, url: str, size: int | None, check: Callable[[], None] = lambda: None) -> None:
        self._file, self._url, self._size, self._check = file, url, size, check
        self._place = 0
        self.error: LatentmillError | None = None

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or all up to the end. Raises StorageError where fewer come although the file is longer."""
        try:
            with name_url_in_errors(self._url, "read"):
                data = self._read(size)
        except LatentmillError as error:
            self.error = error
            raise
        return data

    def _read(self, size: int) -> bytes:
        if self._size is None:
            return cast(bytes, self._file.read(size))
        left = max(0, self._size - self._place)
        wanted = left if size < 0 else min(size, left)
        data = cast(bytes, self._file.read(wanted))
        while len(data) < wanted and (more := self._file.read(wanted - len(data))):
            data += more
        self._place += len(data)
        if len(data) < wanted:
            self._check()
            raise StorageError(
                f"{self._url} ended at byte {self._place}, but has {self._size}: it was cut short on its way",
                may_pass=True,
            )
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """As a file's; from the end that it should have."""
        if whence == 2 and self._size is not None:
            offset, whence = self._size + offset, 0
        self._place = self._file.seek(offset, whence)
        return self._place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
