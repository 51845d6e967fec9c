"""Folders of images on S3: the number of requests, and the detection of changes, over HTTP."""

import inspect
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from pipeline.errors import SourceError, StorageError
from pipeline.readers.folder import READERS, read_folder_unit
from pipeline.records import Reject, Sample, Unit
from pipeline.sources import units
from pipeline.storage.folder import Folder
from tests.conftest import slow_param
from tests.listed_files import list_source_files
from tests.proxy import Proxy, Request


@pytest.fixture
def images(bucket: str) -> Folder:
    """Write twenty images. Every second image has a caption. The first has metadata in IMAGE_NAME.json."""
    folder = Folder(f"{bucket}/photos")
    for n in range(20):
        folder.replace(f"{n:02d}.jpg", b"image %02d" % n)
        if n % 2 == 0:
            folder.replace(f"{n:02d}.txt", b"caption %02d" % n)
    folder.replace("00.jpg.json", b"{}")
    return folder


def plan_unit(folder: Folder) -> Unit:
    (unit,) = units.make_units(list_source_files((folder.url,), {}, "nowhere"))
    return unit


def count_requests(proxy: Proxy) -> Counter[tuple[str, str]]:
    return Counter((request.method, request.path.split("?")[0].rpartition("/")[2]) for request in proxy.seen)


def test_each_existing_file_costs_one_request_and_there_are_no_others(images: Folder, proxy: Proxy) -> None:
    unit = plan_unit(images)
    proxy.seen.clear()
    samples = list(read_folder_unit(unit, {}))
    assert count_requests(proxy) == {
        **{("GET", f"{n:02d}.jpg"): 1 for n in range(20)},
        **{("GET", f"{n:02d}.txt"): 1 for n in range(0, 20, 2)},
        ("GET", "00.jpg.json"): 1,
    }
    assert samples == [
        Sample(
            n,
            f"{n:02d}",
            b"image %02d" % n,
            {"txt": None if n % 2 else f"caption {n:02d}", "json": None if n else "{}"},
        )
        for n in range(20)
    ]


@pytest.mark.slow
def test_requests_are_concurrent(images: Folder, proxy: Proxy) -> None:
    """More than 10, the default of s3fs: each request waits for the others."""
    unit = plan_unit(images)
    barrier = threading.Barrier(READERS, timeout=20)

    def wait(request: Request) -> None:
        if request.path.endswith(".jpg") and int(request.path[-6:-4]) < READERS:
            barrier.wait()

    proxy.rule = wait
    assert len(list(read_folder_unit(unit, {}))) == 20
    assert not barrier.broken


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00.jpg", "00.txt"])
@pytest.mark.parametrize("is_compared_here", [True, False])
def test_another_content_of_the_same_size_fails_the_unit(
    images: Folder, proxy: Proxy, name: str, is_compared_here: bool
) -> None:
    """s3fs compares the ETag of each answer with the planned one, or else the server does (`If-Match`)."""
    if "local_expiry_check" not in inspect.signature(S3FileSystem.__init__).parameters:
        pytest.skip("s3fs before 2026.3 has no local_expiry_check")
    unit, options = plan_unit(images), {"local_expiry_check": is_compared_here}
    proxy.seen.clear()
    assert len(list(read_folder_unit(unit, options))) == 20
    assert set(count_requests(proxy).values()) == {1}
    images.replace(name, b"X" * (8 if name.endswith("jpg") else 10))
    proxy.seen.clear()
    with pytest.raises(SourceError, match=rf"{images.url}/{name} has changed since it was planned"):
        list(read_folder_unit(unit, options))
    assert not [request for request in proxy.seen if request.method == "HEAD"]


@pytest.mark.slow
def test_a_file_that_was_empty_is_checked_for_changes(images: Folder) -> None:
    images.replace("00.txt", b"")
    unit = plan_unit(images)
    first = next(read_folder_unit(unit, {}))
    assert isinstance(first, Sample)
    assert first.columns["txt"] == ""
    images.replace("00.txt", b"no more")
    with pytest.raises(SourceError, match=r"00\.txt has changed since it was planned"):
        next(read_folder_unit(unit, {}))


def remove(folder: Folder, *names: str) -> None:
    fs, root = folder._locate("")
    for name in names:
        fs.rm_file(f"{root}/{name}")


@pytest.mark.slow
def test_a_missing_image_a_missing_text_and_a_missing_folder_are_distinguished(images: Folder) -> None:
    unit = plan_unit(images)
    remove(images, "01.jpg")
    items = list(read_folder_unit(unit, {}))
    assert [(item.key, item.reason) for item in items if isinstance(item, Reject)] == [("01", "no_image")]
    remove(images, "00.txt")
    with pytest.raises(SourceError, match=r"00\.txt was deleted since it was planned, but its image was not"):
        list(read_folder_unit(unit, {}))
    remove(images, *(name for name in images.list_files() if name != "00.txt"))
    with pytest.raises(SourceError, match=f"{images.url} is missing or empty"):
        list(read_folder_unit(unit, {}))


@pytest.mark.slow
def test_an_error_names_the_file(images: Folder, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = plan_unit(images)
    proxy.rule = lambda request: 403 if request.path.endswith("07.jpg") else None
    items = read_folder_unit(unit, {})
    with pytest.raises(StorageError, match=rf"cannot read {images.url}/07\.jpg: "):
        list(items)


@pytest.mark.slow
def test_a_closed_reader_makes_no_more_requests(images: Folder, proxy: Proxy) -> None:
    for n in range(20, 200):
        images.replace(f"{n:03d}.jpg", b"x")
    unit = plan_unit(images)
    proxy.seen.clear()
    items: Iterator[Sample | Reject] = read_folder_unit(unit, {})
    next(items)
    items.close()  # type: ignore[attr-defined]
    count = len(proxy.seen)
    assert count < 150
    threading.Event().wait(0.3)
    assert len(proxy.seen) <= count + READERS


@pytest.mark.parametrize(
    "source", ["ph*s/0?.jpg", *map(slow_param, ("photos/*.jpg", "photos/{00..01}.jpg", "photos/00.jpg"))]
)
def test_images_named_by_a_pattern_have_their_texts(images: Folder, bucket: str, source: str, tmp_path: Path) -> None:
    shards = list_source_files((f"{bucket}/{source}",), {}, "nowhere")
    (unit,) = units.make_units(shards)
    first = next(read_folder_unit(unit, {}))
    assert isinstance(first, Sample)
    assert first.columns == {"txt": "caption 00", "json": "{}"}
