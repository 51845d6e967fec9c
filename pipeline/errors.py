"""All errors that a user can meet, and three that never leave the pipeline.

LatentmillError            one line for the user: the problem, its object, and a remedy
|-- UsageError             the command cannot work with its arguments; exit code 2
|   |-- SourceError        a source that is missing, empty, ambiguous or changed
|   |   `-- ChangedError   an input that differs from the plan; no other version of it was read
|   |-- VaeError           the VAE is not an AutoencoderKL
|   `-- IdentityError      the cache was made with other settings
|-- CacheError             a cache that is inconsistent or damaged; exit code 1
|   |-- NoCacheError       a folder that is not a cache; exit code 2
|   `-- DamagedFileError   a file with rows that cannot be read; a retry cannot succeed
|-- StorageError           a file that could not be listed, read or written; exit code 1
|-- ShardError             a shard that cannot be read; its unit fails
|   |-- DamagedError       a shard that can be read up to damaged bytes; its rest is rejected
|   `-- NoImagesError      a Parquet file without images; skipped if other files have images
`-- JobError               the job ended with unfinished work; exit code 1
Stopped                    a signal stopped the job; exit code 130 or 143

Rejected                   one sample that cannot be encoded; becomes a row of _rejects/
FilteredOut                one sample that a setting leaves out; it is counted
OtherUnitError             a unit whose device failed for another unit; it is run again
"""

from functools import partial
from typing import Literal

from latentmill.errors import CacheError, IdentityError, LatentmillError, NoCacheError, StorageError, UsageError

__all__ = [
    "REASONS",
    "REST_OF_SHARD",
    "CacheError",
    "ChangedError",
    "DamagedError",
    "DamagedFileError",
    "Filter",
    "FilteredOut",
    "IdentityError",
    "JobError",
    "LatentmillError",
    "NoCacheError",
    "NoImagesError",
    "OtherUnitError",
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
Filter = Literal["min_size", "max_aspect", "no_upscale", "min_std"]  # the option, without its dashes

REST_OF_SHARD = "rest_of_shard"  # all samples after damaged bytes, not one sample

# The closed set of reject reasons, each with the sentence that is stored beside it. `{}`: facts about the bytes.
REASONS: dict[str, str] = {
    "no_image": "the sample has no image",
    "duplicate_key": "another image of the shard has this key",
    "several_images": "the image column has {} images in this row: write one row per image",
    "no_key": "the key column has no value in this row",
    "not_found": "there is no file at the path or URL of the image, or its server refuses it",
    "outside_root": "the path of the image is outside the folder of the images (--image-root), or its URL is of a kind "
    "that is not read, or has a password",
    "image_not_embedded": "the sample has a path or a link instead of an image's bytes, or a link instead of a text",
    "unsupported_member": "the image, or a text beside it, is encrypted in its archive, or not compressed by deflate",
    "corrupt_member": "the image, or a text beside it, does not have the size and the checksum that its archive states",
    "unreadable": "the permissions of the image, or of a text beside it, forbid reading it",
    "bad_key": "the key is empty, is longer than {} bytes, is not UTF-8, has control characters, or is a path that "
    "is absolute, ends with `/`, contains `.` or `..`, or is skipped by tar readers",
    "bad_text": "the column {} is not text in its encoding (--text-encoding), or occurs twice",
    "text_too_long": "the column {} has more than {} bytes",
    "columns_too_large": "the columns take {} bytes, but a row's share of its part is {}; "
    "a smaller --rows-per-part raises it",
    REST_OF_SHARD: "the shard is damaged from here on, and the number of its remaining samples is unknown",
    "empty": "the image has no bytes",
    "too_many_bytes": "the image has {} bytes, but the limit is {}",
    "too_many_pixels": "the image has {} x {} pixels, but the limit is {} in total and {} per side",
    "not_an_image": "the bytes are not a supported image format",
    "unsupported_format": "the image is in the format {}, which is not supported; convert it",
    "missing_plugin": "the image is in the format {}, and its plugin is missing; run `pip install {}`",
    "corrupt": "the image is corrupt or truncated",
    "unsafe": "decoding the image ended its process, or took more than {} s or {} bytes of memory",
    "wrong_size": "the image has {} x {} pixels, but with --transform none both sides must be multiples of {}, and "
    "their area at most {} x {} pixels (--resolution)",
    "unsupported_mode": "the pixel mode is not supported (such as 32-bit integers or floats)",
    "not_finite": "the latent is not finite, even in float32",
}


class SourceError(UsageError):
    """A source is missing, empty or ambiguous, or differs from the plan."""


class ChangedError(SourceError):
    """An input differs from the plan. Nothing of another version of it was read."""


class DamagedFileError(CacheError):
    """A file with rows of a cache cannot be read, because its bytes are damaged."""


class VaeError(UsageError):
    """The VAE is missing, is not an AutoencoderKL, or does not fit into the device's memory."""


class ShardError(LatentmillError):
    """A shard cannot be read, or not with the settings of the job."""


class DamagedError(ShardError):
    """A shard cannot be read to its end, because its bytes are damaged or truncated.

    at: the byte of the file at which the damage was found. Two readers of the same bytes report the same number.
    Most errors of Parquet have no byte. Then `at` is the start of the row group, of the footer or of the end mark.
    It is None only if the byte is unknown. Such an error is never accepted as damage of the file.
    """

    def __init__(self, message: str, *, at: int | None = None) -> None:
        super().__init__(message)
        self.at = at


class NoImagesError(ShardError):
    """A Parquet file has no column with images, nor one that may be meant as images: metadata, embeddings, ..."""


class JobError(LatentmillError):
    """The job ended with unfinished work."""


class OtherUnitError(LatentmillError):
    """A unit cannot be finished because its device failed while it encoded images of other units."""


class Stopped(BaseException):
    """A signal stopped the job between two steps. `except Exception` does not catch it, like KeyboardInterrupt."""


class FilteredOut(Exception):
    """One sample that a setting leaves out. filter: the setting."""

    def __init__(self, name: Filter) -> None:
        super().__init__(name)
        self.filter: Filter = name


class Rejected(Exception):
    """One sample cannot be encoded, for a reason that depends on its bytes alone.

    stage: the step that found it. reason: a name in REASONS. facts: what stands for each `{}` of its sentence, in
    order. more: appended to the sentence.
    """

    def __init__(self, stage: Stage, reason: str, *facts: object, more: str = "") -> None:
        super().__init__(reason)
        self.stage = stage
        self.reason = reason
        self.facts = facts
        self.more = more
        self.detail = REASONS[reason].format(*facts) + more

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to restore the error in another process."""
        return partial(Rejected, more=self.more), (self.stage, self.reason, *self.facts)
