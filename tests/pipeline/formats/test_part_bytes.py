"""The bytes of a part: those of a plain writer, in whatever order the latents arrive."""

import hashlib
import io
import itertools
import random
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentmill import group_spans
from pipeline import buffers
from pipeline.cache import tally
from pipeline.cache.parts import PART_FORMATS
from pipeline.canonical_json import canonical_json
from pipeline.formats import parquet
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema
from pipeline.part_writer import PartBuffer, make_record
from pipeline.records import Container, EncodedImage, PreparedImage, Store, Unit

Encoded = Sequence[tuple[PreparedImage, EncodedImage]]
BUCKETS = [(64, 72), (128, 32), (64, 64)]
ROWS = 120
UNIT = Unit(name="unit", kind="tar", path="s/\u00fc.tar", bytes=5)


def make_image(position: int) -> PreparedImage:
    height, width = BUCKETS[position % 7 % 3]
    return PreparedImage(
        shard=UNIT.path,
        position=position,
        key=f"a/{position:05d}",
        columns={"txt": f"caption {position}" if position % 3 else None, "json": "{}" * (position % 5)},
        pixels=torch.zeros(height, width, 3, dtype=torch.uint8),
        original_height=100 + position,
        original_width=113,
        resized_height=100,
        resized_width=113,
        crop_top=0,
        crop_left=position % 4,
        enlarged=position % 2 == 0,
    )


def encode(image: PreparedImage, layout: OutputSchema, dtype: torch.dtype) -> EncodedImage:
    """Return random latents. Those of every third image are in the memory format channels_last."""
    channels = 8 if layout.store == "moments" else 4
    generator = torch.Generator().manual_seed(image.position)
    shape = (2, channels, image.bucket[0] // 8, image.bucket[1] // 8)
    latents = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    if image.position % 3 == 0:
        latents = latents.contiguous(memory_format=torch.channels_last)
    return EncodedImage(latents[0], image.position % 9 == 0, latents[1] if layout.has_flipped else None)


def fill_buffer(encoded: Encoded) -> PartBuffer:
    """Return a buffer to which several threads added the results, in any order."""
    buffer = PartBuffer(expected=len(encoded), is_read=True)
    shuffled = random.Random(0).sample(encoded, len(encoded))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: buffer.add_encoded(*pair), shuffled))
    for image, _ in encoded:
        buffer.digests[image.position] = bytes(32)
    buffer.sort()
    return buffer


def sort_plainly(encoded: Encoded) -> list[tuple[tuple[int, int], Encoded]]:
    by_bucket = sorted(encoded, key=lambda pair: (pair[0].bucket, pair[0].position))
    return [(b, list(pairs)) for b, pairs in itertools.groupby(by_bucket, key=lambda pair: pair[0].bucket)]


def latents_of(encoded: EncodedImage) -> list[torch.Tensor]:
    return [latent for latent in (encoded.latent, encoded.latent_flipped) if isinstance(latent, torch.Tensor)]


def to_bytes(latent: torch.Tensor) -> bytes:
    return latent.contiguous().view(torch.uint8).numpy().tobytes()


def tally_plainly(encoded: Encoded, store: Store) -> dict[str, Any]:
    """Return the statistics of each bucket as numpy computes them from one array per channel."""
    tallies = {}
    for (height, width), pairs in sort_plainly(encoded):
        values = torch.stack([latent for _, result in pairs for latent in latents_of(result)]).double()
        means, logvars = values.chunk(2, dim=1) if store == "moments" else (values, None)
        channels = [means[:, number].contiguous().numpy() for number in range(means.shape[1])]
        tallies[f"{height}x{width}"] = {
            "samples": len(pairs),
            "values": channels[0].size,
            "mean": [float(channel.mean()) for channel in channels],
            "m2": [float(((channel - float(channel.mean())) ** 2).sum()) for channel in channels],
            "min": [float(channel.min()) for channel in channels],
            "max": [float(channel.max()) for channel in channels],
        }
        if logvars is not None:
            variances = [logvars[:, number].contiguous().exp().numpy() for number in range(logvars.shape[1])]
            tallies[f"{height}x{width}"]["variance"] = [float(variance.mean()) for variance in variances]
    return tallies


def write_parquet_plainly(encoded: Encoded, record: PartRecord, layout: OutputSchema) -> bytes:
    """Return a Parquet part whose columns are made from lists of Python values, latents from `bytes`."""
    schema, file = parquet.make_schema(layout), io.BytesIO()
    names = ["latent", "latent_flipped"][: 1 + layout.has_flipped]
    others = ["shape.list.element" if name == "shape" else name for name in schema.names if name not in names]
    codecs = dict.fromkeys(others, "zstd") | dict.fromkeys(names, "none")
    with pq.ParquetWriter(
        file, schema, compression=codecs, use_dictionary=others, write_statistics=others, write_page_checksum=True
    ) as writer:
        for _, pairs in sort_plainly(encoded):
            size = sum(latent.nbytes for latent in latents_of(pairs[0][1]))
            rows = group_spans.GROUP_BYTES // size
            for start in range(0, len(pairs), rows):
                values = [make_row_plainly(image, result, record) for image, result in pairs[start : start + rows]]
                writer.write_table(pa.Table.from_pylist(values, schema), row_group_size=len(values))
        writer.add_key_value_metadata({"latentmill": record.to_json().decode()})
    return file.getvalue()


def make_row_plainly(image: PreparedImage, encoded: EncodedImage, record: PartRecord) -> dict[str, Any]:
    latents = latents_of(encoded)
    return {
        "key": image.key,
        "shard": record.source,
        **{name: to_bytes(latent) for name, latent in zip(("latent", "latent_flipped"), latents, strict=False)},
        "shape": list(latents[0].shape),
        "dtype": str(latents[0].dtype).removeprefix("torch."),
        **image.geometry,
        **image.columns,
    }


def write_tar_plainly(encoded: Encoded, record: PartRecord, layout: OutputSchema) -> bytes:
    """Return a tar part with numpy's own files of the latents."""
    file, name = io.BytesIO(), "moments" if layout.store == "moments" else "latent"
    with tarfile.open(
        fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"LATENTMILL.record": record.to_json().decode()}
    ) as tar:
        for _, pairs in sort_plainly(encoded):
            for image, result in pairs:
                row = make_row_plainly(image, result, record)
                texts = {text: row.pop(text) for text in ("txt", "json")}
                for latent, suffix in zip(latents_of(result), ("", "_flipped"), strict=False):
                    array = io.BytesIO()
                    np.save(array, latent.contiguous().numpy())
                    row.pop(f"latent{suffix}")
                    add_member(tar, f"{image.key}.{name}{suffix}.npy", array.getvalue())
                add_member(tar, f"{image.key}.latent.json", canonical_json(row))
                for text, value in texts.items():
                    if value is not None:
                        add_member(tar, f"{image.key}.{text}", value.encode())
    return file.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("container", "store", "dtype", "has_flipped"),
    [
        ("parquet", "mode", "float16", False),
        ("parquet", "moments", "float32", False),
        ("parquet", "moments", "bfloat16", True),
        ("webdataset", "mode", "float32", True),
        ("webdataset", "moments", "float16", False),
    ],
)
def test_a_part_has_the_bytes_of_a_plain_writer(
    container: Container, store: Store, dtype: str, has_flipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_spans, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(tally, "BLOCK", 2_000)
    monkeypatch.setattr(buffers, "CHUNK_BYTES", 6_000)
    monkeypatch.setattr(buffers, "FILE_BYTES", 30_000)
    layout = OutputSchema(container=container, store=store, has_flipped=has_flipped)
    encoded = [(image, encode(image, layout, getattr(torch, dtype))) for image in map(make_image, range(ROWS))]
    expected_tally = tally_plainly(encoded, store)
    spec: Any = SimpleNamespace(identity_sha256="i", rows_per_part=ROWS, layout=layout)
    buffer = fill_buffer(encoded)
    record = make_record(UNIT, 0, buffer, True, spec)
    assert {name: bucket.to_dict() for name, bucket in record.tally.items()} == expected_tally
    write = write_parquet_plainly if container == "parquet" else write_tar_plainly
    expected = write(encoded, record, layout)
    data, _ = PART_FORMATS[container].serialize_part(buffer.rows, record, layout)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (len(expected), hashlib.sha256(expected).hexdigest())
    if container == "parquet":
        assert pq.read_metadata(io.BytesIO(data)).num_row_groups > len(BUCKETS)
