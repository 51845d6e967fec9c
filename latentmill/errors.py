"""The errors that a user of a cache can meet. The errors of the jobs, in `pipeline.errors`, are derived from these."""


class LatentmillError(Exception):
    """The root of all errors. `str(error)` is one line that a user can act on."""

    exit_code = 1


class UsageError(LatentmillError):
    """The command, or the call, cannot work with its arguments."""

    exit_code = 2


class IdentityError(UsageError):
    """The cache is not the expected one: it has other settings or another digest."""


class CacheError(LatentmillError):
    """A folder is not a latentmill cache, or its files are inconsistent."""


class NoCacheError(CacheError):
    """A folder has no cache.json: it is not a cache, or it does not exist."""

    exit_code = 2


class StorageError(LatentmillError):
    """A storage operation failed: no such file, no permission, no space or no answer.

    may_pass: whether the same request may succeed later, because the storage gave no answer or an incomplete one.
    """

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass
