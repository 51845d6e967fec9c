"""MosaicML Streaming: shards in its MDS format, and their index.json."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.exports.job import SPOOL, ExportJob, OutFile, Row

INDEX = "index.json"
SIZE_LIMIT = 4 * SPOOL  # bytes; the field of the index. Shards of 64 MiB are below it.

Sample = dict[str, bytes]


def list_columns(job: ExportJob) -> dict[str, str]:
    """Return the encoding of each column, sorted by name, as the format orders them."""
    columns = {"key": "str", "shard": "str", "latent": f"ndarray:{str(job.dtype).removeprefix('torch.')}"}
    if job.caption_column:
        columns["caption"] = "str"
    if job.label_column:
        columns["label"] = "int"
    return dict(sorted(columns.items()))


def convert(row: Row, job: ExportJob) -> Sample:
    """Return the values of a row's columns, encoded. A row without a caption has an empty one."""
    sample = {"key": row["key"].encode(), "shard": row["shard"].encode()}
    sample["latent"] = encode_array(job.read_latent(row).numpy())
    if job.caption_column:
        sample["caption"] = (job.read_caption(row) or "").encode()
    if job.label_column:
        sample["label"] = np.int64(job.read_label(row)).tobytes()
    return sample


def encode_array(array: np.ndarray) -> bytes:
    """Return an array as its column stores it.

    The dtype is in the name of the encoding. A byte has the number of axes and, in its two lowest bits, the type of the
    numbers of the shape: the smallest that holds them.
    """
    code, kind = (0, np.uint8) if max(array.shape) < 1 << 8 else (1, np.uint16)
    return bytes([array.ndim << 2 | code]) + np.array(array.shape, kind).tobytes() + array.tobytes()


def pack(rows: Iterator[Sample], job: ExportJob, part: int) -> Iterator[OutFile]:
    """Yield shards of as many rows as have 64 MiB."""
    columns = list_columns(job)
    samples: list[bytes] = []
    held = number = 0
    for row in rows:
        samples.append(encode_sample(row, columns))
        held += len(samples[-1])
        if held >= SPOOL:
            yield make_shard(samples, columns, f"shard.{part:05d}.{number:03d}.mds")
            samples, held, number = [], 0, number + 1
    if samples:
        yield make_shard(samples, columns, f"shard.{part:05d}.{number:03d}.mds")


def encode_sample(sample: Sample, columns: dict[str, str]) -> bytes:
    """Return a sample: the sizes of its values that have no fixed one, and then the values."""
    sizes = [len(sample[name]) for name, encoding in columns.items() if encoding != "int"]
    return np.array(sizes, np.uint32).tobytes() + b"".join(sample[name] for name in columns)


def make_shard(samples: Sequence[bytes], columns: dict[str, str], name: str) -> OutFile:
    """Return a shard: the number of its samples, where each begins and the last ends, its columns, the samples."""
    facts = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [8 if encoding == "int" else None for encoding in columns.values()],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": SIZE_LIMIT,
        "version": 2,
    }
    text = json.dumps(facts, sort_keys=True).encode()
    ends = np.cumsum([0, *map(len, samples)])
    offsets = (ends + 4 + 4 * len(ends) + len(text)).astype(np.uint32)
    data = b"".join([np.uint32(len(samples)).tobytes(), offsets.tobytes(), text, *samples])
    raw = {"basename": name, "bytes": len(data), "hashes": {}}
    entry = {**facts, "raw_data": raw, "samples": len(samples), "zip_data": None}
    return OutFile(name, data, rows=len(samples), entry=entry)


def finish(job: ExportJob, entries: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the index: the entries of all shards."""
    yield INDEX, json.dumps({"shards": list(entries), "version": 2}, sort_keys=True).encode()
