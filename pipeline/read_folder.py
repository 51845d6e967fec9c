"""Pictures of a folder, one file each, with their caption and metadata in files beside them (`.txt`, `.json`)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from pipeline.errors import Rejected
from pipeline.limits import DEFAULT, Limits, check_key, check_text, shown_key
from pipeline.records import TEXT_EXTENSIONS, Reject, Sample


def folder_key(path: str) -> str:
    """The key of a picture: its path below the root without the extension, `%` and `.` written %25 and %2E."""
    below = path.split("/", 1)[1]
    stem = below[: len(below) - len(PurePosixPath(below).suffix)]
    return stem.replace("%", "%25").replace(".", "%2E")


def read_folder(
    paths: tuple[str, ...],
    read: Callable[[str], bytes | None],
    on_missing: Callable[[str], None],
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT,
) -> Iterator[Sample | Reject]:
    """The pictures at `paths` (from the root's own name on), in that order.

    read: the content of a file, by its path below the root; None where there is no such file.
    on_missing: told of a picture that is not there, before it is rejected; raises where more than the picture has gone.
    texts: extensions of the files beside a picture that come along as columns.
    Rejects (stage "read"): `duplicate_key`, `no_picture` (the file has gone), `bad_key`, `bad_text`, `text_too_long`;
    and what `read` raises as one.
    """
    seen: set[str] = set()
    for position, path in enumerate(paths):
        key, below = folder_key(path), path.split("/", 1)[1]
        try:
            check_key(key, limits)
            if key in seen:
                raise Rejected("read", "duplicate_key")
            seen.add(key)
            image = read(below)
            if image is None:
                on_missing(below)
                raise Rejected("read", "no_picture")
            stem = below[: len(below) - len(PurePosixPath(below).suffix)]
            beside = {name: check_text(read(f"{stem}.{name}"), name, limits) for name in texts}
            yield Sample(position, key, image, beside)
        except Rejected as why:
            yield Reject.of(position, shown_key(key, limits), why)
