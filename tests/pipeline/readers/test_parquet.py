"""Images in Parquet files: columns, rows and keys; and files that are damaged or cannot be read."""

import datetime
import io
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedError, NoImagesError, Rejected, ShardError
from pipeline.limits import Limits
from pipeline.readers import parquet_footer, parquet_keys
from pipeline.readers.parquet import (
    read_available_columns,
    read_available_metadata_columns,
    read_metadata,
    read_parquet,
    select_row_groups,
)
from pipeline.readers.parquet_keys import FileKeys
from pipeline.readers.skipped import NO_IMAGES
from pipeline.records import Reject, Sample

NOTHING = pa.schema([])


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def read(
    data: bytes,
    part: tuple[int, int] = (0, 1),
    image: str | None = None,
    key: str | None = None,
    wanted: pa.Schema = NOTHING,
) -> list[Sample | Reject]:
    return list(read_parquet(io.BytesIO(data), "p.parquet", len(data), part, image, key, wanted))


def outcome(item: Sample | Reject) -> tuple[int, str, object]:
    return item.position, item.key, item.image if isinstance(item, Sample) else item.reason


PLAIN = pa.table({"jpg": [b"0", b"1", b"2"], "caption": ["zero", None, "two"], "width": [1, 2, 3]})
HF = pa.table({"image": [{"bytes": b"0", "path": "0.jpg"}, {"bytes": b"1", "path": None}], "label": [7, 8]})


def test_a_column_of_bytes_is_read() -> None:
    assert [outcome(item) for item in read(parquet(PLAIN))] == [(0, "0", b"0"), (1, "1", b"1"), (2, "2", b"2")]


def test_the_image_feature_of_hugging_face_is_read() -> None:
    assert [outcome(item) for item in read(parquet(HF))] == [(0, "0", b"0"), (1, "1", b"1")]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary(1)])
def test_large_binary_is_read_and_fixed_size_binary_is_refused(kind: pa.DataType) -> None:
    table = pa.table({"image": pa.array([b"0"], kind)})
    if kind == pa.binary(1):
        with pytest.raises(ShardError, match="has no column with the bytes of images: it has image"):
            read(parquet(table))
    else:
        assert [outcome(item) for item in read(parquet(table))] == [(0, "0", b"0")]


def test_keys_are_read_from_the_key_column() -> None:
    table = pa.table({"jpg": [b"a", b"b", b"c", b"d"], "id": ["x.1", "50%", "x.1", None]})
    assert [outcome(item) for item in read(parquet(table), key="id")] == [
        (0, "x%2E1", b"a"),
        (1, "50%25", b"b"),
        (2, "x%2E1", "duplicate_key"),
        (3, "3", "no_key"),
    ]


def test_keys_may_be_bytes_or_times() -> None:
    table = pa.table({"jpg": [b"a", b"b", b"c"], "id": [b"x.1", b"\xff", None]})
    assert [outcome(item) for item in read(parquet(table), image="jpg", key="id")] == [
        (0, "x%2E1", b"a"),
        (1, "1", "bad_text"),
        (2, "2", "no_key"),
    ]
    times = pa.array([1_000_000, 2**62], pa.int64()).cast(pa.timestamp("us"))
    keys = [item.key for item in read(parquet(pa.table({"jpg": [b"a", b"b"], "id": times})), key="id")]
    assert keys == ["1970-01-01 00:00:01%2E000000", f"<value out of range: {2**62}>"]


def text(*values: bytes) -> pa.Array:
    """Return an array of strings. Arrow does not check that they are valid UTF-8."""
    raw = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])


def test_texts_that_are_not_utf8_are_rejected() -> None:
    table = pa.table({"jpg": [b"0", b"1", b"2"], "id": text(b"a", b"b", b"\xff"), "txt": text(b"ok", b"\xff", b"ok")})
    items = read(parquet(table), key="id", wanted=pa.schema([("txt", pa.string())]))
    assert [outcome(item) for item in items] == [(0, "a", b"0"), (1, "b", "bad_text"), (2, "2", "bad_text")]
    images = pa.StructArray.from_arrays([pa.array([b"0", b"1"]), text(b"a", b"\xff")], ["bytes", "path"])
    assert [outcome(item)[2] for item in read(parquet(pa.table({"image": images})))] == [b"0", "bad_text"]


def test_images_have_a_size_limit() -> None:
    data, limits = parquet(pa.table({"jpg": [b"12", b"123"]})), Limits(image_bytes=2)
    items = list(read_parquet(io.BytesIO(data), "p", len(data), (0, 1), None, None, NOTHING, limits))
    assert [outcome(item)[2] for item in items] == [b"12", "too_many_bytes"]


def test_rows_without_an_image_are_rejected() -> None:
    table = pa.table({"image": [{"bytes": b"0", "path": "0"}, {"bytes": None, "path": "1.jpg"}, None]})
    assert [outcome(item)[2] for item in read(parquet(table))] == [b"0", "image_not_embedded", "no_image"]


def test_ranges_divide_the_rows() -> None:
    table = pa.table({"jpg": [bytes([n]) * 1000 for n in range(40)], "id": [n // 2 for n in range(40)]})
    data = parquet(table, row_group_size=4, compression="none", use_dictionary=False, write_statistics=False)
    parts = [read(data, (k, 3)) for k in range(3)]
    assert [item.key for part in parts for item in part] == [str(n) for n in range(40)]
    assert [len(part) for part in parts] == [12, 16, 12]
    assert all(item.position == n for part in parts for n, item in enumerate(part))


def test_a_key_is_unique_in_the_whole_file() -> None:
    table = pa.table({"jpg": [bytes([n]) * 1000 for n in range(40)], "id": [n % 20 for n in range(40)]})
    items = [item for k in range(2) for item in read(parquet(table, row_group_size=4), (k, 2), key="id")]
    assert [isinstance(item, Sample) for item in items] == [True] * 20 + [False] * 20


def test_some_ranges_are_empty_if_there_are_fewer_row_groups() -> None:
    data = parquet(PLAIN)
    assert [len(read(data, (k, 4))) for k in range(4)].count(0) == 3
    groups = [
        select_row_groups(parquet_footer.find_row_group_middles(io.BytesIO(data), "p"), (k, 4), len(data))
        for k in range(4)
    ]
    assert sorted(group for row_group_indices in groups for group in row_group_indices) == [0]


def test_columns_are_copied_with_their_types() -> None:
    wanted = pa.schema([("caption", pa.large_string()), ("source_width", pa.int64()), ("nowhere", pa.string())])
    columns = [item.columns for item in read(parquet(PLAIN), wanted=wanted) if isinstance(item, Sample)]
    assert columns == [
        {"caption": caption, "source_width": width} for caption, width in [("zero", 1), (None, 2), ("two", 3)]
    ]


def test_times_keep_their_nanoseconds() -> None:
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns"))
    table = pa.table({"jpg": [b"0", b"1"], "time": times})
    values = [item.columns["time"] for item in read(parquet(table), wanted=pa.schema([("time", pa.timestamp("ns"))]))]
    assert pa.array(values, pa.timestamp("ns")).equals(times)


def test_times_that_python_cannot_represent_are_copied() -> None:
    """Texts in the same column are checked anyway."""
    far = pa.array([2**62, None], pa.int64()).cast(pa.timestamp("us"))
    columns = {
        "far": far,
        "day": pa.array([2**30, 1], pa.int32()).cast(pa.date32()),
        "zone": pa.array([1, 2], pa.int64()).cast(pa.timestamp("us", "Mars/Phobos")),
        "list": pa.ListArray.from_arrays([0, 1, 2], far),
        "pair": pa.StructArray.from_arrays([far, text(b"ok", b"\xc3\xa9")], ["time", "text"]),
    }
    table = pa.table({"jpg": [b"0", b"1"], **columns})
    items = [item for item in read(parquet(table), wanted=table.schema.remove(0)) if isinstance(item, Sample)]
    for name, column in columns.items():
        assert pa.array([item.columns[name] for item in items], column.type).equals(column)
    invalid = pa.table({"jpg": [b"0"], "pair": pa.StructArray.from_arrays([far[:1], text(b"\xff")], ["time", "text"])})
    assert [outcome(item)[2] for item in read(parquet(invalid), wanted=invalid.schema.remove(0))] == ["bad_text"]


def test_a_column_of_another_type_fails_the_unit() -> None:
    with pytest.raises(ShardError, match="the column caption is string, but in the cache it is int64"):
        read(parquet(PLAIN), wanted=pa.schema([("caption", pa.int64())]))


def test_bytes_inside_nested_columns_are_not_images() -> None:
    table = pa.table({"image": [[{"name": "0", "data": b"0"}]], "other": [[[b"0"]]]})
    with pytest.raises(
        ShardError, match="has no column with the bytes of images: it has image, other; image has bytes"
    ):
        read(parquet(table))
    both = table.append_column("picture", [[{"bytes": b"1", "path": None}]])
    assert [outcome(item)[2] for item in read(parquet(both))] == [b"1"]


def test_the_available_columns_of_a_file() -> None:
    table = pa.table(
        {
            "key": ["k"],
            "image": [b""],
            "day": [datetime.date(2026, 1, 1)],
            "word": pa.array(["x"]).dictionary_encode(),
            "tags": [["a", "b"]],
        }
    )
    assert read_available_columns(io.BytesIO(parquet(table)), "p", None) == pa.schema(
        [("source_key", pa.string()), ("day", pa.date32()), ("word", pa.string()), ("tags", pa.list_(pa.string()))]
    )


def test_one_of_several_image_columns_must_be_named() -> None:
    table = pa.table({"a": [b"0"], "b": [b"1"]})
    with pytest.raises(ShardError, match="several columns with bytes, a, b; name one with --image-column"):
        read(parquet(table))
    assert [outcome(item)[2] for item in read(parquet(table), image="b")] == [b"1"]
    assert [outcome(item)[2] for item in read(parquet(table.append_column("jpg", [[b"2"]])))] == [b"2"]


@pytest.mark.parametrize(
    ("image", "key", "message"),
    [
        ("pixels", None, "the column pixels does not exist; columns: jpg, caption, width"),
        ("caption", None, "the column caption holds no images"),
        (None, "id", "--key-column: p.parquet has no column id; it has caption, width"),
    ],
)
def test_a_missing_or_unsuitable_column_is_named(image: str | None, key: str | None, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        read(parquet(PLAIN), image=image, key=key)


class StrictFile(io.BytesIO):
    """A file like those of object stores: a seek to before its start is an error."""

    def seek(self, position: int, whence: int = 0) -> int:
        if (position if whence == 0 else len(self.getvalue()) + position) < 0:
            raise ValueError("Seek before start of file")
        return super().seek(position, whence)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a Parquet file: it has 0 bytes"),
        (b"PAR1", "is not a Parquet file: it has 4 bytes"),
        (b"PAR1\0\0\0PAR1", "is not a Parquet file: it has 11 bytes"),
        (b"PAR1\0\0\0\0PAR1", "cannot be read as Parquet"),
        (b"<html>404 not found</html>", "is not a Parquet file, or is truncated: it has no end mark"),
        (parquet(PLAIN)[:-10], "is not a Parquet file, or is truncated: it has no end mark"),
    ],
)
def test_a_damaged_file_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=rf"p\.parquet {message}"):
        list(read_parquet(StrictFile(data), "p.parquet", len(data), (0, 1), None, None, NOTHING))
    with pytest.raises(DamagedError, match=rf"p\.parquet {message}"):
        read_available_columns(StrictFile(data), "p.parquet", None)


def test_a_flipped_bit_in_a_page_is_found() -> None:
    data = bytearray(parquet(PLAIN, write_page_checksum=True, write_statistics=False, use_dictionary=False))
    data[data.index(b"zero")] ^= 1
    with pytest.raises(ShardError, match=r"p\.parquet cannot be read as Parquet"):
        read(bytes(data), wanted=pa.schema([("caption", pa.string())]))


def test_metadata_beside_a_tar_is_joined_by_key() -> None:
    table = pa.table({"key": ["0", "1"], "url": ["u0", "u1"], "width": [10, 11], "extra": [0.5, None]})
    wanted = pa.schema([("source_width", pa.int32()), ("extra", pa.float64()), ("nowhere", pa.string())])
    assert read_metadata(io.BytesIO(parquet(table)), "p", wanted) == {
        "0": {"source_width": 10, "extra": 0.5},
        "1": {"source_width": 11, "extra": None},
    }
    assert read_available_metadata_columns(io.BytesIO(parquet(table)), "p").names == [
        "source_key",
        "url",
        "source_width",
        "extra",
    ]


def test_metadata_rows_whose_key_is_not_a_text_are_skipped() -> None:
    table = pa.table({"key": text(b"0", b"\xff", b"2"), "caption": text(b"ok", b"ok", b"\xff")})
    rows = read_metadata(io.BytesIO(parquet(table)), "p", pa.schema([("caption", pa.string())]))
    assert list(rows) == ["0", "2"]
    assert rows["0"] == {"caption": "ok"}
    reject = rows["2"]["caption"]
    assert isinstance(reject, Rejected)
    assert (reject.reason, reject.detail[:30]) == ("bad_text", "the column caption is not text")
    nulls = pa.table({"key": ["None", None], "caption": ["a", "b"]})
    found = read_metadata(io.BytesIO(parquet(nulls)), "p", pa.schema([("caption", pa.string())]))
    assert found == {"None": {"caption": "a"}}


def test_a_parquet_file_beside_a_tar_must_be_metadata() -> None:
    with pytest.raises(ShardError, match="has images itself; rename it"):
        read_available_metadata_columns(io.BytesIO(parquet(PLAIN)), "p")
    with pytest.raises(ShardError, match="has no column 'key'"):
        read_metadata(io.BytesIO(parquet(PLAIN.select(["caption"]))), "p", NOTHING)


def test_a_row_group_is_not_held_in_memory_as_a_whole() -> None:
    table = pa.table({"jpg": [bytes([n]) * (1 << 20) for n in range(100)]})
    data = parquet(table, use_dictionary=False, compression="none", write_batch_size=4, data_page_size=1 << 20)
    del table
    before, held = pa.total_allocated_bytes(), []
    for _ in read_parquet(io.BytesIO(data), "p", len(data), (0, 1), None, None, NOTHING):
        held.append(pa.total_allocated_bytes() - before)
    assert len(held) == 100
    assert max(held) < 50 << 20


def test_source_columns_with_names_of_latentmill_are_renamed() -> None:
    table = pa.table({"jpg": [b""], "width": [1], "source_width": [2], "source_source_width": [3], "source_x": [4]})
    data = parquet(table)
    wanted = read_available_columns(io.BytesIO(data), "p", None)
    assert wanted.names == ["source_width", "source_source_width", "source_source_source_width", "source_x"]
    (sample,) = read(data, wanted=wanted)
    assert isinstance(sample, Sample)
    assert list(sample.columns.values()) == [1, 2, 3, 4]


def test_a_dot_in_a_column_name_is_not_a_path() -> None:
    table = pa.table({"jpg": [b"0"], "a.b": [1], "a": [{"b": 2, "c": 3}], "the.key": ["k"]})
    wanted = pa.schema([("a.b", pa.int64()), ("a", table.schema.field("a").type)])
    (sample,) = read(parquet(table), key="the.key", wanted=wanted)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.columns) == ("k", {"a.b": 1, "a": {"b": 2, "c": 3}})


def test_two_columns_with_one_name_are_refused() -> None:
    table = pa.Table.from_arrays([pa.array([b"0"]), pa.array([1]), pa.array([2])], names=["jpg", "n", "n"])
    with pytest.raises(ShardError, match=r"p\.parquet has 2 columns with the name n"):
        read(parquet(table))


def test_a_dictionary_encoded_column_of_images_is_read() -> None:
    table = pa.table({"image": pa.array([b"0", b"1", b"0", None]).dictionary_encode()})
    assert [outcome(item)[2] for item in read(parquet(table))] == [b"0", b"1", b"0", "no_image"]
    assert read_available_columns(io.BytesIO(parquet(table)), "p", None).names == []


@pytest.mark.parametrize("wanted", [None, "image"])
def test_a_null_column_named_image_is_the_image_column(wanted: str | None) -> None:
    """pandas writes it if all images are missing. Another column with bytes is not used instead."""
    table = pa.table({"image": pa.nulls(2), "mask": [b"0", b"1"], "other": [b"0", b"1"]})
    assert [outcome(item)[2] for item in read(parquet(table), image=wanted)] == ["no_image", "no_image"]
    assert read(parquet(table.slice(0, 0)), image=wanted) == []
    paths = pa.table({"image": [{"bytes": None, "path": "0.jpg"}]})
    assert [outcome(item)[2] for item in read(parquet(paths), image=wanted)] == ["image_not_embedded"]


@pytest.mark.parametrize("names", [["key", "caption"], ["file_name", "text"], ["clip"], ["URL", "TEXT"]])
def test_a_file_without_images_has_no_samples_and_is_counted_once(names: list[str]) -> None:
    data = parquet(pa.table({name: ["x"] * 40 for name in names}), row_group_size=10)
    skipped = Counter[str]()
    for k in range(3):
        part = (k, 3)
        items = read_parquet(io.BytesIO(data), "p", len(data), part, None, None, NOTHING, skipped=skipped)
        assert list(items) == []
    assert skipped == {NO_IMAGES: 1}
    with pytest.raises(ShardError, match="the column image does not exist"):
        read(data, image="image")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"images": [[[b"0"]]]}, "images has bytes inside it (list<element: list<element: binary>>): write them"),
        ({"images": [[{"jpg": b"0", "txt": "t"}]]}, "images has bytes inside it (list<element: struct<jpg"),
        ({"image": ["aGVsbG8="]}, "image is string, not binary: decode base64 to bytes, or download the images"),
        ({"img": [[1, 2]]}, "img is list<element: int64>, not binary"),
    ],
)
def test_a_column_that_may_hold_images_in_another_form_is_an_error(column: dict[str, Any], message: str) -> None:
    """If the file were skipped, its images would be missing."""
    with pytest.raises(ShardError, match=re.escape(message)) as error:
        read(parquet(pa.table({**column, "text": ["t"]})))
    assert not isinstance(error.value, NoImagesError)


def test_urls_of_images_must_be_downloaded_first() -> None:
    with pytest.raises(NoImagesError, match="to read the images that URL names, give the file itself"):
        read_available_columns(io.BytesIO(parquet(pa.table({"URL": ["http://host/0.jpg"]}))), "p", None)


class TestKeysOfManyRanges:
    """A file of many ranges that one process reads."""

    N = 20

    @pytest.fixture
    def data(self) -> bytes:
        """Return a file of 40 row groups of 25 rows. Every key occurs twice: in the first half and in the second."""
        count = 1000
        columns = {"jpg": [bytes(200)] * count, "id": [f"key {n % (count // 2):06}" for n in range(count)]}
        return parquet(pa.table(columns), row_group_size=25, use_dictionary=False, compression="none")

    def read_all(self, data: bytes, order: list[int], known: FileKeys | None) -> tuple[list[Sample | Reject], float]:
        """Read the ranges in this order. Return their samples, and how often a row group was read on average."""
        stream, parts = CountingFile(data), {}
        for k in order:
            part = (k, self.N)
            items = read_parquet(stream, "p", len(data), part, None, "id", NOTHING, known=known)
            parts[k] = list(items)
        metadata = pq.read_metadata(io.BytesIO(data))
        chunks = [metadata.row_group(group).column(1) for group in range(metadata.num_row_groups)]
        reads = sum(stream.starts[chunk.data_page_offset] for chunk in chunks)
        return [item for k in sorted(parts) for item in parts[k]], reads / len(chunks)

    @pytest.mark.parametrize("order", ["forwards", "backwards"])
    def test_keys_are_unique_in_any_order_of_the_ranges(self, data: bytes, order: str) -> None:
        ranges = list(range(self.N)) if order == "forwards" else list(range(self.N))[::-1]
        with_known_keys, _ = self.read_all(data, ranges, FileKeys())
        without_known_keys, _ = self.read_all(data, ranges, None)
        assert [outcome(item) for item in with_known_keys] == [outcome(item) for item in without_known_keys]
        assert [isinstance(item, Sample) for item in with_known_keys] == [True] * 500 + [False] * 500
        assert {item.reason for item in with_known_keys if isinstance(item, Reject)} == {"duplicate_key"}

    def test_the_keys_of_a_row_group_are_read_once_for_all_ranges(self, data: bytes) -> None:
        ranges = list(range(self.N))
        assert self.read_all(data, ranges, FileKeys())[1] < 2
        assert self.read_all(data, ranges, None)[1] > self.N / 2, "with one process per range"

    def test_every_version_of_a_file_has_its_own_keys(self) -> None:
        keys = parquet_keys.get_file_keys("s3://b/p", 10, "etag 1", "id")
        assert parquet_keys.get_file_keys("s3://b/p", 10, "etag 1", "id") is keys
        others = [("s3://b/p", 10, "etag 2", "id"), ("s3://b/p", 10, "etag 1", "key"), ("s3://b/p", 10, "", "id")]
        assert all(parquet_keys.get_file_keys(*other) is not keys for other in others)
        assert parquet_keys.get_file_keys(*others[2]) is not parquet_keys.get_file_keys(*others[2]), (
            "the version is unknown"
        )

    def test_threads_read_the_keys_of_a_row_group_once(self) -> None:
        keys, reads = FileKeys(), Counter[int]()

        def read_keys(group: int) -> list[str]:
            reads[group] += 1
            return [f"{group}-{n}" for n in range(3)]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda group: keys.read_before(group, read_keys), [3, 5, 2, 5, 0, 4] * 5))
        assert reads == dict.fromkeys(range(5), 1)
        assert ["2-1" in known for known in found[:6]] == [True, True, False, True, False, True]
        assert all("5-0" not in known and "" not in known for known in found)


class CountingFile(io.BytesIO):
    """A file that counts the positions at which reads start."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.starts = Counter[int]()

    def read(self, count: int | None = -1) -> bytes:
        self.starts[self.tell()] += 1
        return super().read(-1 if count is None else count)
