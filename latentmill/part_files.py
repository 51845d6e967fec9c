"""The files with the rows of a cache, Parquet and WebDataset: their rows, their record, their latents as tensors.

A row is a dict with the same fields in both containers: `key`, `shard`, `latent` (the values as bytes, in C order),
`latent_flipped` if the cache has it, `shape`, `dtype`, the geometry of the image, and the passed-through columns.
"""

import io
import json
import math
import re
import tarfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.arrow_values import to_python
from latentmill.canonical_json import parse_json_object
from latentmill.errors import CacheError, UsageError
from latentmill.folder import CacheFolder

if TYPE_CHECKING:  # rows can be read without torch
    from torch import Tensor

PARQUET_SUFFIX = ".parquet"
WEBDATASET_SUFFIX = ".tar"
PARQUET_RECORD = b"latentmill"  # the key of the file metadata
WEBDATASET_RECORD = "LATENTMILL.record"  # the key of the PAX global header
SAMPLE_JSON = ".latent.json"
LATENT_MEMBERS = (".latent.npy", ".moments.npy")  # the ends of the names of a sample's first member
FLIPPED_MEMBERS = (".latent_flipped.npy", ".moments_flipped.npy")
FIRST_HEADERS = 16 << 10  # bytes after the record of a tar that hold the headers of its first member, and more

# numpy parses headers by `ast`, which Python 3.11 cannot always do in two threads at once (SystemError, gh-106905)
_npy_lock = threading.Lock()


def to_tensor(row: Mapping[str, Any], column: str = "latent") -> "Tensor":
    """Return the raw latent of a row: [C, h, w] in the cache's dtype, on the CPU; of moments [2C, h, w].

    column: `latent`, or `latent_flipped` of a cache with `--flip both`.
    """
    import torch

    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    return torch.frombuffer(bytearray(row[column]), dtype=dtypes[row["dtype"]]).reshape(row["shape"])


def read_rows(
    stream: BinaryIO,
    name: str,
    wanted: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = (),
    binary: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part as dicts, in order.

    name: the file's, whose suffix names the container. wanted: indexes of the rows to yield; None for all. columns: of
    Parquet, to read less. texts: of WebDataset, the members to read; a sample may lack its own. binary: those
    of them that are bytes.
    """
    if name.endswith(WEBDATASET_SUFFIX):
        yield from read_webdataset_rows(stream, wanted, texts, binary)
    else:
        yield from read_parquet_rows(stream, wanted, columns)


def open_parquet_file(source: Any, metadata: pq.FileMetaData | None = None, checksums: bool = True) -> pq.ParquetFile:
    """Open a Parquet file of a cache. Read it with use_threads=False.

    Then no thread of pyarrow is started for local files and bytes in memory: a process that ends while they and torch's
    threads run can be aborted. From a store, the columns of a row group are read together, which takes a thread.
    source: a stream or a buffer. metadata: the footer, if it is known. checksums: compare each page with its CRC.
    """
    is_remote = getattr(source, "is_remote", False)
    return pq.ParquetFile(source, metadata=metadata, pre_buffer=is_remote, page_checksum_verification=checksums)


def read_parquet_rows(
    stream: BinaryIO, wanted: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet part as `read_rows` does. One row group is held at a time.

    Raises UsageError for columns that the part does not have.
    """
    parquet, start = open_parquet_file(stream), 0
    names = parquet.schema_arrow.names
    if unknown := [name for name in columns or () if name not in names]:
        raise UsageError(f"a part has no column {', '.join(unknown)}; it has {', '.join(names)}")
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        indexes = [index - start for index in wanted or () if start <= index < start + count]
        if wanted is None or indexes:
            table = parquet.read_row_group(group, columns=list(columns) if columns else None, use_threads=False)
            table = table if wanted is None else table.take(indexes)
            for values in zip(*map(to_python, table.columns), strict=True):
                yield dict(zip(table.column_names, values, strict=True))
        start += count


def read_webdataset_rows(
    stream: BinaryIO,
    wanted: Sequence[int] | None = None,
    texts: Sequence[str] = (),
    binary: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a WebDataset part as `read_rows` does, as a Parquet part has them."""
    indexes = None if wanted is None else set(wanted)
    last = math.inf if indexes is None else max(indexes, default=-1)  # what follows it is not read
    for index, row in enumerate(_read_samples(stream, texts, binary)):
        if indexes is None or index in indexes:
            yield row
        if index >= last:
            return


def _read_samples(stream: BinaryIO, texts: Sequence[str], binary: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples. Raises tarfile.TarError if a whole file does not have the number of samples in its record."""
    row: dict[str, Any] = {}
    count = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            data = file.read() if file else b""
            if member.name.endswith(LATENT_MEMBERS):
                if row:
                    yield row
                count += 1
                row = {"latent": _read_npy(data)} | dict.fromkeys(texts)
            elif member.name.endswith(FLIPPED_MEMBERS):
                row["latent_flipped"] = _read_npy(data)
            elif member.name.endswith(SAMPLE_JSON):
                row |= json.loads(data)
            elif (name := member.name[len(row["key"]) + 1 :]) in texts:
                row[name] = data if name in binary else data.decode()
        expected = json.loads(tar.pax_headers.get(WEBDATASET_RECORD, "{}")).get("rows")
    if row:
        yield row
    if expected is not None and count != expected:  # a group of samples has no record
        raise tarfile.ReadError(f"it has {count} samples, but its record counts {expected}")


def _read_npy(data: bytes) -> bytes:
    """Return the values of an array, in C order."""
    with _npy_lock:
        return bytes(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).tobytes())


def count_record_bytes(data: bytes, name: str) -> int:
    """Return how many bytes `read_record_json` needs: from the end of a Parquet file, or from the start of a tar.

    data: the last bytes of the Parquet file, or the first ones of the tar, at least 512. Returns 0 if the file has no
    record. name: the file's, whose suffix names the container.
    """
    if name.endswith(PARQUET_SUFFIX):
        return int.from_bytes(data[-8:-4], "little") + 8 if data[-4:] == b"PAR1" else 0
    size = re.fullmatch(rb"[0-7]+", data[124:135]) if data[156:157] == tarfile.XGLTYPE else None
    return 512 + int(size[0], 8) + FIRST_HEADERS if size else 0


def count_rows(folder: CacheFolder, file: str) -> int:
    """Return the number of rows of a part's file, from its record. Raises CacheError if it has none."""
    with folder.open(file) as stream:
        is_tar = file.endswith(WEBDATASET_SUFFIX)
        size = stream.seek(0, 2)
        stream.seek(0 if is_tar else max(0, size - 512))
        data = stream.read(512)
        needed = min(count_record_bytes(data, file), size)
        stream.seek(0 if is_tar else size - needed)
        record = parse_json_object(read_record_json(stream.read(needed), folder.url_of(file)), folder.url_of(file))
    return int(record["rows"])


def read_record_json(data: bytes, name: str) -> bytes:
    """Return the record inside a part's bytes, as JSON. name: the file's, whose suffix names the container.

    data: the whole file, or the bytes of it that `count_record_bytes` names.
    Raises CacheError, which names the file, if the file has no record or another suffix.
    """
    if not name.endswith((PARQUET_SUFFIX, WEBDATASET_SUFFIX)):
        raise CacheError(f"{name} is not a part of a latentmill cache")
    try:
        if name.endswith(PARQUET_SUFFIX):
            metadata = pq.read_metadata(io.BytesIO(data)).metadata or {}
            return bytes(metadata[PARQUET_RECORD])
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return tar.pax_headers[WEBDATASET_RECORD].encode()
    except (pa.ArrowException, tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{name} is not a part of a latentmill cache: it has no readable record") from error
