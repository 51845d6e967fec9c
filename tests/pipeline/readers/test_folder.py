"""The reader of folders."""

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from pipeline.errors import Rejected, StorageError
from pipeline.limits import Limits
from pipeline.readers.folder import BYTES_AHEAD, IMAGES_AHEAD, make_folder_key, read_folder
from pipeline.readers.image_files import ImageFiles
from pipeline.records import PlannedFile, Sample, path_below_root
from tests.pipeline.readers.test_tar import outcome, read, tar


@pytest.mark.parametrize(
    ("path", "key"),
    [("p/a.jpg", "a"), ("p/b/a.v1.jpg", "b/a%2Ev1"), ("p/100%.png", "100%25"), ("p/x.y/a.gif", "x%2Ey/a")],
)
def test_the_key_of_an_image_in_a_folder(path: str, key: str) -> None:
    assert make_folder_key(path) == key


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def images(*names: str) -> Iterator[ImageFiles]:
    """Yield the planned files of a folder `p`. In each argument, the texts of the image follow its name."""
    for name in names:
        image, *texts = (PlannedFile(f"p/{part}", 1, "") for part in name.split())
        yield ImageFiles(image, tuple(texts))


def test_images_of_a_folder_have_their_texts_or_a_reject_reason(pool: Executor) -> None:
    files = {"a.jpg": b"1", "a.txt": b"one", "b.v2.png": b"2", "b.v2.json": b"{}", "c.jpg": b"3", "c.txt": b"\xff"}
    planned = images("a.jpg a.txt", "a.png a.txt", "b.v2.png b.v2.json", "c.jpg c.txt", "gone.jpg gone.txt")
    missing: list[str] = []
    items = list(
        read_folder(
            planned,
            lambda file, limit: files.get(path_below_root(file.path)),
            lambda file: missing.append(path_below_root(file.path)),
            pool,
        )
    )
    assert [outcome(item) for item in items] == [
        (0, "a", b"1"),
        (1, "a", "duplicate_key"),
        (2, "b%2Ev2", b"2"),
        (3, "c", "bad_text"),
        (4, "gone", "no_image"),
    ]
    columns = [item.columns for item in items if isinstance(item, Sample)]
    assert columns == [{"txt": "one", "json": None}, {"txt": None, "json": "{}"}]
    assert missing == ["gone.jpg"]


def test_an_unreadable_image_or_text_is_a_reject(pool: Executor) -> None:
    files = {"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"}

    def read_or_refuse(file: PlannedFile, limit: int) -> bytes | None:
        path = path_below_root(file.path)
        if path in ("a.jpg", "b.txt"):
            raise Rejected("read", "unreadable")
        return files.get(path)

    items = list(read_folder(images("a.jpg", "b.jpg b.txt", "c.jpg"), read_or_refuse, lambda path: None, pool))
    assert [outcome(item) for item in items] == [(0, "a", "unreadable"), (1, "b", "unreadable"), (2, "c", b"3")]


def test_a_folder_is_read_ahead_by_several_threads_up_to_a_limit(pool: Executor) -> None:
    """Four files are read at once, and the number of images in memory is limited."""
    barrier = threading.Barrier(4, timeout=20)
    requested: list[str] = []

    def read_four(file: PlannedFile, limit: int) -> bytes:
        requested.append(file.path)
        barrier.wait()
        return b"x"

    names = [f"{n:03d}.jpg" for n in range(400)]
    items = read_folder(images(*names), read_four, lambda file: None, pool)
    assert outcome(next(items)) == (0, "000", b"x")
    assert len(requested) <= IMAGES_AHEAD
    assert [item.key for item in items] == [name[:3] for name in names[1:]]
    assert len(requested) == 400


def test_large_images_are_read_ahead_up_to_a_limit_in_bytes(pool: Executor) -> None:
    large = [ImageFiles(PlannedFile(f"p/{n}.jpg", BYTES_AHEAD // 2, ""), ()) for n in range(20)]
    requested: list[str] = []

    def read(file: PlannedFile, limit: int) -> bytes:
        requested.append(file.path)
        return b"x"

    items = read_folder(large, read, lambda file: None, pool)
    next(items)
    pool.submit(lambda: None).result()
    assert len(requested) <= 3
    assert len(list(items)) == 19


def test_an_error_in_a_thread_is_raised_at_its_image(pool: Executor) -> None:
    def read(file: PlannedFile, limit: int) -> bytes:
        if file.path == "p/b.jpg":
            raise StorageError("cannot read p/b.jpg: no answer")
        return b"x"

    items = read_folder(images("a.jpg", "b.jpg", "c.jpg"), read, lambda file: None, pool)
    assert outcome(next(items)) == (0, "a", b"x")
    with pytest.raises(StorageError, match=r"p/b\.jpg"):
        next(items)


def test_each_kind_of_file_is_read_up_to_its_own_limit(pool: Executor) -> None:
    limit_by_path: dict[str, int] = {}

    def read(file: PlannedFile, limit: int) -> bytes:
        limit_by_path[file.path] = limit
        return b"x" * (limit + 1)

    limits = Limits(image_bytes=1000, text_bytes=100)
    (item,) = read_folder(images("a.jpg a.txt"), read, lambda file: None, pool, limits=limits)
    assert limit_by_path == {"p/a.jpg": 1000, "p/a.txt": 100}
    assert outcome(item)[2] == "text_too_long"


def test_a_byte_order_mark_is_not_part_of_a_text(pool: Executor) -> None:
    text = b"\xef\xbb\xbfcaf\xc3\xa9 \xef\xbb\xbf"
    (sample,) = read(tar({"a.jpg": b"1", "a.txt": text}))
    files = {"a.jpg": b"1", "a.txt": text}
    (other,) = read_folder(images("a.jpg a.txt"), lambda f, n: files[path_below_root(f.path)], lambda file: None, pool)
    assert isinstance(sample, Sample)
    assert isinstance(other, Sample)
    assert sample.columns["txt"] == other.columns["txt"] == "caf\u00e9 \ufeff"
