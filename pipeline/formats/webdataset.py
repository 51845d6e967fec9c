"""Serialize rows as a WebDataset shard. The record is at its start, as the PAX global header `LATENTMILL.record`.

A sample is `<key>.latent.npy` (or `<key>.moments.npy`), with `--flip both` also `<key>.latent_flipped.npy`,
`<key>.latent.json` with its other columns, and the texts of the image. Equal rows and records give equal bytes, because
members have no time and no owner.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from latentmill.group_spans import GroupSpan, Readable, SampleSpan, group_samples, list_tar_groups
from latentmill.part_files import SAMPLE_JSON, WEBDATASET_RECORD, WEBDATASET_SUFFIX
from pipeline.buffers import FileBuffer
from pipeline.canonical_json import canonical_json
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema
from pipeline.records import Row
from pipeline.values import to_json_value

SUFFIX = WEBDATASET_SUFFIX


def describe_schema(layout: OutputSchema) -> list[dict[str, str]]:
    """Return the members of a sample as cache.json names them."""
    binary = layout.columns.binary
    texts = [{"name": name, "type": "bytes" if name in binary else "text"} for name in layout.columns.texts]
    arrays = [{"name": name, "type": "npy"} for name in _get_array_names(layout)]
    return [*arrays, {"name": "latent.json", "type": "json"}, *texts]


def _get_array_names(layout: OutputSchema) -> list[str]:
    name = "moments" if layout.store == "moments" else "latent"
    return [f"{name}.npy", f"{name}_flipped.npy"] if layout.has_flipped else [f"{name}.npy"]


def serialize_part(
    rows: Iterable[Row], record: PartRecord, layout: OutputSchema
) -> tuple[memoryview, Sequence[GroupSpan]]:
    """Return the content of a part's file, and its groups. A row is dropped once it is written.

    rows: at least one, sorted by bucket, then by position. bfloat16 is not possible, because numpy does not support it.
    """
    sink, samples, arrays = FileBuffer(), list[SampleSpan](), len(_get_array_names(layout))
    headers = {WEBDATASET_RECORD: record.to_json().decode()}
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for row in rows:
            start, sizes = sink.tell(), list[int]()
            for name, data in _make_members(row, layout):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                sizes.append(len(data))
            samples.append(SampleSpan(start, sink.tell(), row.image.bucket, row.latent_bytes, sum(sizes[arrays:])))
    return sink.view(), group_samples(samples)


def read_groups(edge: bytes, file: Readable) -> Sequence[GroupSpan]:
    """Return the groups of a part. edge: is not used. file: at the start of the part; it is read to its end.

    Raises tarfile.TarError, OSError, ValueError, LookupError or TypeError if the tar is damaged.
    """
    return list_tar_groups(file)


def _make_members(row: Row, layout: OutputSchema) -> Iterator[tuple[str, bytes]]:
    image, arrays = row.image, [latent.contiguous().numpy() for latent in row.latents]
    info = {
        "key": image.key,
        "shard": image.shard,
        "shape": list(arrays[0].shape),
        "dtype": str(arrays[0].dtype),
        **image.geometry,
    }
    texts = layout.columns.texts
    info |= {name: to_json_value(image.columns.get(name)) for name in layout.columns.schema.names if name not in texts}
    for name, array in zip(_get_array_names(layout), arrays, strict=True):
        yield f"{image.key}.{name}", _to_npy(array)
    yield image.key + SAMPLE_JSON, canonical_json(info)
    for name in texts:
        if (value := image.columns.get(name)) is not None:
            yield f"{image.key}.{name}", value if isinstance(value, bytes) else value.encode()


def _to_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()
