"""Publish a version of the columns of a cache: the overlay files first, and then the file that lists them."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.overlay_files import FILES, get_stored_type, to_stored
from latentmill.overlays import (
    FORMAT,
    KEY,
    LIST_SCHEMA,
    Overlays,
    VersionInfo,
    compute_digest,
    list_versions,
    name_version,
    open_overlays,
)
from latentmill.part_files import PARQUET_RECORD
from pipeline.annotation.join import PartColumns
from pipeline.buffers import FileBuffer
from pipeline.canonical_json import canonical_json
from pipeline.errors import UsageError
from pipeline.formats.parquet import COMPRESSION, list_paths
from pipeline.prefetch import map_in_order
from pipeline.storage.folder import Folder

THREADS = 4
BYTES_AHEAD = 256 << 20  # of the columns that are written at the same time; at least those of one part

Published = tuple[str, str, int, int, str, int]  # an entry of LIST_SCHEMA, and the matched rows


def publish_overlays(cache: Folder, parts: Iterable[PartColumns], schema: pa.Schema) -> list[Published]:
    """Create the overlay files of these parts that do not exist yet. schema: the columns, in order.

    A file's name has a hash of its content. So a run that was interrupted, or runs at the same time, does no harm.
    """
    existing = frozenset(cache.iterate_names(FILES))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="publish") as pool:
        publish = partial(_publish_overlay, cache, schema, existing)
        return list(
            map_in_order(pool, publish, parts, THREADS, weight=lambda part: part.table.nbytes, budget=BYTES_AHEAD)
        )


def _publish_overlay(cache: Folder, schema: pa.Schema, existing: frozenset[str], part: PartColumns) -> Published:
    with serialize_overlay(part, schema) as data:
        sha256 = hashlib.sha256(data).hexdigest()
        name = name_overlay(part.file, sha256)
        if name not in existing:
            cache.create(f"{FILES}/{name}", data)
        matched = int(pc.sum(part.table["matched"]).as_py() or 0)
        return part.file, name, len(part.table), len(data), sha256, matched


def name_overlay(file: str, sha256: str) -> str:
    """Return the name of an overlay. file: of the part. sha256: of the overlay, in hex."""
    return f"{PurePosixPath(file).stem}-{sha256[:16]}.parquet"


def serialize_overlay(part: PartColumns, schema: pa.Schema) -> memoryview:
    """Return the content of an overlay file: the keys and the columns, in row groups as the part has them.

    Equal columns give equal bytes.
    """
    columns = {KEY: part.table[KEY]}
    for item in schema:
        chunks = [to_stored(chunk) for chunk in part.table[item.name].chunks]
        columns[item.name] = pa.chunked_array(chunks, get_stored_type(item.type))
    table = pa.table(columns)
    plain = [item.name for item in schema if get_stored_type(item.type) != item.type]  # as latents are
    others = [path for item in table.schema if item.name not in plain for path in list_paths(item.name, item.type)]
    sink = FileBuffer()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=dict.fromkeys(others, COMPRESSION) | dict.fromkeys(plain, "none"),
        use_dictionary=others,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        first = 0
        for count in part.groups:
            writer.write_table(table.slice(first, count).combine_chunks(), row_group_size=count)
            first += count
        content = canonical_json({"file": part.file, "format": FORMAT})
        writer.add_key_value_metadata({PARQUET_RECORD.decode(): content.decode()})
    return sink.view()


def check_types(schema: pa.Schema) -> None:
    """Raise UsageError for a column of a type that a Parquet file cannot have."""
    for item in schema:
        try:
            stored = pa.schema([item.with_type(get_stored_type(item.type))])
            pq.write_table(stored.empty_table(), pa.BufferOutputStream())
        except (pa.ArrowException, ValueError) as error:
            raise UsageError(f"the column {item.name} has the type {item.type}, which is not supported") from error


def check_values(rows: pa.Table, table: str) -> None:
    """Raise UsageError if a fixed-size list of numbers has a null among them: they are stored as bytes."""
    for item in rows.schema:
        is_stored_as_bytes = get_stored_type(item.type) != item.type
        if is_stored_as_bytes and any(chunk.flatten().null_count for chunk in rows[item.name].chunks):
            text = f"the column {item.name} of {table} has a null among the numbers of a fixed-size list"
            raise UsageError(f"{text}: use lists without a fixed size, or another number")


def publish_version(
    cache: Folder, overlays: Sequence[Published], schema: pa.Schema, table: str, latentmill: str
) -> tuple[Overlays, bool]:
    """Create the next version of the columns, unless the newest ones are the same already.

    overlays: of `publish_overlays`. table: the name of the table; "" for the sources. latentmill: our version.
    Returns the newest columns, and whether the version was created.
    """
    rows = sorted(overlays)
    info = VersionInfo(
        format=FORMAT,
        table=table,
        columns=tuple(f"{item.name}: {item.type}" for item in schema),
        arrow_schema=base64.b64encode(schema.serialize().to_pybytes()).decode(),
        rows=sum(row[2] for row in rows),
        matched=sum(row[5] for row in rows),
        digest=compute_digest({row[0]: row[4] for row in rows}),
        latentmill=latentmill,
    ).seal()
    data = encode_version(info, rows)
    while True:
        newest = open_overlays(cache)
        providers = newest.providers
        given = [providers[name] for name in schema.names if name in providers]
        if len(given) == len(schema) and all(version.info.digest == info.digest for version in given):
            return newest, False
        number = max(list_versions(cache), default=0) + 1
        if cache.create(name_version(number), data):
            return open_overlays(cache, number), True


def encode_version(info: VersionInfo, rows: Sequence[Published]) -> bytes:
    """Return the content of the file that lists a version. rows: sorted."""
    file, name, counts, sizes, hashes = (list(column) for column in list(zip(*rows, strict=True))[:5])
    columns = [file, name, counts, sizes, [bytes.fromhex(sha256) for sha256 in hashes]]
    table = pa.table(dict(zip(LIST_SCHEMA.names, columns, strict=True)), LIST_SCHEMA)
    content = canonical_json(asdict(info)).decode()
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, LIST_SCHEMA, compression=COMPRESSION, write_page_checksum=True, write_statistics=False
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({PARQUET_RECORD.decode(): content})
    return bytes(sink.getvalue().to_pybytes())
