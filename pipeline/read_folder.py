"""Pictures of a folder, one file each, with their caption and metadata in files beside them (`.txt`, `.json`)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from pipeline.errors import Rejected
from pipeline.records import TEXT_EXTENSIONS, Reject, Sample


def folder_key(path: str) -> str:
    """The key of a picture: its path below the root without the extension, `%` and `.` written %25 and %2E."""
    below = path.split("/", 1)[1]
    stem = below[: len(below) - len(PurePosixPath(below).suffix)]
    return stem.replace("%", "%25").replace(".", "%2E")


def read_folder(
    paths: tuple[str, ...], read: Callable[[str], bytes | None], texts: Sequence[str] = TEXT_EXTENSIONS
) -> Iterator[Sample | Reject]:
    """The pictures at `paths` (from the root's own name on), in that order.

    read: the content of a file, by its path below the root; None where there is no such file.
    texts: extensions of the files beside a picture that come along as columns.
    Rejects (stage "read"): `duplicate_key`, `no_picture` (the file has gone), `bad_text`.
    """
    seen: set[str] = set()
    for position, path in enumerate(paths):
        key, below = folder_key(path), path.split("/", 1)[1]
        try:
            if key in seen:
                raise Rejected("read", "duplicate_key")
            seen.add(key)
            image = read(below)
            if image is None:
                raise Rejected("read", "no_picture")
            stem = below[: len(below) - len(PurePosixPath(below).suffix)]
            yield Sample(position, key, image, {name: _text(read(f"{stem}.{name}"), name) for name in texts})
        except Rejected as why:
            yield Reject.of(position, key, why)


def _text(data: bytes | None, name: str) -> str | None:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        raise Rejected("read", "bad_text", name) from None
