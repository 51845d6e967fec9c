"""The images of a folder and their texts, as a unit describes them."""

import json
from dataclasses import dataclass

from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError
from pipeline.records import PinnedFile, PlannedFile, Unit
from pipeline.storage.etags import same_etag

UNKNOWN = -1  # size of a file that may differ from the plan


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """An image and its texts, as they were planned."""

    image: PlannedFile
    texts: tuple[PlannedFile, ...]

    def without_pins(self) -> "ImageFiles":
        """Return the same files without sizes and ETags, so that they may differ from the plan."""
        image, *texts = (PlannedFile(file.path, UNKNOWN, "") for file in (self.image, *self.texts))
        return ImageFiles(image, tuple(texts))


def get_folder(path: str) -> str:
    """Return the folder of a file, with a trailing `/`."""
    return path[: path.rfind("/") + 1]


def unpack_files(unit: Unit) -> list[ImageFiles]:
    """Return the files of a folder's unit as they were planned. Raises CacheError if the plan is corrupt."""
    try:
        return [
            ImageFiles(
                PlannedFile(path, size, etag),
                tuple(PlannedFile(get_folder(path) + name, *facts) for name, *facts in texts),
            )
            for path, (size, etag, texts) in zip(unit.paths, json.loads(unit.files), strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise CacheError(f"the plan has no valid list of the files of the unit {unit.name}; {VERIFY_HINT}") from error


def unpack_metadata(unit: Unit) -> tuple[PlannedFile, ...]:
    """Return the tables of a unit's metadata as they were planned. Raises CacheError if the plan is corrupt."""
    try:
        return tuple(PlannedFile(*table) for table in json.loads(unit.metadata)) if unit.metadata else ()
    except (ValueError, TypeError) as error:
        raise CacheError(f"the plan has no valid list of the tables of the unit {unit.name}; {VERIFY_HINT}") from error


def is_same_file(before: PinnedFile, now: PinnedFile, same_source: bool = False) -> bool:
    """Whether a file is unchanged, judged by its size and its ETag. An unknown ETag matches any other.

    same_source: the user states that a file with this path and size is the one that was planned.
    """
    return before.bytes == now.bytes and (same_source or same_etag(before.etag, now.etag))
