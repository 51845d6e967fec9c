"""Rows to the bytes of one Parquet part, its record inside the footer as the file metadata `latentmill`.

Equal rows and records give equal bytes: what could vary (compression, row groups, statistics) is fixed here.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import CacheError
from pipeline.records import Record, Row, Store

SUFFIX = ".parquet"
RECORD_KEY = b"latentmill"
ROW_GROUP_BYTES = 32 << 20
COMPRESSION = "zstd"

_OURS = [
    ("key", pa.string()),
    ("shard", pa.string()),
    ("latent", pa.binary()),
    ("shape", pa.list_(pa.int32())),
    ("dtype", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("original_height", pa.int32()),
    ("original_width", pa.int32()),
    ("crop_top", pa.int32()),
    ("crop_left", pa.int32()),
    ("flipped", pa.bool_()),
]
SCHEMA = pa.schema([*_OURS, ("txt", pa.string()), ("json", pa.string())])

# Latents do not compress, repeat or sort; everything else does.
_LATENT = "latent"
_OTHERS = [name if name != "shape" else "shape.list.element" for name in SCHEMA.names if name != _LATENT]


def schema_as_json() -> list[dict[str, str]]:
    """The columns as cache.json names them."""
    return [{"name": field.name, "type": str(field.type)} for field in SCHEMA]


def part(rows: Sequence[Row], record: Record, store: Store) -> bytes:
    """The file of a part. rows: at least one, by bucket and then position. store: the columns are the same for all."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression=dict.fromkeys(_OTHERS, COMPRESSION) | {_LATENT: "none"},
        use_dictionary=_OTHERS,
        write_statistics=_OTHERS,
        write_page_checksum=True,
    ) as writer:
        for group in _row_groups(rows):
            writer.write_table(_table(group, record), row_group_size=len(group))
        writer.add_key_value_metadata({RECORD_KEY.decode(): record.to_json().decode()})
    return sink.getvalue()


def read_record(data: bytes, name: str) -> Record:
    """The record inside a part's bytes. Raises CacheError, which names the file, where there is none."""
    try:
        metadata = pq.read_metadata(io.BytesIO(data)).metadata or {}
        return Record.from_json(metadata[RECORD_KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{name} is not a part of a latentmill cache: it has no readable record") from error


def read_rows(
    stream: BinaryIO, wanted: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a part as dicts, in order: all, or those at the `wanted` indexes. A row group is held at a time.

    Without pyarrow's threads: a process that ends at once, while they and torch's are about, is aborted.
    """
    parquet, start = pq.ParquetFile(stream), 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        here = [index - start for index in wanted or () if start <= index < start + count]
        if wanted is None or here:
            table = parquet.read_row_group(group, columns=list(columns) if columns else None, use_threads=False)
            yield from (table if wanted is None else table.take(here)).to_pylist()
        start += count


def _row_groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    size = 0
    for row in rows:
        if group and (row.picture.bucket != group[0].picture.bucket or size + row.latent.nbytes > ROW_GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += row.latent.nbytes
    yield group


def _table(rows: Sequence[Row], record: Record) -> pa.Table:
    return pa.Table.from_pylist([_columns(row, record.source) for row in rows], schema=SCHEMA)


def _columns(row: Row, shard: str) -> dict[str, Any]:
    picture = row.picture
    return {
        "key": picture.key,
        "shard": shard,
        "latent": row.latent.contiguous().view(torch.uint8).numpy().tobytes(),
        "shape": list(row.latent.shape),
        "dtype": str(row.latent.dtype).removeprefix("torch."),
        **picture.geometry,
        **picture.columns,
    }
