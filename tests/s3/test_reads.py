"""Inputs on S3 that are read as they were planned: no request but those that read, and every change is noticed."""

import inspect
from collections import Counter
from typing import Any

import pytest
from s3fs import S3FileSystem

from pipeline.errors import ChangedError, SourceError, StorageError
from pipeline.records import PlannedFile
from pipeline.storage.etags import fetch_version
from pipeline.storage.folder import Folder
from pipeline.storage.reading import READ_AHEAD, open_stream, read_file
from tests.conftest import slow_param
from tests.proxy import Proxy

SIZE = 2 * READ_AHEAD + 5
BY_SERVER = {"local_expiry_check": False}  # by If-Match, instead of by comparing the ETag of each answer
CHECKS = pytest.mark.parametrize(
    "options",
    [{}, slow_param(BY_SERVER)]
    if "local_expiry_check" in inspect.signature(S3FileSystem.__init__).parameters
    else [{}],
    ids=str,
)


@pytest.fixture
def planned(bucket: str) -> PlannedFile:
    Folder(bucket).replace("x.tar", bytes(SIZE))
    return PlannedFile(f"{bucket}/x.tar", *fetch_version(*Folder(bucket)._locate("x.tar")))


def count_requests(proxy: Proxy) -> Counter[str]:
    return Counter(request.method for request in proxy.seen)


@CHECKS
def test_a_planned_file_costs_one_request_for_each_block(
    planned: PlannedFile, proxy: Proxy, options: dict[str, Any]
) -> None:
    with open_stream(planned.path, options, planned) as stream:
        assert sum(len(stream.read(1 << 20)) for _ in range(20)) == SIZE
    assert set(count_requests(proxy)) == {"GET"}
    assert count_requests(proxy)["GET"] <= 4
    proxy.seen.clear()
    with open_stream(planned.path, options, planned, seeking=True) as stream:
        assert stream.seek(0, 2) == SIZE
        stream.seek(-8, 2)
        assert stream.read(8) == bytes(8)
    assert count_requests(proxy) == {"GET": 1}


@CHECKS
@pytest.mark.parametrize("seeking", [False, True])
def test_a_change_before_the_first_read_is_noticed_by_that_read(
    planned: PlannedFile, bucket: str, options: dict[str, Any], seeking: bool
) -> None:
    Folder(bucket).replace("x.tar", bytes(SIZE - 1) + b"1")
    changed = pytest.raises(ChangedError, match=r"x\.tar has changed since it was planned \(its time or ETag\)")
    with changed, open_stream(planned.path, options, planned, seeking) as stream:
        stream.read(1)
    Folder(bucket).replace("x.tar", b"1")
    changed = pytest.raises(ChangedError, match=rf"x\.tar has changed .* \({SIZE} bytes then, 1 now\)")
    with changed, open_stream(planned.path, options, planned, seeking) as stream:
        stream.read(1)


@CHECKS
def test_a_change_between_two_reads_is_noticed_whatever_error_the_reader_raises(
    planned: PlannedFile, bucket: str, options: dict[str, Any]
) -> None:
    with (
        pytest.raises(ChangedError, match=r"x\.tar has changed since it was planned"),
        open_stream(planned.path, options, planned, seeking=True) as stream,
    ):
        assert stream.read(10) == bytes(10)
        Folder(bucket).replace("x.tar", bytes(SIZE - 1) + b"1")
        try:
            stream.read(10)
        except ChangedError as error:
            raise ValueError("what?") from error


@CHECKS
def test_an_unknown_etag_is_fetched_once(
    planned: PlannedFile, bucket: str, proxy: Proxy, options: dict[str, Any]
) -> None:
    unknown = PlannedFile(planned.path, planned.bytes, "")
    with open_stream(planned.path, options, unknown, seeking=True) as stream:
        stream.read(10)
    assert count_requests(proxy) == {"HEAD": 1, "GET": 1}
    with (
        pytest.raises(SourceError, match=r"x\.tar changed while it was being read"),
        open_stream(planned.path, options, unknown, seeking=True) as stream,
    ):
        Folder(bucket).replace("x.tar", bytes(SIZE - 1) + b"1")
        stream.read(10)


def test_a_file_that_was_empty_is_compared_before_it_is_read(bucket: str) -> None:
    Folder(bucket).replace("empty.tar", b"")
    planned = PlannedFile(f"{bucket}/empty.tar", *fetch_version(*Folder(bucket)._locate("empty.tar")))
    with open_stream(planned.path, {}, planned) as stream:
        assert stream.read() == b""
    Folder(bucket).replace("empty.tar", b"1")
    with pytest.raises(ChangedError, match=r"0 bytes then, 1 now"), open_stream(planned.path, {}, planned):
        pass


def test_a_deleted_file_is_missing(planned: PlannedFile, bucket: str) -> None:
    fs, path = Folder(bucket)._locate("x.tar")
    fs.rm_file(path)
    missing = pytest.raises(StorageError, match=r"cannot read .*x\.tar: no such file or directory")
    with missing, open_stream(planned.path, {}, planned) as stream:
        stream.read(1)


def test_the_start_of_a_file_is_one_request(planned: PlannedFile, bucket: str, proxy: Proxy) -> None:
    Folder(bucket).replace("empty", b"")
    proxy.seen.clear()
    assert read_file(planned.path, {}, 99) == bytes(100)
    assert read_file(planned.path, {}, 1 << 30) == bytes(SIZE)
    assert read_file(f"{bucket}/empty", {}, 99) == b""
    assert count_requests(proxy) == {"GET": 3}
    with pytest.raises(SourceError, match=r"x\.tar has changed since it was planned \(then 7 bytes\)"):
        read_file(planned.path, {}, 99, size=7)
