"""The reader of tar shards."""

import io
import tarfile
from pathlib import Path
from typing import BinaryIO

import pytest

from pipeline.errors import DamagedError, ShardError
from pipeline.limits import Limits
from pipeline.readers.archive_samples import _group_by_key
from pipeline.readers.members import DEFAULT_WANTED, Member
from pipeline.readers.tar import read_tar
from pipeline.records import Reject, Sample
from tests.conftest import img2dataset_members, write_tar


def read(data: bytes) -> list[Sample | Reject]:
    return list(read_tar(io.BytesIO(data), "s.tar"))


def tar(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return sink.getvalue()


def outcome(item: Sample | Reject) -> tuple[int, str, object]:
    return item.position, item.key, item.image if isinstance(item, Sample) else item.reason


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_samples_equal_those_of_webdataset(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", img2dataset_members(0, 5))
    webdataset = pytest.importorskip("webdataset")
    expected = list(webdataset.WebDataset(str(path), shardshuffle=False))
    with open(path, "rb") as stream:
        samples = list(read_tar(stream, "s.tar"))
    for sample, other in zip(samples, expected, strict=True):
        assert isinstance(sample, Sample)
        assert (sample.key, sample.image) == (other["__key__"], other["jpg"])
        assert sample.columns == {"txt": other["txt"].decode(), "json": other["json"].decode()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read(form: int) -> None:
    names = ["a.jpg", "folder/b.jpg", "x" * 90 + "/" + "y" * 90 + ".jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["ü/" + "z" * 300 + ".png", "deep/" * 60 + "c.webp"]
    items = read(tar({name: name.encode() for name in names}, form))
    assert [outcome(item) for item in items] == [
        (n, name.rsplit(".", 1)[0], name.encode()) for n, name in enumerate(names)
    ]


def test_the_key_ends_at_the_first_dot_of_the_base_name() -> None:
    items = read(tar({"v1.0/a.b.jpg": b"", "v1.0/a.JPG": b"1", "v1.0/a.txt": b"t"}))
    assert [outcome(item) for item in items] == [(0, "v1.0/a", b"1")]


def test_duplicate_keys_and_texts_without_an_image_are_rejected() -> None:
    members = {"a.jpg": b"1", "a.png": b"2", "b.txt": b"", "c.jpg": b"3", "a.jpeg": b"4", "d.jpg": b"5"}
    assert [outcome(item) for item in read(tar(members))] == [
        (0, "a", b"1"),
        (1, "a", "duplicate_key"),
        (2, "b", "no_image"),
        (3, "c", b"3"),
        (4, "a", "duplicate_key"),
        (5, "d", b"5"),
    ]


def test_a_caption_that_is_not_utf8_is_a_reject() -> None:
    (item,) = read(tar({"a.jpg": b"1", "a.txt": b"\xff"}))
    assert isinstance(item, Reject)
    assert (item.stage, item.reason, item.detail) == (
        "read",
        "bad_text",
        "the column txt is not text in its encoding (--text-encoding), or occurs twice",
    )


def test_links_and_devices_are_rejected_and_folders_are_skipped() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)):
            header = tarfile.TarInfo(f"{number}.jpg")
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
    items = [outcome(item) for item in read(sink.getvalue())]
    assert items == [(n, str(n + 1), "image_not_embedded") for n in range(3)]


def test_the_size_in_the_header_of_a_link_or_a_folder_is_ignored() -> None:
    """No data follows such headers, in POSIX and in Python's tarfile."""
    data = b""
    for name, kind in (("h.jpg", b"1"), ("s.jpg", b"2"), ("p.jpg", b"6"), ("d", b"5"), ("old/", b"\0")):
        header = tarfile.TarInfo(name)
        header.type, header.size = kind, 700
        data += header.tobuf(tarfile.USTAR_FORMAT)
    items = [outcome(item) for item in read(data + tar({"9.jpg": b"9"}))]
    assert items == [*((n, key, "image_not_embedded") for n, key in enumerate("hsp")), (3, "9", b"9")]


def test_no_text_is_dropped_silently() -> None:
    """A text that is a link has no content. Of two texts, either can be that of the image."""
    link = tarfile.TarInfo("a.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
    data = tar({"a.jpg": b"1"})[:1024] + link.tobuf() + tar({"b.jpg": b"2", "b.txt": b"one", "b.TXT": b"two"})
    assert [outcome(item)[1:] for item in read(data)] == [("a", "image_not_embedded"), ("b", "bad_text")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_is_not_utf8_rejects_one_sample(form: int) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form, encoding="latin-1") as archive:
        for name in ("a.jpg", "caf\u00e9" + "x" * (150 if form == tarfile.GNU_FORMAT else 0) + ".jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    data = sink.getvalue()
    if form == tarfile.PAX_FORMAT:
        data = data.replace(b"path=caf\xc3\xa9", b"path=caf\xe9\xe8")
    items = [outcome(item) for item in read(data)]
    assert [(key[:7], result) for _, key, result in items] == [("a", b""), ("caf\\xe9", "bad_key"), ("b", b"")]
    items[1][1].encode()  # a record can hold it


def test_few_of_many_members_with_one_key_are_held_in_memory() -> None:
    """Otherwise, images that are rejected anyway would fill the memory."""
    names = ["k.jpg", "k.txt", *(f"k.{n}.jpg" for n in range(3)), "k.png", "k.jpg", "k.txt"]
    members = [Member(name, 2, b"xx") for name in names]
    ((key, group),) = _group_by_key(iter(members), DEFAULT_WANTED)
    assert key == "k"
    assert [member.name for member in group] == names
    assert [n for n, member in enumerate(group) if member.data is not None][:2] == [0, 1]
    assert all(member.data is None for member in group if member.extension in ("png", "jpg") and member is not group[0])
    assert group[-1].data is None


def test_concatenated_archives_are_all_read() -> None:
    """tarfile and webdataset stop silently after the first archive."""
    first, second = tar({"a.jpg": b"1"}), tar({"b.jpg": b"2", "a.jpg": b"3"})
    assert [outcome(item) for item in read(first + second)] == [
        (0, "a", b"1"),
        (1, "b", b"2"),
        (2, "a", "duplicate_key"),
    ]
    assert [outcome(item)[1] for item in read(first[:2048] + second[:3072])] == ["a", "b", "a"]
    assert len(read(first + bytes(77))) == 1, "padding is not damage"


def test_other_bytes_after_an_end_mark_are_damage() -> None:
    archive = tar({"a.jpg": b"1"})
    for rest in (b"x", b"x" * 512, tar({"b.jpg": b"2"})[:700]):
        with pytest.raises(DamagedError):
            read(archive + rest)


def test_extended_headers_are_read_record_by_record() -> None:
    """A value may look like another record, and the length in a record may be wrong."""

    def with_pax(data: bytes) -> bytes:
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, len(data)
        return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512) + tar({"a.jpg": b"1"})

    comment = b"comment=\n11 path=no\n"
    record = b"%d " % (len(comment) + 3) + comment
    assert [outcome(item) for item in read(with_pax(record))] == [(0, "a", b"1")]
    for data in (
        b"12 size=" + b"9" * 5000 + b"\n",
        b"99 path=b\n",
        b"9 path=bb\n",
        b"nonsense",
        b"4010 size=" + b"9" * 3999 + b"\n",
    ):
        with pytest.raises(DamagedError, match="extended header at byte 0"):
            read(with_pax(data))
    with pytest.raises(DamagedError, match="truncated"):
        read(with_pax(b"17 size=99999999\n"))


def test_an_empty_tar_has_no_samples() -> None:
    assert read(tar({})) == []


def test_a_tar_that_is_truncated_anywhere_is_an_error() -> None:
    whole = tar({"a.jpg": b"x" * 700, "b.jpg": b"y" * 512, "c.txt": b"z"})
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(0, end + 1024, 512), 1, 511, 513, 1300, end + 1, end + 1023]:
        if length < end + 1024:
            with pytest.raises(ShardError, match=r"s\.tar is (truncated|damaged)"):
                read(whole[:length])
    assert len(read(whole[: end + 1024])) == 3


@pytest.mark.parametrize("place", [0, 100, 148, 156, 600 + 512])
def test_a_damaged_header_is_named(place: int) -> None:
    whole = bytearray(tar({"a.jpg": b"x" * 100, "b.jpg": b"y"}))
    whole[place] ^= 0x15
    with pytest.raises(ShardError, match="the header at byte"):
        read(bytes(whole))


def test_samples_that_are_too_large_are_rejected_and_the_others_are_read() -> None:
    members = {"a.jpg": b"x" * 1001, "b.jpg": b"y", "b.txt": b"z" * 101, "b.mp4": b"v" * 5000, "c.jpg": b"w"}
    stream = io.BytesIO(tar(members))
    limits = Limits(image_bytes=1000, text_bytes=100)
    items = list(read_tar(stream, "s.tar", limits=limits))
    assert [outcome(item)[2] for item in items] == ["too_many_bytes", "text_too_long", b"w"]
    assert [item.detail for item in items if isinstance(item, Reject)] == [
        "the image has 1001 bytes, but the limit is 1000",
        "the column txt has more than 100 bytes",
    ]


def test_a_shard_has_a_limit_of_members() -> None:
    with pytest.raises(ShardError, match="more than 2 members; --input-limit members=N accepts more"):
        list(read_tar(io.BytesIO(tar(dict.fromkeys("abc", b""))), "s.tar", limits=Limits(members=2)))


def test_the_header_of_a_long_name_has_a_limit() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(tarfile.TarInfo("x" * 3000 + ".jpg"))
    with pytest.raises(DamagedError, match=r"header of 3... bytes at byte 0; --input-limit header_bytes=N accepts it"):
        list(read_tar(io.BytesIO(sink.getvalue()), "s.tar", limits=Limits(header_bytes=2000)))


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../../x", "/etc/x", "/x", "././x", "a/./x", "", "a/", "__x__/a", "k" * 513, "\u00e9" * 257),
        *("a\nb", "a\x7f", "a\x85b", "a\x9b31m", "a\u2028b", "a\u2029b", "a\u202egpj", "a\u2066b"),
    ],
)
def test_unsafe_keys_are_rejected(name: str) -> None:
    (item,) = read(tar({f"{name}.jpg": b"x"}, tarfile.GNU_FORMAT))
    assert outcome(item)[2] == "bad_key"
    assert len(item.key) <= 512
    assert item.key.isprintable()


@pytest.mark.parametrize("name", ["a", "a/b", "a/b..c/d", "k" * 512, "a b", "%2E", "\u732b", "__x__", "a/__x__/b"])
def test_keys_may_have_folders_and_any_letters(name: str) -> None:
    (item,) = read(tar({f"{name}.jpg": b"x"}, tarfile.GNU_FORMAT))
    assert outcome(item) == (0, name, b"x")


def test_a_stream_may_return_fewer_bytes_than_requested() -> None:
    class Trickle(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            return super().read(min(count or 0, 100))

    stream: BinaryIO = Trickle(tar({"a.jpg": b"x" * 5000}))
    (item,) = read_tar(stream, "s.tar")
    assert outcome(item) == (0, "a", b"x" * 5000)
