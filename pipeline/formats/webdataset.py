"""Rows to the bytes of one WebDataset shard, its record in front as the PAX global header `LATENTMILL.record`.

A sample is `<key>.latent.npy` (or `<key>.moments.npy`), `<key>.latent.json` with what else is known of it, and the
texts that came with the image. Equal rows and records give equal bytes: members have no time and no owner.
"""

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from pipeline.canonical_json import canonical_json
from pipeline.errors import CacheError
from pipeline.formats.record import Record
from pipeline.formats.schema import OutputSchema
from pipeline.records import TEXT_EXTENSIONS, Row
from pipeline.values import to_json_value

# numpy parses headers by `ast`, which Python 3.11 cannot always do in two threads at once (SystemError, gh-106905)
_one_parser = threading.Lock()
SUFFIX = ".tar"
RECORD_KEY = "LATENTMILL.record"
INFO = ".latent.json"


def schema_as_json(layout: OutputSchema) -> list[dict[str, str]]:
    """The members of a sample as cache.json names them."""
    texts = [{"name": name, "type": "text"} for name in layout.columns.texts]
    return [{"name": f"{_array(layout)}.npy", "type": "npy"}, {"name": "latent.json", "type": "json"}, *texts]


def _array(layout: OutputSchema) -> str:
    return "moments" if layout.store == "moments" else "latent"


def serialize_part(rows: Sequence[Row], record: Record, layout: OutputSchema) -> bytes:
    """The file of a part. rows: at least one, by bucket and then position; not bfloat16, which numpy does not know."""
    sink = io.BytesIO()
    headers = {RECORD_KEY: record.to_json().decode()}
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for row in rows:
            for name, data in _members(row, record.source, layout):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def _members(row: Row, shard: str, layout: OutputSchema) -> Iterator[tuple[str, bytes]]:
    image, latent = row.image, row.latent.contiguous().numpy()
    array = io.BytesIO()
    np.lib.format.write_array(array, latent, version=(1, 0), allow_pickle=False)
    info = {
        "key": image.key,
        "shard": shard,
        "shape": list(latent.shape),
        "dtype": str(latent.dtype),
        **image.geometry,
    }
    texts = layout.columns.texts
    info |= {name: to_json_value(image.columns.get(name)) for name in layout.columns.schema.names if name not in texts}
    yield f"{image.key}.{_array(layout)}.npy", array.getvalue()
    yield image.key + INFO, canonical_json(info)
    for name in texts:
        if (text := image.columns.get(name)) is not None:
            yield f"{image.key}.{name}", text.encode()


def read_record(data: bytes, name: str) -> Record:
    """The record inside a part's bytes. Raises CacheError, which names the file, where there is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return Record.from_json(tar.pax_headers[RECORD_KEY].encode())
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{name} is not a part of a latentmill cache: it has no readable record") from error


def read_rows(
    stream: BinaryIO, wanted: Sequence[int] | None = None, texts: Sequence[str] = TEXT_EXTENSIONS
) -> Iterator[dict[str, Any]]:
    """The rows of a part as dicts, in order: all, or those at the `wanted` indexes; as a Parquet part has them."""
    indexes = None if wanted is None else set(wanted)
    for index, row in enumerate(_all_rows(stream, texts)):
        if indexes is None or index in indexes:
            yield row


def _all_rows(stream: BinaryIO, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {}
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            data = file.read() if file else b""
            if member.name.endswith((".latent.npy", ".moments.npy")):  # the first member of a sample
                if row:
                    yield row
                with _one_parser:
                    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
                row = {"latent": array.tobytes()} | dict.fromkeys(texts)
            elif member.name.endswith(INFO):
                row |= json.loads(data)
            else:
                row[member.name[len(row["key"]) + 1 :]] = data.decode()
    if row:
        yield row
