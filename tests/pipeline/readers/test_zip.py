"""The reader of zip archives, on archives of Python's zipfile, with damage and decompression bombs."""

import io
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.errors import DamagedError, NoImagesError, ShardError
from pipeline.limits import Limits
from pipeline.readers import zip as zip_reader
from pipeline.readers.members import Wanted
from pipeline.readers.skipped import HIDDEN, NO_IMAGES, STRAY, TABLES
from pipeline.readers.zip import list_members, read_zip
from pipeline.records import Reject, Sample
from tests.conftest import img2dataset_members
from tests.pipeline.readers.test_tar import outcome

MEMBERS = img2dataset_members(0, 6, height=64, width=64)


def make_zip(members: Mapping[str, bytes] | Sequence[tuple[Any, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            archive.writestr(name, data)
    return sink.getvalue()


def read(
    data: bytes, wanted: Wanted | None = None, limits: Limits | None = None, part: tuple[int, int] = (0, 1)
) -> tuple[list[Sample | Reject], Counter[str]]:
    skipped = Counter[str]()
    stream = io.BytesIO(data)
    return list(read_zip(stream, "s.zip", len(data), part, wanted or Wanted(), limits or Limits(), skipped)), skipped


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_samples_are_those_of_the_members(method: int) -> None:
    items, skipped = read(make_zip(MEMBERS, method))
    for n, item in enumerate(items):
        assert isinstance(item, Sample)
        key = f"{n:09}"
        assert (item.position, item.key, item.image) == (n, key, MEMBERS[f"{key}.jpg"])
        assert item.columns == {kind: MEMBERS[f"{key}.{kind}"].decode() for kind in ("txt", "json")}
    assert (len(items), +skipped) == (6, {})


def test_the_texts_of_an_image_may_be_anywhere() -> None:
    texts = {name: data for name, data in MEMBERS.items() if not name.endswith("jpg")}
    images = {name: data for name, data in MEMBERS.items() if name.endswith("jpg")}
    expected = [outcome(item) for item in read(make_zip(MEMBERS))[0]]
    for members in (images | texts, texts | images):
        items, skipped = read(make_zip(members))
        assert [outcome(item) for item in items] == expected
        assert all(isinstance(item, Sample) and len(item.columns) == 2 for item in items)
        assert not +skipped


@pytest.mark.parametrize("ranges", [2, 3, 7])
def test_ranges_have_every_sample_once(ranges: int) -> None:
    data = make_zip(MEMBERS | {f"{n:09}.json": b"{}" for n in range(6)})
    items = [item for k in range(ranges) for item in read(data, part=(k, ranges))[0]]
    assert [outcome(item)[1:] for item in items] == [outcome(item)[1:] for item in read(data)[0]]


def test_folders_links_and_files_of_systems_are_no_images() -> None:
    link = zipfile.ZipInfo("b.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    names = ["d/", "d/a.jpg", "__MACOSX/d/._a.jpg", "d/.DS_Store", "README.md", "d/a.txt", "c.txt"]
    members = [(name, b"" if name.endswith("/") else b"x") for name in names]
    items, skipped = read(make_zip([*members, (link, b"/etc/passwd")]))
    assert [outcome(item)[1:] for item in items] == [("d/a", b"x"), ("c", "no_image"), ("b", "image_not_embedded")]
    assert (skipped[HIDDEN], skipped[STRAY]) == (2, 1)


def test_names_are_utf8_or_code_page_437() -> None:
    old = make_zip({"xx.jpg": b"1"}).replace(b"xx.jpg", b"\x81\x84.jpg")
    unflagged = make_zip({"xxxx.jpg": b"2"}).replace(b"xxxx.jpg", "üä.jpg".encode())
    flagged = make_zip({"üä.jpg": b"3", "set\\c.jpg": b"4", "../d.jpg": b"5"})
    found = [outcome(item)[1:] for data in (old, unflagged, flagged) for item in read(data)[0]]
    assert found == [("üä", b"1"), ("üä", b"2"), ("üä", b"3"), ("set/c", b"4"), ("../d", "bad_key")]


def test_tables_of_metadata_are_counted_and_no_samples() -> None:
    members = {"dataset.json": b'{"labels": []}', "00000/img0.jpg": b"jpg", "00000/metadata.jsonl": b"", "a.csv": b""}
    items, skipped = read(make_zip(members))
    assert [outcome(item)[1] for item in items] == ["00000/img0"]
    assert (skipped[TABLES], skipped[STRAY]) == (2, 1)
    items, skipped = read(make_zip({"dataset.jpg": b"jpg", "dataset.json": b"{}", "sub/dataset.json": b"{}"}))
    assert [outcome(item)[1:] for item in items] == [("dataset", b"jpg"), ("sub/dataset", "no_image")]
    assert not skipped[TABLES]


def test_a_second_image_of_a_key_is_a_duplicate() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = make_zip([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("b.png", b"4")])
    assert [outcome(item)[1:] for item in read(data)[0]] == [
        *[("a", b"1"), ("a", "duplicate_key"), ("b", b"2"), ("b", "duplicate_key")]
    ]


def test_the_chosen_member_is_the_image() -> None:
    data = make_zip({"0.source.jpg": b"1", "0.target.jpg": b"2", "0.txt": b"t"})
    ((item,), _) = read(data, Wanted(("txt", "target.jpg"), "source.jpg", frozenset(["target.jpg"])))
    assert isinstance(item, Sample)
    assert (item.image, item.columns) == (b"1", {"txt": "t", "target.jpg": b"2"})


def test_encrypted_members_and_other_compressions_are_rejected_one_by_one() -> None:
    data = bytearray(make_zip({f"{n}.jpg": b"image %d" % n for n in range(3)}))
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + flags] |= 1
    items, _ = read(bytes(data))
    assert [outcome(item)[2] for item in items] == ["unsupported_member", b"image 1", b"image 2"]
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        items, _ = read(make_zip({"0.jpg": b"1"}, method))
        assert [outcome(item)[2] for item in items] == ["unsupported_member"]


def test_a_damaged_member_rejects_only_its_sample() -> None:
    data = make_zip(MEMBERS, zipfile.ZIP_STORED)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        image, text = (archive.getinfo(f"{n:09}.{kind}").header_offset for n, kind in ((1, "jpg"), (3, "txt")))
    damaged = bytearray(data)
    damaged[image + 400] ^= 1
    damaged[text + 46] ^= 1
    reasons = [outcome(item)[2] for item in read(bytes(damaged))[0] if isinstance(item, Reject)]
    assert reasons == ["corrupt_member", "corrupt_member"]


def test_a_member_is_not_decompressed_beyond_its_stated_size() -> None:
    data = make_zip({"0.jpg": bytes(50 << 20), "1.jpg": b"1"})
    items, _ = read(data, limits=Limits(image_bytes=1 << 20))
    assert [outcome(item)[2] for item in items] == ["too_many_bytes", b"1"]
    honest, lie = struct.pack("<L", 50 << 20), struct.pack("<L", 100)
    items, _ = read(data.replace(honest, lie), limits=Limits(image_bytes=1 << 20))
    assert [outcome(item)[2] for item in items] == ["corrupt_member", b"1"]


def test_a_member_whose_compressed_content_is_larger_than_its_content_is_not_read() -> None:
    noise = random.Random(0).randbytes(1 << 20)
    data = make_zip({"0.jpg": noise}).replace(struct.pack("<L", 1 << 20), struct.pack("<L", 100))
    stream = CountedReads(data)
    (item,) = read_zip(stream, "s.zip", len(data), (0, 1), Wanted(), Limits())
    assert (outcome(item)[2], stream.most < 100_000) == ("corrupt_member", True)


def test_overlapping_members_are_damage() -> None:
    """The directory of such a bomb has thousands of members that share one block of zeros."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("0.jpg", bytes(1000))
        archive.writestr("1.jpg", b"")
        archive.getinfo("1.jpg").header_offset = 0
    with pytest.raises(DamagedError, match="its members overlap"):
        read(sink.getvalue())


def test_zip64_archives_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    data = make_zip(MEMBERS)
    assert b"PK\6\6" in data
    assert [outcome(item) for item in read(data)[0]] == [outcome(item) for item in read(make_zip(MEMBERS))[0]]


def test_archives_with_a_comment_or_other_data_before_them_are_read() -> None:
    sink = io.BytesIO(b"#!/bin/sh\n")
    sink.seek(0, 2)
    with zipfile.ZipFile(sink, "a") as archive:
        archive.writestr("0.jpg", b"1")
        archive.comment = b"PK\5\6 " * 100
    assert [outcome(item) for item in read(sink.getvalue())[0]] == [(0, "0", b"1")]
    assert [outcome(item) for item in read(b"more" + make_zip({"0.jpg": b"1"}))[0]] == [(0, "0", b"1")]


def test_truncated_archives_and_other_files_are_damaged() -> None:
    data = make_zip(MEMBERS)
    for content in (b"", b"PK", data[:-1], data[:5000], bytes(100_000)):
        with pytest.raises(DamagedError, match="is not a zip file, or is truncated"):
            read(content)
    with pytest.raises(ShardError, match="--input-limit members=N"):
        read(data, limits=Limits(members=17))
    with pytest.raises(ShardError, match="--input-limit footer_bytes=N"):
        read(data, limits=Limits(footer_bytes=100))


def test_an_archive_without_images_is_skipped() -> None:
    data = make_zip({"annotations/instances.json": b"{}", "LICENSE": b""})
    assert read(data) == ([], {NO_IMAGES: 1})
    assert not +read(data, part=(1, 2))[1]
    with pytest.raises(NoImagesError, match=r"s\.zip has no images"):
        list_members(io.BytesIO(data), "s.zip", Wanted(), Limits())


class CountedReads(io.BytesIO):
    """A file that counts its reads, each of which would be a request on a store."""

    reads = most = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.reads, self.most = self.reads + 1, max(self.most, len(data))
        return data


def test_members_that_follow_one_another_share_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_zip({f"{n:04}.jpg": random.Random(n).randbytes(1000) for n in range(400)})
    monkeypatch.setattr(zip_reader, "READ_AHEAD", 100_000)
    stream = CountedReads(data)
    assert len(list(read_zip(stream, "s.zip", len(data), (0, 1), Wanted(), Limits()))) == 400
    assert stream.reads <= 10


def test_random_damage_is_a_damaged_archive_or_rejects() -> None:
    data, draw = make_zip(MEMBERS), random.Random(0)
    outcomes = Counter[str]()
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 3, 20))):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.5:  # in the directory
            place = draw.randrange(data.index(b"PK\1\2"), len(data))
            damaged[place] ^= 1 << draw.randrange(8)
        try:
            items, _ = read(bytes(damaged))
            outcomes["read"] += 1
            assert [item.position for item in items] == list(range(len(items)))
        except ShardError:
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 50
