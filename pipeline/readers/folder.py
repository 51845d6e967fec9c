"""Read the images of a folder, with captions and metadata from the files beside them (`.txt`, `.json`)."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from pipeline.errors import Rejected, SourceError
from pipeline.limits import DEFAULT_LIMITS, Limits, check_key, check_text
from pipeline.prefetch import map_in_order
from pipeline.readers.files import read_planned_file
from pipeline.readers.image_files import UNKNOWN, ImageFiles, unpack_files
from pipeline.records import (
    TEXT_EXTENSIONS,
    PlannedFile,
    Reject,
    Sample,
    Unit,
    extension,
    is_image,
    join_url,
    path_below_root,
    stem,
)
from pipeline.storage.connection import parent
from pipeline.storage.reading import check_has_files, read_file_if_exists, read_or_none
from pipeline.text import escape_key, printable_key

READERS = 16  # threads per unit, because stores are slow to answer
IMAGES_AHEAD = 64
BYTES_AHEAD = 64 << 20  # bytes of these images; at least one image is read


def read_folder_unit(
    unit: Unit,
    options: Mapping[str, str],
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    may_differ: Container[int] = (),
    encoding: str = "utf-8",
    with_images: bool = True,
) -> Iterator[Sample | Reject]:
    """Yield the images of a folder's unit from its storage. They are read ahead by separate threads.

    may_differ: positions of images whose files may differ from the plan. encoding: of the texts. with_images: if not,
    only the texts are read, and images have no bytes.
    Raises SourceError if another file differs from the plan.
    """

    def read_content(file: PlannedFile, limit: int) -> bytes | None:
        url = url_of(file)
        if not with_images and is_image(file.path):
            return b""
        if file.bytes == UNKNOWN:
            return read_file_if_exists(url, options, limit)
        return read_or_none(url, options, lambda: read_planned_file(url, options, limit, file))

    def check_missing(file: PlannedFile) -> None:
        if is_image(file.path):
            check_has_files(parent(url_of(file)), options)
        elif not file.bytes and not file.etag:
            raise Rejected("read", "image_not_embedded")  # a broken link, as in a tar
        elif file.bytes != UNKNOWN:
            raise SourceError(f"{url_of(file)} was deleted since it was planned, but its image was not; restore it")

    def url_of(file: PlannedFile) -> str:
        return join_url(unit.root, path_below_root(file.path))

    images = (
        files.without_pins() if position in may_differ else files for position, files in enumerate(unpack_files(unit))
    )
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
    try:
        yield from read_folder(images, read_content, check_missing, pool, texts, limits, encoding)
    finally:
        pool.shutdown(cancel_futures=True)  # no request continues after its unit has ended


def make_folder_key(path: str) -> str:
    """Return the key of an image: its path below the root without the extension, escaped."""
    return escape_key(stem(path_below_root(path)))


def read_folder(
    images: Iterable[ImageFiles],
    read: Callable[[PlannedFile, int], bytes | None],
    on_missing: Callable[[PlannedFile], None],
    pool: Executor,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    encoding: str = "utf-8",
) -> Iterator[Sample | Reject]:
    """Yield the images in their order. `read` and `on_missing` are called in the threads of the pool.

    read: returns up to `limit` + 1 bytes of a file, or None if the file does not exist.
    on_missing: called for a missing file, before its image is rejected or is returned without that text.
    texts: extensions of the files beside an image that are copied as columns. encoding: of these files.
    Rejects (stage "read"): `duplicate_key`, `no_image` (the file was deleted), `bad_key`, `bad_text`, `text_too_long`,
    and each Rejected that `read` or `on_missing` raises.
    """

    def read_text(text: PlannedFile) -> str | None:
        data = read(text, limits.text_bytes)
        if data is None:
            on_missing(text)
        return check_text(data, extension(text.path), limits, encoding)

    def read_sample(entry: tuple[int, str, ImageFiles | Rejected]) -> Sample | Reject:
        position, key, files = entry
        try:
            if isinstance(files, Rejected):
                raise files
            image = read(files.image, limits.image_bytes)
            if image is None:
                on_missing(files.image)
                raise Rejected("read", "no_image")
            columns = {extension(text.path): read_text(text) for text in files.texts if extension(text.path) in texts}
            return Sample(position, key, image, {**dict.fromkeys(texts), **columns})
        except Rejected as error:
            return Reject.from_error(position, printable_key(key, limits.key_bytes), error)

    entries = add_keys(images, limits)
    return map_in_order(
        pool, read_sample, entries, IMAGES_AHEAD, weight=lambda entry: _sum_bytes(entry[2]), budget=BYTES_AHEAD
    )


def add_keys(images: Iterable[ImageFiles], limits: Limits) -> Iterator[tuple[int, str, ImageFiles | Rejected]]:
    """Yield the position, key and files of each image. A Rejected replaces the files if the key is not accepted."""
    keys: set[str] = set()
    for position, files in enumerate(images):
        key = make_folder_key(files.image.path)
        try:
            check_key(key, limits)
            if key in keys:
                raise Rejected("read", "duplicate_key")
            keys.add(key)
            yield position, key, files
        except Rejected as error:
            yield position, key, error


def _sum_bytes(files: ImageFiles | Rejected) -> int:
    """Return the bytes of memory that the files take."""
    return 0 if isinstance(files, Rejected) else sum(max(file.bytes, 0) for file in (files.image, *files.texts))
