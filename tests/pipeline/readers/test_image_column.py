"""The forms of image columns that Parquet files have: lists of one, structs, dictionaries, views, and partitions."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ShardError
from pipeline.readers.image_column import find_image_column, flatten_schema
from pipeline.readers.parquet import read_available_columns, read_parquet
from pipeline.readers.partitions import parse_partitions
from pipeline.records import Sample

IMAGES = [b"0", b"1", b"2"]
HF = [{"bytes": image, "path": f"{image!r}.jpg"} for image in IMAGES]


def read(table: pa.Table, image: str | None = None) -> list[object]:
    """Return the image and all columns of each row, or the reason of its reject."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    wanted = read_available_columns(sink, "p.parquet", image)
    items = read_parquet(sink, "p.parquet", len(sink.getvalue()), (0, 1), image, None, wanted)
    return [(i.image, dict(i.columns)) if isinstance(i, Sample) else i.reason for i in items]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary_view()),
        pa.array(IMAGES).dictionary_encode(),
        pa.array(HF),
        pa.array([[image] for image in IMAGES]),
        pa.array([[image] for image in HF]),
        pa.array([[image] for image in HF], pa.large_list(pa.array(HF).type)),
        pa.array([[image] for image in IMAGES], pa.list_(pa.binary(), 1)),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_images_are_read_in_every_form(column: Any) -> None:
    text = pa.array(["a", None, "c"], pa.string_view())
    expected = [(image, {"text": value}) for image, value in zip(IMAGES, text.to_pylist(), strict=True)]
    assert read(pa.table({"images": column, "text": text})) == expected


def test_a_row_with_several_images_is_rejected() -> None:
    table = pa.table({"images": pa.array([HF[:1], HF[:2], [], None, [None], [{"bytes": None, "path": "/a.jpg"}]])})
    assert read(table) == [(b"0", {}), "several_images", "no_image", "no_image", "no_image", "image_not_embedded"]


NESTED = pa.table(
    {"sample": pa.array([{"jpg": b"0", "txt": "a", "meta": {"w": 1}}, None, {"jpg": None, "txt": "c", "meta": None}])}
)


@pytest.mark.parametrize("image", [None, "sample.jpg"])
def test_an_image_inside_a_struct_is_found(image: str | None) -> None:
    assert read(NESTED, image) == [(b"0", {"sample.txt": "a", "sample.meta": {"w": 1}}), "no_image", "no_image"]


def test_the_images_of_a_struct_may_be_hugging_faces() -> None:
    table = pa.table({"a": pa.array([{"b": {"image": HF[0], "n": 1}}]), "n": [2]})
    assert read(table) == [(b"0", {"a.b.n": 1, "n": 2})]


def test_an_image_column_of_the_top_level_takes_precedence() -> None:
    table = pa.table({"other": pa.array([{"png": b"1", "n": 1}]), "image": HF[:1], "images": pa.array([HF[:2]])})
    assert read(table)[0][0] == b"0"  # type: ignore[index]
    assert read(table, "other.png")[0][0] == b"1"  # type: ignore[index]


@pytest.mark.parametrize(
    "columns",
    [
        {"image_a": pa.array(HF), "image_b": pa.array(HF)},
        {"a": pa.array([{"jpg": b"0"}]), "b": pa.array([{"jpg": b"0"}])},
        {"s": pa.array([{"source": b"0", "target": b"0"}])},
        {"crops": pa.array([HF]), "views": pa.array([HF])},
    ],
)
def test_several_candidates_are_an_error(columns: dict[str, Any]) -> None:
    schema = flatten_schema(pa.schema([(name, column.type) for name, column in columns.items()]))
    with pytest.raises(ShardError, match=r"has several columns with bytes, \w+(\.\w+)?, .* --image-column"):
        find_image_column(schema, None, "p.parquet")


@pytest.mark.parametrize(
    ("path", "columns"),
    [
        ("s/split=train/year=2024/0.parquet", {"split": "train", "year": "2024"}),
        ("s/a/city=K%C3%B6ln%2FS%3Dx/0.parquet", {"city": "Köln/S=x"}),
        ("s/split=__HIVE_DEFAULT_PARTITION__/0.parquet", {"split": None}),
        ("s/key=1/shape=/a=b.parquet", {"source_key": "1", "source_shape": ""}),
        ("split=train/0.parquet", {}),
        ("s/=x/0.parquet", {}),
    ],
)
def test_folders_represent_columns(path: str, columns: dict[str, str | None]) -> None:
    assert parse_partitions(path) == columns
