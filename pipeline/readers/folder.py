"""Images of a folder, one file each, with their captions and metadata in files beside them (`.txt`, `.json`)."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from pipeline.errors import Rejected, SourceError
from pipeline.limits import DEFAULT_LIMITS, Limits, check_key, check_text, printable_key
from pipeline.prefetch import in_order
from pipeline.readers.files import read_planned_file
from pipeline.readers.sidecars import UNKNOWN, ImageFiles, unpack_files
from pipeline.records import TEXT_EXTENSIONS, File, Reject, Sample, Unit, extension, is_image, stem
from pipeline.storage.store import check_has_files, none_if_missing, parent, read_file_if_there

READERS = 16  # threads a unit: stores are slow to answer
IMAGES_AHEAD = 64
BYTES_AHEAD = 64 << 20  # of them; at least one image


def read_folder_unit(
    unit: Unit,
    options: Mapping[str, str],
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
    mended: Container[int] = (),
) -> Iterator[Sample | Reject]:
    """The images of a folder's unit from its storage, read ahead by threads of their own.

    mended: positions of images whose files may be others than they were; all else must be what was planned.
    """

    def content(file: File, limit: int) -> bytes | None:
        url = url_of(file)
        if file.bytes == UNKNOWN:
            return read_file_if_there(url, options, limit)
        return none_if_missing(url, options, lambda: read_planned_file(url, options, limit, file))

    def missing(file: File) -> None:
        if is_image(file.path):
            check_has_files(parent(url_of(file)), options)
        elif not file.bytes and not file.etag:
            raise Rejected("read", "image_not_embedded")  # a link that leads nowhere, as in a tar
        elif file.bytes != UNKNOWN:
            raise SourceError(f"{url_of(file)} has gone since it was planned; its image has not")

    def url_of(file: File) -> str:
        return f"{unit.url}/{below_root(file.path)}"

    images = (files.unpinned() if n in mended else files for n, files in enumerate(unpack_files(unit)))
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
    try:
        yield from read_folder(images, content, missing, pool, texts, limits)
    finally:
        pool.shutdown(cancel_futures=True)  # no request outlives its unit


def below_root(path: str) -> str:
    """A path without its first step, the root's own name."""
    return path.split("/", 1)[1]


def folder_key(path: str) -> str:
    """The key of an image: its path below the root without the extension, `%` and `.` written %25 and %2E."""
    return stem(below_root(path)).replace("%", "%25").replace(".", "%2E")


def read_folder(
    images: Iterable[ImageFiles],
    read: Callable[[File, int], bytes | None],
    on_missing: Callable[[File], None],
    pool: Executor,
    texts: Sequence[str] = TEXT_EXTENSIONS,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Sample | Reject]:
    """The images, in their order; `read` and `on_missing` are called in the threads of the pool.

    read: up to so many bytes of a file and one more; None where there is no such file.
    on_missing: told of a file that is not there, before an image is rejected for it, or comes without that text.
    texts: extensions of the files beside an image that come along as columns.
    Rejects (stage "read"): `duplicate_key`, `no_image` (the file has gone), `bad_key`, `bad_text`, `text_too_long`;
    and what `read` and `on_missing` raise as one.
    """

    def column(text: File) -> str | None:
        data = read(text, limits.text_bytes)
        if data is None:
            on_missing(text)
        return check_text(data, extension(text.path), limits)

    def sample(entry: tuple[int, str, ImageFiles | Rejected]) -> Sample | Reject:
        position, key, files = entry
        try:
            if isinstance(files, Rejected):
                raise files
            image = read(files.image, limits.image_bytes)
            if image is None:
                on_missing(files.image)
                raise Rejected("read", "no_image")
            beside = {extension(text.path): column(text) for text in files.texts if extension(text.path) in texts}
            return Sample(position, key, image, {**dict.fromkeys(texts), **beside})
        except Rejected as why:
            return Reject.of(position, printable_key(key, limits), why)

    entries = add_keys(images, limits)
    return in_order(pool, sample, entries, IMAGES_AHEAD, weight=lambda entry: _bytes(entry[2]), budget=BYTES_AHEAD)


def add_keys(images: Iterable[ImageFiles], limits: Limits) -> Iterator[tuple[int, str, ImageFiles | Rejected]]:
    """Position and key of each image, and its files; or why it is rejected before they are read."""
    seen: set[str] = set()
    for position, files in enumerate(images):
        key = folder_key(files.image.path)
        try:
            check_key(key, limits)
            if key in seen:
                raise Rejected("read", "duplicate_key")
            seen.add(key)
            yield position, key, files
        except Rejected as why:
            yield position, key, why


def _bytes(files: ImageFiles | Rejected) -> int:
    """What reading takes of the memory."""
    return 0 if isinstance(files, Rejected) else sum(max(file.bytes, 0) for file in (files.image, *files.texts))
