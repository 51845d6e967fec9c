"""Tars of users: files that belong to no sample, and samples without an image."""

import bz2
import io
import json
import unicodedata
from collections import Counter

import pytest

from pipeline.errors import DamagedError, ShardError
from pipeline.limits import Limits
from pipeline.readers.members import Wanted
from pipeline.readers.skipped import APART, HIDDEN, OTHER_IMAGES, STRAY
from pipeline.readers.tar import read_tar
from pipeline.records import TEXT_EXTENSIONS, Reject, Sample
from tests.pipeline.readers.test_tar import outcome, tar

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def read(
    members: dict[str, bytes], texts: tuple[str, ...] = TEXT_EXTENSIONS
) -> tuple[list[Sample | Reject], Counter[str]]:
    skipped = Counter[str]()
    return list(read_tar(io.BytesIO(tar(members)), "s.tar", Wanted(texts), skipped=skipped)), skipped


def rows(items: list[Sample | Reject]) -> list[tuple[str, bytes, dict[str, object]]]:
    return [(item.key, item.image, dict(item.columns)) for item in items if isinstance(item, Sample)]


MAC = {
    name: data
    for n in range(2)
    for name, data in (
        (f"./._{n}.jpg", APPLE),
        (f"./{n}.jpg", b"%d" % n),
        (f"./._{n}.txt", APPLE),
        (f"./{n}.txt", b"caption"),
    )
}
WINDOWS = {
    "Thumbs.db": b"",
    "d/0.jpg": b"0",
    "d/desktop.ini": b"",
    "d/0.txt": b"zero",
    "__MACOSX/d/._0.jpg": APPLE,
    "__MACOSX/d/0.jpg": b"no image",
    "d/.DS_Store": b"\0",
    "d/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg": b"a thumbnail",
    "d/.ipynb_checkpoints/0.jpg": b"a copy",
    "d/.jpg.swp": b"",
}
STRAYS = {
    "README": b"",
    "README.txt": b"",
    "a/LICENSE.md": b"",
    "0.jpg": b"0",
    "0.txt": b"zero",
    "shard.idx": b"",
    "shard.tar.idx": b"",
    "captions.tsv": b"",
    "SHA256SUMS": b"",
    "0000.sha256": b"",
    "dataset_info.json": b"{}",
    "__meta__/note.json": b"{}",
}


def test_files_of_macos_are_skipped_and_split_no_sample() -> None:
    items, skipped = read(MAC)
    assert rows(items) == [("0", b"0", {"txt": "caption"}), ("1", b"1", {"txt": "caption"})]
    assert (len(items), skipped) == (2, {HIDDEN: 4, APART: 0})


def test_files_of_other_operating_systems_are_skipped() -> None:
    items, skipped = read(WINDOWS)
    assert rows(items) == [("d/0", b"0", {"txt": "zero"})]
    assert (len(items), skipped[HIDDEN], skipped[STRAY]) == (1, 8, 0)


def test_documents_and_indexes_are_skipped() -> None:
    items, skipped = read(STRAYS)
    assert rows(items) == [("0", b"0", {"txt": "zero"})]
    assert (len(items), skipped[HIDDEN], skipped[STRAY]) == (1, 0, 10)


@pytest.mark.parametrize("members", [MAC, WINDOWS, STRAYS], ids=["mac", "windows", "strays"])
def test_samples_equal_those_of_webdataset(members: dict[str, bytes]) -> None:
    """Files of operating systems are excluded: webdataset makes samples of them, and they split other samples."""
    system = ("__MACOSX/", "d/@eaDir/", "d/.ipynb_checkpoints/", "d/desktop.ini")
    data = tar({name: data for name, data in members.items() if not name.startswith(system)})
    tariterators = pytest.importorskip("webdataset.tariterators")
    files = ({**file, "__url__": "s.tar"} for file in tariterators.tar_file_iterator(io.BytesIO(data)))
    theirs = [
        (sample["__key__"].removeprefix("./"), sample["jpg"], {"txt": sample["txt"].decode()})
        for sample in tariterators.group_by_keys(files)
        if "jpg" in sample
    ]
    assert rows(read(members)[0]) == theirs


def test_files_of_a_sample_without_an_image_are_a_reject() -> None:
    """They are never skipped, however many there are: their image may have a format that is not supported."""
    members = {"0.txt": b"", "1.json": b"", "2.ai": b"", "3": b"", "4.cls": b"", "5.mp4": b"", "6.dat": b""}
    items, skipped = read(members)
    assert [outcome(item)[1:] for item in items] == [(str(n), "no_image") for n in range(7)]
    assert not skipped[STRAY]


def test_of_one_image_in_several_formats_the_one_that_is_read_without_a_plugin_is_used() -> None:
    members = {"0.cr2": b"raw", "0.heic": b"heic", "0.jpg": b"jpg", "0.txt": b"t", "1.nef": b"raw", "1.heif": b"heif"}
    items, _ = read({**members, "2.svg": b"svg", "3.avif": b"a", "3.png": b"p"})
    outcomes = [("0", b"jpg"), ("1", b"heif"), ("2", b"svg"), ("3", b"a"), ("3", "duplicate_key")]
    assert [outcome(item)[1:] for item in items] == outcomes


def test_a_requested_extension_is_not_an_index() -> None:
    members = {"0.jpg": b"0", "0.tsv": b"zero", "1.tsv": b"one"}
    items, _ = read(members, ("tsv",))
    assert [outcome(item)[1:] for item in items] == [("0", b"0"), ("1", "no_image")]
    assert rows(items)[0][2] == {"tsv": "zero"}


def test_an_image_named_only_by_its_extension_has_a_bad_key() -> None:
    items, skipped = read({"d/.jpg": b"0", ".jpeg": b"1"})
    assert [outcome(item)[2] for item in items] == ["bad_key", "bad_key"]
    assert not skipped[HIDDEN]


def detail(members: dict[str, bytes]) -> str:
    (reject,) = (item for item in read(members)[0] if isinstance(item, Reject))
    assert reject.reason == "no_image"
    return reject.detail


def test_the_reject_of_a_sample_without_an_image_names_its_extensions() -> None:
    dots = " (a key ends at the first dot of a file's name)"
    assert detail({"v1.0.jpg": b"", "v1.1.jpg": b"", "v1": b""}) == (
        f"the sample has no image: its files end in .0.jpg, .1.jpg, nothing{dots}; if .0.jpg is the image, encode with "
        "--image-column 0.jpg"
    )
    many = {f"0.{n}.jpg": b"" for n in range(9)}
    assert f"its files end in .0.jpg, .1.jpg, .2.jpg, .3.jpg, .4.jpg and 4 more{dots}; if .0.jpg" in detail(many)
    assert detail({"0.txt": b""}).endswith(f"its files end in .txt{dots}")
    assert detail({"0.jpg_large": b"", "0.txt": b""}).endswith(
        "; if .jpg_large is the image, encode with --image-column jpg_large"
    )


PAIRS = {f"{n}.{end}": f"{n}.{end}".encode() for n in range(2) for end in ("source.jpg", "TARGET.png", "txt", "jpg")}


def read_image(
    image: str | None, texts: tuple[str, ...] = TEXT_EXTENSIONS, binary: tuple[str, ...] = ()
) -> list[object]:
    skipped = Counter[str]()
    data = io.BytesIO(tar(PAIRS))
    items = read_tar(data, "s.tar", Wanted(texts, image, frozenset(binary)), skipped=skipped)
    return [*((i.key, i.image, dict(i.columns)) if isinstance(i, Sample) else i.detail for i in items), dict(skipped)]


def test_the_member_with_the_given_extension_is_the_image() -> None:
    assert read_image("target.PNG") == [
        ("0", b"0.TARGET.png", {"txt": "0.txt"}),
        ("1", b"1.TARGET.png", {"txt": "1.txt"}),
        {APART: 0, OTHER_IMAGES: 4},
    ]
    assert read_image(None)[:2] == [("0", b"0.jpg", {"txt": "0.txt"}), ("1", b"1.jpg", {"txt": "1.txt"})]
    assert str(read_image("x")[0]).startswith(
        "the sample has no image: its files end in .source.jpg, .target.png, .txt, .jpg, not in .x "
    )


def test_further_images_are_copied_as_bytes() -> None:
    assert read_image("source.jpg", ("txt", "target.png"), ("target.png",)) == [
        ("0", b"0.source.jpg", {"target.png": b"0.TARGET.png", "txt": "0.txt"}),
        ("1", b"1.source.jpg", {"target.png": b"1.TARGET.png", "txt": "1.txt"}),
        {APART: 0, OTHER_IMAGES: 2},
    ]


def test_a_further_image_above_the_limit_rejects_its_sample() -> None:
    data = io.BytesIO(tar({"0.jpg": b"1", "0.seg.png": bytes(100)}))
    (item,) = read_tar(data, "s.tar", Wanted(("seg.png",), None, frozenset(["seg.png"])), Limits(image_bytes=99))
    assert isinstance(item, Reject)
    assert item.detail == "the column seg.png has more than 99 bytes"


def test_names_in_a_reject_are_shortened_and_printable() -> None:
    detail_text = detail({f"0.{n}\x1b[31m\u202e{'x' * 80}": b"" for n in range(9)})
    assert detail_text.isprintable()
    assert len(detail_text) < 300
    json.dumps(detail_text).encode()


def test_texts_that_are_not_adjacent_to_their_image_are_named() -> None:
    images, texts = {f"{n}.jpg": b"%d" % n for n in range(3)}, {f"{n}.txt": b"" for n in range(3)}
    for members in (images | texts, texts | images):
        items, skipped = read(members)
        assert [columns for _, _, columns in rows(items)] == [{}] * 3
        assert skipped[APART] == 3
    details = {item.detail for item in read(images | texts)[0] if isinstance(item, Reject)}
    assert [detail_text.split("; ")[1] for detail_text in details] == [
        "its image is elsewhere in the tar: the files of a sample must be adjacent"
    ]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("\u00e9.jpg", unicodedata.normalize("NFD", "\u00e9.txt")),
        (unicodedata.normalize("NFD", "\u00e9.jpg"), "\u00e9.txt"),
        ("IMG_1.JPG", "img_1.txt"),
        ("img_1.jpg", "IMG_1.txt"),
    ],
)
def test_a_text_with_another_spelling_than_its_image_is_named(image: str, text: str) -> None:
    assert detail({image: b"0", text: b"zero"}).endswith(
        "; the key of an image differs only in the case of letters or in Unicode normalization: rename one of them"
    )


def test_the_case_of_an_extension_does_not_matter() -> None:
    items, _ = read({"B.JPEG": b"0", "B.TXT": b"zero", "B.Json": b"{}"})
    assert rows(items) == [("B", b"0", {"txt": "zero", "json": "{}"})]


def test_backslashes_of_windows_become_slashes() -> None:
    items, _ = read({"v1.0\\a.jpg": b"0", "v1.0\\a.txt": b"zero", ".\\b.jpg": b"1", "..\\c.jpg": b"2"})
    assert [outcome(item)[1:] for item in items] == [("v1.0/a", b"0"), ("b", b"1"), ("../c", "bad_key")]
    assert rows(items)[0][2] == {"txt": "zero"}


@pytest.mark.parametrize("members", [{}, {"0.jpg": bytes(5000)}])
def test_a_tar_that_is_compressed_by_bzip2_is_an_error(members: dict[str, bytes]) -> None:
    data = bz2.compress(tar(members))
    with pytest.raises(ShardError, match=r"s\.tar is not a tar, but a bzip2 file; compress it with gzip") as error:
        list(read_tar(io.BytesIO(data), "s.tar"))
    assert not isinstance(error.value, DamagedError), "damage would only reject the rest of the shard"


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"), (b"BZh9", "bzip2")],
)
def test_other_archives_are_an_error(start: bytes, kind: str) -> None:
    with pytest.raises(ShardError, match=f"is not a tar, but a {kind} file"):
        list(read_tar(io.BytesIO(start + bytes(2000)), "s.tar"))


def test_a_file_name_may_start_like_an_archive() -> None:
    assert [outcome(item)[1:] for item in read({"BZh.jpg": b"0"})[0]] == [("BZh", b"0")]
