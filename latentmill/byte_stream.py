"""A file stream that names its URL in errors, and that delivers all bytes of the file or raises an error."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from latentmill.error_text import first_line
from latentmill.errors import LatentmillError, StorageError

# errno values that mean "no such file". ENAMETOOLONG: a caption's name can be too long although the image's is not.
NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
# errno values that a retry does not change: a full disk, a quota, a read-only disk, a name or file that is too large.
PERMANENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, *NO_SUCH_FILE})

CREDENTIALS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use storage options: --storage-option key=env:NAME and "
    "secret=env:NAME, or anon=true for a public bucket"
)


@contextmanager
def name_url_in_errors(url: str, verb: str) -> Iterator[None]:
    """Turn a storage library's errors into StorageErrors that name the URL. The libraries raise many types.

    verb: the operation, as in "cannot VERB URL".
    """
    try:
        yield
    except LatentmillError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"cannot {verb} {url}: no such file or directory") from error
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"cannot {verb} {url}: {os.strerror(error.errno or 13).lower()}") from error
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        known = os.strerror(number).lower() if number else type(error).__name__
        detail = first_line(error)[:200]
        if type(error).__name__ == "NoCredentialsError":  # of botocore
            known, detail = "no credentials", CREDENTIALS_HINT
        is_url = "://" in url
        message = f"cannot {verb} {url}: {known}" + (f" ({detail})" if is_url and detail else "")
        raise StorageError(message, may_pass=number not in PERMANENT) from error


def read_up_to(file: Any, size: int) -> bytes:
    """Read `size` bytes, or all up to the end. A single read, as of a file on a web server, may return fewer."""
    data = cast(bytes, file.read(size))
    if size < 0 or len(data) >= size:
        return data
    pieces, missing = [data], size - len(data)
    while missing > 0 and (more := file.read(missing)):
        pieces.append(more)
        missing -= len(more)
    return b"".join(pieces)


class ByteStream:
    """A file that is open for reading. Attributes that are not defined here are the file's own.

    size: bytes of the whole file; None if it is unknown. check: raises SourceError if the file has changed.
    error: the error of a failed read. A reader may turn it into another error; `open_stream` raises this one.
    """

    def __init__(self, file: Any, url: str, size: int | None, check: Callable[[], None] = lambda: None) -> None:
        self._file, self._url, self._size, self._check = file, url, size, check
        self._offset = 0
        self.error: LatentmillError | None = None

    @property
    def is_remote(self) -> bool:
        """Whether each read is a request to a store."""
        return "://" in self._url

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, or fewer at the end of the file. Read all if `size` is negative.

        Raises StorageError if fewer bytes arrive although the file is longer.
        """
        try:
            with name_url_in_errors(self._url, "read"):
                data = self._read(size)
        except LatentmillError as error:
            self.error = error
            raise
        return data

    def _read(self, size: int) -> bytes:
        if self._size is None:
            return self._read_up_to(size)
        remaining = max(0, self._size - self._offset)
        wanted = remaining if size < 0 else min(size, remaining)
        data = self._read_up_to(wanted)
        self._offset += len(data)
        if len(data) < wanted:
            self._check()
            raise StorageError(
                f"{self._url} ended at byte {self._offset}, but has {self._size} bytes: the transfer was cut short",
                may_pass=True,
            )
        return data

    def _read_up_to(self, size: int) -> bytes:
        return read_up_to(self._file, size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Seek as in a file. Offsets from the end are relative to the size that the file should have."""
        if whence == 2 and self._size is not None:
            offset, whence = self._size + offset, 0
        self._offset = self._file.seek(offset, whence)
        return self._offset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def open_while(stream: ByteStream, file: Any) -> Iterator[BinaryIO]:
    """Yield a stream, and close its file at the end. The error of a failed read is always raised.

    Otherwise a reader may mistake the end of the received bytes for the end of the file, or raise another error.
    """
    with file:
        try:
            yield cast(BinaryIO, stream)
        except Exception as error:
            if stream.error is not None and error is not stream.error:
                raise stream.error from error
            raise
    if stream.error is not None:
        raise stream.error
