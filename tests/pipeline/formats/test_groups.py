"""The row groups of a part: its writer and its file agree on them, and the bytes of each can be read alone."""

import io
import itertools
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentmill import group_spans
from latentmill.group_spans import GroupSpan, list_parquet_groups, list_tar_groups
from latentmill.part_files import count_record_bytes, read_webdataset_rows
from pipeline.cache.parts import PART_FORMATS, read_groups
from pipeline.errors import CacheError
from pipeline.formats.schema import OutputSchema
from pipeline.part_writer import make_record
from pipeline.records import Container, PreparedImage
from tests.pipeline.formats.test_part_bytes import BUCKETS, ROWS, UNIT, encode, fill_buffer, make_image

LIMIT = 8_000  # bytes of latents in a group; a latent has 512 or 576
CASES = pytest.mark.parametrize(
    ("container", "has_flipped"), [("parquet", False), ("parquet", True), ("webdataset", False), ("webdataset", True)]
)


def write_part(
    container: Container, has_flipped: bool, rows: int = ROWS, text: str = ""
) -> tuple[bytes, Sequence[GroupSpan]]:
    """Return a part of several buckets, and its groups as its writer knows them. Some keys need PAX headers.

    text: of each image, if it is not empty.
    """
    layout = OutputSchema(container=container, has_flipped=has_flipped)
    images = [change(make_image(position), text) for position in range(rows)]
    buffer = fill_buffer([(image, encode(image, layout, torch.float16)) for image in images])
    spec: Any = SimpleNamespace(identity_sha256="i", rows_per_part=rows, layout=layout)
    record = make_record(UNIT, 0, buffer, True, spec)
    data, groups = PART_FORMATS[container].serialize_part(buffer.rows, record, layout)
    return bytes(data), groups


def change(image: PreparedImage, text: str) -> PreparedImage:
    key = image.key + {1: "x" * 120, 2: "\u00fc"}.get(image.position % 5, "")
    return replace(image, key=key, columns={**image.columns, "txt": text} if text else image.columns)


@CASES
def test_the_file_has_the_groups_that_its_writer_knows(
    container: Container, has_flipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_spans, "GROUP_BYTES", LIMIT)
    data, groups = write_part(container, has_flipped)
    name = f"data/u-00000{PART_FORMATS[container].SUFFIX}"
    edge = data[-count_record_bytes(data, name) :] if container == "parquet" else b""
    assert read_groups(name, edge, io.BytesIO(data), name) == groups
    assert sum(group.rows for group in groups) == ROWS
    buckets = [(group.height, group.width) for group in groups]
    assert buckets == sorted(buckets)
    assert set(buckets) == set(BUCKETS)
    assert len(groups) > 2 * len(BUCKETS)
    for group in groups:
        latents = group.rows * (1 + has_flipped) * 4 * 2 * group.height * group.width // 64
        assert latents <= LIMIT
    for before, after in itertools.pairwise(groups):
        assert before.stop == after.start, "nothing is between two groups"


@pytest.mark.parametrize("has_flipped", [False, True])
def test_the_bytes_of_a_group_of_a_tar_are_its_samples(has_flipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_spans, "GROUP_BYTES", LIMIT)
    data, groups = write_part("webdataset", has_flipped)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = tar.getnames()
    names = list[str]()
    for group in groups:
        piece = data[group.start : group.stop]
        with tarfile.open(fileobj=io.BytesIO(piece), mode="r|") as tar:
            names += [member.name for member in tar]
        rows = list(read_webdataset_rows(io.BytesIO(piece), texts=("txt", "json")))
        assert len(rows) == group.rows
        assert {(row["height"], row["width"]) for row in rows} == {(group.height, group.width)}
    assert names == expected


@pytest.mark.parametrize("has_flipped", [False, True])
def test_the_bytes_of_a_row_group_suffice_for_pyarrow(has_flipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_spans, "GROUP_BYTES", LIMIT)
    data, groups = write_part("parquet", has_flipped)
    whole = pq.ParquetFile(io.BytesIO(data))
    assert whole.num_row_groups == len(groups)
    for number, group in enumerate(groups):
        sparse = bytearray(len(data))
        sparse[group.start : group.stop] = data[group.start : group.stop]
        file = pq.ParquetFile(io.BytesIO(sparse), metadata=whole.metadata, page_checksum_verification=True)
        table = file.read_row_group(number)
        assert table.equals(whole.read_row_group(number))
        assert table["height"].unique().to_pylist() == [group.height]
        sparse[group.stop - 1] ^= 1
        sparse[group.start + 40] ^= 1
        with pytest.raises(OSError):
            pq.ParquetFile(io.BytesIO(sparse), metadata=whole.metadata, page_checksum_verification=True).read_row_group(
                number
            )


def test_large_texts_make_groups_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of 1,024 to 1,152 bytes of latents and 3,000 of text fit into a group, three do not."""
    monkeypatch.setattr(group_spans, "GROUP_BYTES", 4000)
    for container in PART_FORMATS:
        data, groups = write_part(container, False, rows=14, text="x" * 1500)
        assert [group.rows for group in groups] == [2, 2, 2, 2, 2, 2, 2]
        if container == "webdataset":
            assert list_tar_groups(io.BytesIO(data)) == groups


@pytest.mark.parametrize("size", [1000, 1024, 20_000, 100_000])
def test_a_damaged_tar_is_an_error_with_its_name(size: int) -> None:
    data, _ = write_part("webdataset", False)
    with pytest.raises(CacheError, match=r"data/u\.tar is damaged: its row groups cannot be read"):
        read_groups("data/u.tar", b"", io.BytesIO(data[:size]), "data/u.tar")


def test_a_row_group_of_two_buckets_is_an_error() -> None:
    table = pa.table({"height": pa.array([64, 72], pa.int32()), "width": pa.array([64, 64], pa.int32())})
    for rows, options in ((2, {}), (1, {"write_statistics": False})):
        file = io.BytesIO()
        pq.write_table(table.slice(0, rows), file, **options)
        with pytest.raises(ValueError, match="several buckets, or does not name its bucket"):
            list_parquet_groups(pq.read_metadata(io.BytesIO(file.getvalue())))


def test_a_bare_record_has_no_groups() -> None:
    record = json.dumps({}).encode()
    assert read_groups("_empty/u-00000.json", record, io.BytesIO(record), "u") == []
