"""The WebDataset container, read by the webdataset library, by tarfile and by latentmill."""

import dataclasses
import io
import json
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentmill.part_files import read_parquet_rows, read_webdataset_rows
from pipeline.cache.parts import PartFormat, read_record
from pipeline.errors import CacheError, Rejected
from pipeline.formats import parquet as parquet_format
from pipeline.formats import webdataset as webdataset_format
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.records import TEXT_EXTENSIONS, PreparedImage, Row


def serialize(part_format: PartFormat, rows: Sequence[Row], record: PartRecord, layout: OutputSchema) -> bytes:
    """Return the bytes of a part."""
    return bytes(part_format.serialize_part(rows, record, layout)[0])


def make_row(number: int, key: str, dtype: torch.dtype = torch.float16, channels: int = 4, **columns: object) -> Row:
    generator = torch.Generator().manual_seed(number)
    image = PreparedImage(
        shard="shards/\u00fc.tar",
        position=number,
        key=key,
        columns={"txt": None, "json": None, **columns},
        pixels=torch.zeros(64, 72, 3, dtype=torch.uint8),
        original_height=100,
        original_width=113,
        resized_height=100,
        resized_width=113,
        crop_top=0,
        crop_left=4,
        enlarged=False,
        flipped=number == 1,
    )
    return Row(image, torch.randn(1, 1, channels, 8, 9, generator=generator).to(dtype), 0)


ROWS = [
    make_row(0, "a/000", txt="a cat\n", json='{"b": "\u00e9"}'),
    make_row(1, "\u00fcber%2Ev1"),
    make_row(2, "k" * 300, txt=""),
]


def make_record(rows: int = 3) -> PartRecord:
    return PartRecord(
        format=1,
        identity="i" * 64,
        unit="unit",
        part=0,
        last=True,
        source="shards/\u00fc.tar",
        source_bytes=5,
        range=None,
        first=0,
        samples=rows,
        rows=rows,
        filtered={},
        enlarged=0,
        inputs="",
        rejects=(),
        tally={},
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "part.tar"
    path.write_bytes(serialize(webdataset_format, ROWS, make_record(), OutputSchema()))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the file open
def test_webdataset_reads_every_sample(file: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    dataset = webdataset.WebDataset(str(file), shardshuffle=False, empty_check=False).decode()
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [row.image.key for row in ROWS]
    for sample, expected in zip(samples, ROWS, strict=True):
        assert sample["latent.npy"].dtype == np.float16
        assert np.array_equal(sample["latent.npy"], expected.latents[0].numpy())
        assert sample["latent.json"]["shard"] == "shards/\u00fc.tar"
    assert (samples[0]["txt"], samples[0]["json"]) == ("a cat\n", {"b": "\u00e9"})
    assert [sample.get("txt") for sample in samples[1:]] == [None, ""]


class Garbage:
    """An object that lets another thread run while it is collected."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        time.sleep(1e-5)


@pytest.mark.slow
def test_many_threads_can_read_parts_at_once() -> None:
    """Otherwise, Python 3.11 fails occasionally, and an intact cache is reported as damaged."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    rows = [make_row(number, f"{number:03}") for number in range(200)]
    data = serialize(webdataset_format, rows, make_record(200), OutputSchema(container="webdataset"))

    def count(depth: int) -> int:
        return count(depth - 1) if depth else sum(bool(Garbage()) for _ in read_webdataset_rows(io.BytesIO(data)))

    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(count, [number % 7 for number in range(64)])) == [200] * 64
    finally:
        sys.setswitchinterval(before)


def test_rows_equal_those_of_a_parquet_part(file: Path) -> None:
    parquet = io.BytesIO(serialize(parquet_format, ROWS, make_record(), OutputSchema()))
    for wanted in (None, [0, 2], [1], []):
        parquet.seek(0)
        with file.open("rb") as stream:
            assert list(read_webdataset_rows(stream, wanted, TEXT_EXTENSIONS)) == list(
                read_parquet_rows(parquet, wanted)
            )


def test_members_have_neither_time_nor_owner_and_equal_rows_give_equal_bytes(file: Path) -> None:
    with tarfile.open(file) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}
        assert tar.getnames()[:4] == ["a/000.latent.npy", "a/000.latent.json", "a/000.txt", "a/000.json"]
    assert serialize(webdataset_format, ROWS, make_record(), OutputSchema()) == file.read_bytes()


def test_the_record_is_read_and_a_file_without_one_is_an_error(file: Path) -> None:
    data = file.read_bytes()
    assert read_record(data, "x.tar") == make_record()
    with tarfile.open(file) as tar:
        assert json.loads(tar.pax_headers["LATENTMILL.record"])["source"] == "shards/\u00fc.tar"
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    for foreign in (b"", b"nothing", empty.getvalue(), data[512:]):
        with pytest.raises(CacheError, match=r"data/x\.tar is not a part"):
            read_record(foreign, "data/x.tar")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the file open
@pytest.mark.parametrize(("store", "name"), [("mode", "latent"), ("moments", "moments")])
def test_flipped_latents_are_members_of_the_same_sample(tmp_path: Path, store: Any, name: str) -> None:
    """The webdataset library, latentmill and a Parquet part give the same two latents per row."""
    webdataset = pytest.importorskip("webdataset")
    layout = OutputSchema(container="webdataset", store=store, has_flipped=True)
    rows = [dataclasses.replace(row, chunk=torch.cat([row.chunk, row.chunk + 1], dim=1)) for row in ROWS]
    (tmp_path / "part.tar").write_bytes(serialize(webdataset_format, rows, make_record(), layout))
    samples = list(webdataset.WebDataset(str(tmp_path / "part.tar"), shardshuffle=False, empty_check=False).decode())
    assert [sample["__key__"] for sample in samples] == [row.image.key for row in rows]
    assert all(np.array_equal(sample[f"{name}.npy"] + 1, sample[f"{name}_flipped.npy"]) for sample in samples)
    assert [member["name"] for member in webdataset_format.describe_schema(layout)[:2]] == [
        f"{name}.npy",
        f"{name}_flipped.npy",
    ]
    parquet = serialize(parquet_format, rows, make_record(), dataclasses.replace(layout, container="parquet"))
    with (tmp_path / "part.tar").open("rb") as stream:
        read = list(read_webdataset_rows(stream, texts=TEXT_EXTENSIONS))
    assert read == list(read_parquet_rows(io.BytesIO(parquet)))
    assert all(row["latent_flipped"] != row["latent"] for row in read)
    columns = pq.read_metadata(io.BytesIO(parquet)).row_group(0)
    flipped = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "latent_flipped")
    assert (flipped.compression, flipped.has_dictionary_page) == ("UNCOMPRESSED", False)


@pytest.mark.parametrize(("store", "member"), [("sample", "a.latent.npy"), ("moments", "a.moments.npy")])
def test_the_name_of_a_member_depends_on_its_values(store: Any, member: str) -> None:
    data = serialize(
        webdataset_format,
        [make_row(0, "a", torch.float32, channels=8)],
        dataclasses.replace(make_record(1)),
        OutputSchema(store=store),
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames()[0] == member
    (read,) = read_webdataset_rows(io.BytesIO(data))
    assert (read["dtype"], read["shape"]) == ("float32", [8, 8, 9])


def test_times_of_any_year_are_written_as_json_and_to_parquet() -> None:
    kind = pa.list_(pa.timestamp("us"))
    times = pa.ListArray.from_arrays([0, 2], pa.array([1, 2**62]).cast(pa.timestamp("us")))
    rows, layout = (
        [make_row(0, "a", times=times[0])],
        OutputSchema(columns=PassthroughColumns(pa.schema([("times", kind)]), ())),
    )
    (read,) = read_webdataset_rows(io.BytesIO(serialize(webdataset_format, rows, make_record(1), layout)))
    assert read["times"] == ["1970-01-01 00:00:00.000001", f"<value out of range: {2**62}>"]
    part = io.BytesIO(serialize(parquet_format, [make_row(0, "a", times=times[0])], make_record(1), layout))
    assert pq.read_table(part)["times"].combine_chunks().equals(times)
    (read,) = read_parquet_rows(part)
    assert pa.array([read["times"]], kind).equals(times)


def test_a_value_without_a_json_form_is_never_written() -> None:
    layout = OutputSchema(columns=PassthroughColumns(pa.schema([("caption", pa.string())]), ()))
    with pytest.raises(TypeError, match="a Rejected cannot be converted to JSON"):
        serialize(
            webdataset_format,
            [make_row(0, "a", caption=Rejected("read", "bad_text", "caption"))],
            make_record(1),
            layout,
        )
