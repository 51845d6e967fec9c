"""Rows to the bytes of one Parquet part, its record inside the footer as the file metadata `latentmill`.

Equal rows and records give equal bytes: what could vary (compression, row groups, statistics) is fixed here.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentmill.part_files import PARQUET_RECORD, PARQUET_SUFFIX
from pipeline.formats.record import Record
from pipeline.formats.schema import BASE_SCHEMA, OutputSchema
from pipeline.records import Row
from pipeline.values import size_in_bytes

SUFFIX = PARQUET_SUFFIX
ROW_GROUP_BYTES = 32 << 20
COMPRESSION = "zstd"

_LATENT = "latent"  # latents do not compress, repeat or sort; everything else does


def schema_of(layout: OutputSchema) -> pa.Schema:
    """The columns of every part."""
    return pa.schema([*BASE_SCHEMA, *layout.columns.schema])


def schema_as_json(layout: OutputSchema) -> list[dict[str, str]]:
    """The columns as cache.json names them."""
    return [{"name": field.name, "type": str(field.type)} for field in schema_of(layout)]


def serialize_part(rows: Sequence[Row], record: Record, layout: OutputSchema) -> bytes:
    """The file of a part. rows: at least one, by bucket and then position."""
    schema, sink = schema_of(layout), io.BytesIO()
    others = [path for field in schema if field.name != _LATENT for path in _paths(field.name, field.type)]
    with pq.ParquetWriter(
        sink,
        schema,
        compression=dict.fromkeys(others, COMPRESSION) | {_LATENT: "none"},
        use_dictionary=others,
        write_statistics=others,
        write_page_checksum=True,
    ) as writer:
        for group in _row_groups(rows):
            writer.write_table(_table(group, record, schema), row_group_size=len(group))
        writer.add_key_value_metadata({PARQUET_RECORD.decode(): record.to_json().decode()})
    return sink.getvalue()


def _row_groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    latents = columns = 0
    for row in rows:
        more = sum(map(size_in_bytes, row.image.columns.values()))
        is_full = latents + row.latent.nbytes > ROW_GROUP_BYTES or columns + more > ROW_GROUP_BYTES
        if group and (row.image.bucket != group[0].image.bucket or is_full):
            yield group
            group, latents, columns = [], 0, 0
        group.append(row)
        latents, columns = latents + row.latent.nbytes, columns + more
    yield group


def _table(rows: Sequence[Row], record: Record, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([_columns(row, record.source) for row in rows], schema=schema)


def _paths(name: str, kind: pa.DataType) -> list[str]:
    """A column's leaves as Parquet names them."""
    if pa.types.is_struct(kind):
        return [path for field in kind for path in _paths(f"{name}.{field.name}", field.type)]
    if pa.types.is_map(kind):
        return [f"{name}.key_value.key", *_paths(f"{name}.key_value.value", kind.item_type)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _paths(f"{name}.list.element", kind.value_type)
    return [name]


def _columns(row: Row, shard: str) -> dict[str, Any]:
    image = row.image
    return {
        "key": image.key,
        "shard": shard,
        "latent": _bytes(row.latent),
        "shape": list(row.latent.shape),
        "dtype": str(row.latent.dtype).removeprefix("torch."),
        **image.geometry,
        **image.columns,
    }


def _bytes(latent: torch.Tensor) -> bytes:
    """A latent's values in C order. Flat first: one of 1 x 1 counts as contiguous whatever its strides are."""
    return latent.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
