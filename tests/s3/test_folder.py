"""A folder on S3: atomic creation, listings, retries and errors, over HTTP."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from s3fs import S3File

from latentmill import pages
from pipeline.errors import SourceError, StorageError
from pipeline.records import Unit
from pipeline.storage import connection, reading
from pipeline.storage.folder import Folder
from tests.conftest import slow_param
from tests.listed_files import list_source_files
from tests.proxy import Proxy


def test_only_one_of_sixteen_writers_succeeds(bucket: str) -> None:
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        return Folder(f"{bucket}/cache").create("data/x", b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(create, range(16)))
    assert results.count(True) == 1
    assert Folder(f"{bucket}/cache").read("data/x") == b"%d" % results.index(True)


@pytest.mark.parametrize("form", [bytes, memoryview])
@pytest.mark.slow
def test_a_part_of_any_size_is_written_in_one_request(bucket: str, proxy: Proxy, form: type) -> None:
    data = b"0123456789" * (11 << 20)
    assert Folder(bucket).create("part", form(data))
    assert Folder(bucket).read("part") == data
    assert [(request.method, request.bytes) for request in proxy.seen if request.bytes] == [("PUT", 110 << 20)]


def test_writes_are_visible_at_once(bucket: str) -> None:
    folder = Folder(f"{bucket}/cache")
    assert folder.is_empty()
    assert folder.list_files("data") == []
    assert folder.read_if_exists("data/a") is None
    assert folder.create("data/a", b"1")
    assert folder.list_files("data") == ["a"]
    assert not folder.is_empty()
    folder.replace("data/a", b"2")
    assert dict(folder.read_each("data", ["a"])) == {"a": b"2"}


@pytest.mark.slow
def test_names_arrive_page_by_page(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PAGE", 2)
    folder = Folder(f"{bucket}/cache")
    for name in ("data/b", "data/c", "data/a", "data/.hidden", "data/below/c"):
        folder.replace(name, b"1")
    fsspec.filesystem("s3").touch(f"{bucket}/cache/data/", create_parents=False)  # a marker, as consoles create
    assert sorted(folder.iterate_names("data")) == ["a", "b", "c"] == folder.list_files("data")
    assert folder.list_entries("data")[1] == [".hidden", "below"]
    proxy.seen.clear()
    first = next(iter(folder.iterate_names("data")))
    assert (first, len(proxy.seen)) in [(name, 1) for name in "abc"]
    assert list(Folder("s3://there-is-no-such-bucket").iterate_names("data")) == []


def test_conditional_creation_is_detected_by_a_trial(bucket: str) -> None:
    folder = Folder(f"{bucket}/cache")
    assert folder.supports_conditional_create()
    assert folder.is_empty()


def test_shards_have_the_same_paths_as_on_disk(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for root in (str(tmp_path), bucket):
        Folder(f"{root}/shards").replace("0.tar", b"0")
        Folder(f"{root}/shards").replace("1.tar", b"1")
    for source in ("shards", "shards/*.tar", "shards/{0..1}.tar"):
        local, remote = (list_source_files((f"{root}/{source}",), {}, "nowhere") for root in (str(tmp_path), bucket))
        assert [shard.path for shard in local] == [shard.path for shard in remote] == ["shards/0.tar", "shards/1.tar"]
        assert all(shard.etag and shard.url.startswith("s3://") for shard in remote)


def test_a_slice_is_one_request(bucket: str, proxy: Proxy) -> None:
    folder, content = Folder(bucket), bytes(range(256))
    folder.replace("x", content)
    folder.replace("empty", b"")
    proxy.seen.clear()
    slices = [(0, None), (0, 10), (250, 300), (-10, None), (-300, None)]
    assert [folder.read_slice("x", start, end) for start, end in slices] == [content[slice(*each)] for each in slices]
    assert (folder.read_slice("x", 256, 300), folder.read_slice("empty", -9), folder.read_slice("no", 0)) == (
        *(b"", b""),
        None,
    )
    assert [request.method for request in proxy.seen] == ["GET"] * 8


@pytest.mark.slow
def test_the_files_of_a_prefix_are_one_request(bucket: str, proxy: Proxy) -> None:
    folder = Folder(bucket)
    for name in ("a-1.x", "a-2.x", "a-2/deeper", "ab-1.x", "b-1.x"):
        folder.replace(f"data/{name}", b"")
    proxy.seen.clear()
    assert folder.list_files_of("data", "a-") == ["a-1.x", "a-2.x"]
    assert folder.list_files_of("none", "a-") == []
    assert len(proxy.seen) == 2


def test_a_name_may_contain_two_colons(bucket: str) -> None:
    for name in ("a.jpg", "a.jpg::x.jpg", "s3::b.jpg"):
        Folder(f"{bucket}/data").replace(name, name.encode())
    shards = list_source_files((f"{bucket}/data",), {}, "nowhere")
    assert [shard.path for shard in shards] == ["data/a.jpg", "data/a.jpg::x.jpg", "data/s3::b.jpg"]
    assert all(reading.read_file(shard.url, {}, 99) == shard.path[len("data/") :].encode() for shard in shards)


def test_a_missing_folder_is_distinguished_from_missing_images(bucket: str) -> None:
    Folder(bucket).replace("data/a.jpg", b"")
    reading.check_has_files(f"{bucket}/data", {})
    with pytest.raises(SourceError, match="none is missing or empty"):
        reading.check_has_files(f"{bucket}/none", {})


def test_a_change_of_content_without_a_change_of_size_is_detected(bucket: str) -> None:
    Folder(bucket).replace("0.tar", b"old")
    (shard,) = list_source_files((bucket,), {}, "nowhere")
    unit = Unit(name="u", kind="tar", path=shard.path, bytes=shard.bytes, etag=shard.etag)
    Folder(bucket).replace("0.tar", b"new")
    changed = pytest.raises(SourceError, match="has changed since it was planned")
    with changed, reading.open_stream(shard.url, {}, unit) as stream:
        stream.read(1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [500, slow_param(503), "reset"])
def test_a_burst_of_errors_is_retried(bucket: str, proxy: Proxy, fault: int | str) -> None:
    folder = Folder(bucket)
    proxy.rule = lambda request: fault if request.number < 2 else None
    assert folder.create("a", b"1")
    assert folder.read("a") == b"1"
    assert folder.list_files() == ["a"]
    folder.replace("a", b"2")
    with reading.open_stream(folder.url_of("a"), {}) as stream:
        assert stream.read() == b"2"


def test_a_create_whose_response_is_lost_finds_its_own_file(bucket: str, proxy: Proxy) -> None:
    proxy.rule = lambda request: "lose" if request.method == "PUT" and request.number == 0 else None
    assert not Folder(bucket).create("a", b"1")
    assert Folder(bucket).read("a") == b"1"


def test_errors_name_the_url_and_the_reason(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=rf"cannot read {bucket}/no: no such file or directory"):
        Folder(bucket).read("no")
    with pytest.raises(StorageError, match=r"cannot write s3://there-is-no-such-bucket/x: .*"):
        Folder("s3://there-is-no-such-bucket").create("x", b"")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    unreachable = {"endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(StorageError, match=r"cannot list s3://b: .*Could not connect to the endpoint URL"):
        Folder("s3://b", unreachable).list_files()


def test_a_password_in_a_url_is_refused() -> None:
    with pytest.raises(connection.UsageError, match="must not contain a password"):
        Folder("s3://key:secret@bucket/x").list_files()


@pytest.mark.parametrize("seeking", [False, True])
def test_a_short_read_is_a_storage_error(bucket: str, monkeypatch: pytest.MonkeyPatch, seeking: bool) -> None:
    """botocore refuses a body that is shorter than its header says, but other libraries may not."""
    content = bytes(range(256)) * 100
    Folder(bucket).replace("0.tar", content)
    (shard,) = list_source_files((bucket,), {}, "nowhere")
    unit = Unit(name="u", kind="tar", path=shard.path, bytes=shard.bytes, etag=shard.etag)
    fetch = S3File._fetch_range
    monkeypatch.setattr(
        S3File, "_fetch_range", lambda self, start, end: fetch(self, start, end)[: max(0, 9000 - start)]
    )
    message = r"0\.tar ended at byte \d+, but has 25600 bytes: the transfer was cut short"
    with pytest.raises(StorageError, match=message), reading.open_stream(shard.url, {}, unit, seeking) as stream:
        assert stream.read(5000) == content[:5000]
        stream.read()
    with pytest.raises(StorageError, match=message), reading.open_stream(shard.url, {}, unit, seeking) as stream:
        stream.seek(20_000)
        stream.read(10)


def test_the_times_of_a_listing_are_parsed_by_python(bucket: str) -> None:
    """botocore's own parser takes most of the time of a listing of a million names."""
    Folder(f"{bucket}/t").replace("a.json", b"1")
    fs, path = connection.get_filesystem(f"{bucket}/t/a.json", {})
    (entry,) = fs.ls(path, detail=True, refresh=True)
    time = entry["LastModified"]
    assert type(time.tzinfo) is datetime.timezone, "botocore's has dateutil's"
    assert abs(datetime.datetime.now(datetime.UTC) - time) < datetime.timedelta(hours=1)
