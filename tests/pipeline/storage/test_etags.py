"""The version of an input: its size, and its ETag or its time."""

import os
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.sources.units import make_units
from pipeline.storage.etags import get_etag, same_etag
from pipeline.storage.reading import open_stream
from tests.listed_files import list_source_files


def test_the_etag_of_a_local_file_is_its_time(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    path = tmp_path / "s/0.tar"
    path.write_bytes(b"old")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    (shard,) = list_source_files((str(tmp_path / "s"),), {}, "nowhere")
    assert shard.etag == "m1700000000123456789"
    with open_stream(shard.url, {}, make_units([shard])[0]) as stream:
        assert stream.read() == b"old"
    path.write_bytes(b"new")
    changed = pytest.raises(SourceError, match=r"0.tar has changed since it was planned \(its time or ETag\)")
    with changed, open_stream(shard.url, {}, make_units([shard])[0]):
        pass


def test_a_file_rewritten_with_the_same_size_while_it_is_read_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"old")
    (shard,) = list_source_files((str(path),), {}, "nowhere")
    changed = pytest.raises(SourceError, match=r"0.tar changed while it was being read")
    with changed, open_stream(shard.url, {}, make_units([shard])[0]) as stream:
        path.write_bytes(b"new")
        stream.read()


@pytest.mark.parametrize(
    ("info", "etag"),
    [
        ({"ETag": '"ab"'}, "ab"),
        ({"etag": "ab"}, "ab"),
        ({"blob_id": "ab"}, "ab"),  # the hub
        ({"mtime_ns": 7}, "m7"),
        ({"size": 1}, ""),
    ],
)
def test_the_etag_of_a_file_by_its_storage(info: dict[str, object], etag: str) -> None:
    assert get_etag(info) == etag


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("m1700000000123456789", "m1700000000123456789", True),
        ("m1700000000123456789", "m1700000000123456788", False),
        ("m1700000000123456789", "m1700000000000000000", True),  # a disk, or tar, with whole seconds
        ("m1700000000123456789", "m1700000001000000000", False),
        ("m1700000000123456789", "m1700000000123456000", True),
        ("m1700000000123456789", "m1700000000123455000", False),
        ("m1700000000123456789", "d41d8cd9", False),
        ("d41d8cd9", "d41d8cd8", False),
        ("", "m1700000000123456789", True),
        ("d41d8cd9", "", True),
    ],
)
def test_whether_two_etags_can_belong_to_the_same_content(first: str, second: str, same: bool) -> None:
    assert same_etag(first, second) is same
    assert same_etag(second, first) is same
