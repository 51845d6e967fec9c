"""Every error a user can meet, and one that never leaves the pipeline.

LatentmillError            one line for the user: what happened, where, what to do
|-- UsageError             the command cannot work as it was given; exit code 2
|   |-- SourceError        no such source, an empty one, or one that changed
|   |   `-- ChangedError   an input is not what was planned; nothing of it was read
|   |-- VaeError           no AutoencoderKL where one was asked for
|   `-- IdentityError      the cache was made with other settings
|-- CacheError             a folder that is not a cache, or a broken one; exit code 1
|-- StorageError           a file that could not be listed, read or written; exit code 1
|-- ShardError             a shard that cannot be read; its unit fails
|   |-- DamagedError       it can be read up to a damage, where it is rejected from there on
|   `-- NoImagesError      a Parquet file of something else; passed over where other files have images
`-- JobError               work was left undone; exit code 1
Stopped                    a signal asked us to stop; exit code 130 or 143
Rejected                   this one sample cannot be encoded; becomes a row of _rejects/
"""

from typing import Literal

from latentmill.errors import CacheError, IdentityError, LatentmillError, StorageError, UsageError

__all__ = [
    "REASONS",
    "REST_OF_SHARD",
    "CacheError",
    "ChangedError",
    "DamagedError",
    "IdentityError",
    "JobError",
    "LatentmillError",
    "NoImagesError",
    "Rejected",
    "ShardError",
    "SourceError",
    "Stage",
    "Stopped",
    "StorageError",
    "UsageError",
    "VaeError",
]

Stage = Literal["read", "open", "transform", "encode"]

REST_OF_SHARD = "rest_of_shard"  # no sample: a damaged shard stays damaged

# Why a sample was rejected: a closed set, with the sentence that stands beside it. `{}` are numbers from the bytes.
REASONS: dict[str, str] = {
    "no_image": "the sample has no image",
    "duplicate_key": "another image of the shard has this key",
    "no_key": "the key column has no value in this row",
    "image_not_embedded": "the sample has the path of an image or a link to it, not its bytes; or a link to a text",
    "unreadable": "the image, or a text beside it, cannot be read: its permissions forbid it",
    "bad_key": "the key is empty or longer than {} bytes, is not UTF-8, has control characters, or is a path that "
    "leads elsewhere or that readers of tars pass over",
    "bad_text": "the {} is not UTF-8 text, or there are two",
    "text_too_long": "the {} has more than {} bytes",
    "columns_too_large": "the columns take {} bytes, a row's share of its part is {}: --rows-per-part makes it larger",
    REST_OF_SHARD: "from here on the shard is damaged, and its samples cannot be counted",
    "empty": "the image has no bytes",
    "too_many_bytes": "the image has {} bytes, the limit is {}",
    "too_many_pixels": "the image is {} x {} pixels, the limit is {} in all and {} a side",
    "not_an_image": "the bytes are of no image format that is read",
    "corrupt": "the image is damaged or cut off",
    "unsafe": "opening the image ended its process, or took more than {} s or {} bytes of memory",
    "unsupported_mode": "the image's pixels are of a kind that has no rule",
    "not_finite": "the latent is not finite, in float32 either",
}


class SourceError(UsageError):
    """A source is missing, empty, ambiguous, or no longer what was planned."""


class ChangedError(SourceError):
    """An input is no longer what was planned, which was found before anything of it was read."""


class VaeError(UsageError):
    """There is no AutoencoderKL where one was asked for."""


class ShardError(LatentmillError):
    """A shard cannot be read, or not as the job asks for."""


class DamagedError(ShardError):
    """A shard cannot be read to its end: its bytes are damaged, or cut off.

    at: the byte of the file at which the damage was found; two readers of the same bytes give the same number. Parquet
    has no byte of its own for most errors: then it is the start of the row group, or the place of the footer or of the
    end mark. None only where nothing can be said: such an error is never taken for damage of the file.
    """

    def __init__(self, message: str, *, at: int | None = None) -> None:
        super().__init__(message)
        self.at = at


class NoImagesError(ShardError):
    """A Parquet file has no column of images, nor one that may have been meant to be: metadata, embeddings, ..."""


class JobError(LatentmillError):
    """The job ended with work undone."""


class Stopped(BaseException):
    """A signal asked the job to stop; nothing is half done. Like KeyboardInterrupt, no `except Exception` takes it."""


class Rejected(Exception):
    """One sample cannot be encoded, for a reason that lies in its bytes alone. more: what else the detail says."""

    def __init__(self, stage: Stage, reason: str, *numbers: object, more: str = "") -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason
        self.numbers = numbers
        self.detail = REASONS[reason].format(*numbers) + more
