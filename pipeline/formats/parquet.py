"""Serialize rows as a Parquet part. The record is in the footer, as the file metadata `latentmill`.

Equal rows and records give equal bytes, because compression, row groups and statistics are fixed here.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.group_spans import GroupLimit, GroupSpan, Readable, list_parquet_groups
from latentmill.part_files import PARQUET_RECORD, PARQUET_SUFFIX
from pipeline.buffers import FileBuffer, allocate_tensor
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema
from pipeline.records import Row
from pipeline.values import size_in_bytes

if TYPE_CHECKING:  # a cache can be inspected without torch
    from torch import Tensor

SUFFIX = PARQUET_SUFFIX
COMPRESSION = "zstd"
_one_row_group = threading.Lock()  # that is written: Arrow has up to three copies of it


def make_schema(layout: OutputSchema) -> pa.Schema:
    """Return the schema of every part of a cache."""
    return pa.schema([*layout.base_schema, *layout.columns.schema])


def describe_schema(layout: OutputSchema) -> list[dict[str, str]]:
    """Return the columns of a row as cache.json names them."""
    return [{"name": field.name, "type": str(field.type)} for field in make_schema(layout)]


def serialize_part(
    rows: Iterable[Row], record: PartRecord, layout: OutputSchema
) -> tuple[memoryview, Sequence[GroupSpan]]:
    """Return the content of a part's file, and its row groups. rows: at least one, sorted by bucket, then by position.

    A row is dropped once its row group is written.
    """
    schema, sink, footers = make_schema(layout), FileBuffer(), list[pq.FileMetaData]()
    latents = layout.latent_names  # they do not compress, repeat or sort; everything else does
    others = [path for field in schema if field.name not in latents for path in list_paths(field.name, field.type)]
    with pq.ParquetWriter(
        sink,
        schema,
        compression=dict.fromkeys(others, COMPRESSION) | dict.fromkeys(latents, "none"),
        use_dictionary=others,
        write_statistics=others,
        write_page_checksum=True,
        data_page_version="1.0",  # `latentmill.loading.parquet_pages` finds latents in such pages
        metadata_collector=footers,
    ) as writer:
        for group in _split_into_row_groups(rows):
            with _one_row_group:
                _write_row_group(writer, group, record, layout)
        writer.add_key_value_metadata({PARQUET_RECORD.decode(): record.to_json().decode()})
    return sink.view(), list_parquet_groups(footers[0])


def read_groups(edge: bytes, file: Readable) -> Sequence[GroupSpan]:
    """Return the row groups of a part. edge: its end, with the footer. file: is not read.

    Raises ValueError if a row group does not name its bucket, or has several.
    """
    return list_parquet_groups(pq.read_metadata(pa.BufferReader(edge)))


def _write_row_group(writer: pq.ParquetWriter, rows: list[Row], record: PartRecord, layout: OutputSchema) -> None:
    """Write a row group. The list is emptied before that, because the table has copies of the latents."""
    table = _make_table(rows, record, layout)
    rows.clear()
    writer.write_table(table, row_group_size=table.num_rows)


def _split_into_row_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group, limit = list[Row](), GroupLimit()
    for row in rows:
        columns = sum(map(size_in_bytes, row.image.columns.values()))
        if limit.starts_group(row.image.bucket, row.latent_bytes, columns) and group:
            yield group
            group = []
        group.append(row)
    yield group


def _make_table(rows: Sequence[Row], record: PartRecord, layout: OutputSchema) -> pa.Table:
    """Return the rows of a row group as a table. They have one bucket, so their latents have one shape."""
    schema = make_schema(layout)
    images, geometries, latents = [row.image for row in rows], [row.image.geometry for row in rows], rows[0].latents
    columns: dict[str, Any] = {
        "key": [image.key for image in images],
        "shard": [image.shard for image in images],
        **{
            name: _make_binary_array([row.latents[number] for row in rows])
            for number, name in enumerate(layout.latent_names)
        },
        "shape": [list(latents[0].shape)] * len(rows),
        "dtype": [str(latents[0].dtype).removeprefix("torch.")] * len(rows),
    }
    for name in geometries[0]:
        columns[name] = [geometry[name] for geometry in geometries]
    for field in list(schema)[len(columns) :]:
        columns[field.name] = [image.columns.get(field.name) for image in images]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def list_paths(name: str, kind: pa.DataType) -> list[str]:
    """Return the paths of a column's leaves, as Parquet names them."""
    if pa.types.is_struct(kind):
        return [path for field in kind for path in list_paths(f"{name}.{field.name}", field.type)]
    if pa.types.is_map(kind):
        return [f"{name}.key_value.key", *list_paths(f"{name}.key_value.value", kind.item_type)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return list_paths(f"{name}.list.element", kind.value_type)
    return [name]


def _make_binary_array(latents: "Sequence[Tensor]") -> pa.Array:
    """Return latents of one shape as binary values in C order. One copy of all is much faster than `bytes` for each."""
    import torch

    stacked = allocate_tensor((len(latents), *latents[0].shape), latents[0].dtype)
    data = torch.stack(list(latents), out=stacked).reshape(-1).view(torch.uint8).numpy()
    offsets = np.arange(0, data.nbytes + 1, latents[0].nbytes, dtype=np.int32)
    return pa.Array.from_buffers(pa.binary(), len(latents), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
