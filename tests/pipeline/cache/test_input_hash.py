"""The `inputs` of a record, compared with a second implementation of docs/cache-format.md."""

import dataclasses
import datetime
import decimal
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import parts
from pipeline.cache.input_hash import encode_value
from pipeline.flow import UnitWorker
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import CPU, unit_of

MakeWorker = Callable[..., UnitWorker]


def digest(*fields: bytes) -> bytes:
    return hashlib.sha256(b"".join(len(field).to_bytes(8, "big") + field for field in fields)).digest()


def sample(position: int, key: str, image: bytes, columns: Mapping[str, bytes]) -> bytes:
    named = [part for name in sorted(columns) for part in (name.encode(), columns[name])]
    return digest(b"sample", b"%d" % position, key.encode(), image, *named)


def reject(position: int, reason: str) -> bytes:
    return digest(b"reject", b"%d" % position, reason.encode())


def combine(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def records(cache: Path) -> list[PartRecord]:
    folder = Folder(str(cache))
    inspected = [parts.inspect_part(folder, name, "the identity") for name in parts.list_part_files(folder)]
    return sorted((part.record for part in inspected if part), key=lambda record: record.stem)


def hash_tar(
    members: Mapping[str, bytes], first: int, count: int, texts: tuple[str, ...] = ("txt", "json")
) -> list[bytes]:
    return [
        sample(n, f"{n:09d}", members[f"{n:09d}.jpg"], {name: members[f"{n:09d}.{name}"] for name in texts})
        for n in range(first, first + count)
    ]


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_hash_follows_the_documentation(worker: MakeWorker, tmp_path: Path, container: Any, threads: int) -> None:
    members = img2dataset_members(0, 6, height=64, width=64)
    members["000000002.jpg"] = b"no image"  # read, and rejected when it is opened
    members["000000003.jpg"] = img2dataset_members(3, 1, height=64, width=200)["000000003.jpg"]  # another bucket
    members["000000005.txt"] = b"\xff"  # rejected when it is read
    layout = OutputSchema(container=container)
    transform = Transform(resolution=64, buckets=((64, 64), (64, 192)), multiple_of=64)
    encoder = worker(tmp_path / "c", layout=layout, open_workers=threads, transform=transform)
    encoder.run(unit_of(write_tar(tmp_path / "s/0.tar", members)))
    assert [record.inputs for record in records(tmp_path / "c")] == [
        combine([*hash_tar(members, 0, 2), reject(2, "not_an_image"), *hash_tar(members, 3, 1)]),
        combine([*hash_tar(members, 4, 1), reject(5, "bad_text")]),
    ]


def test_filtered_samples_count_and_an_empty_part_has_inputs(worker: MakeWorker, tmp_path: Path) -> None:
    members = img2dataset_members(0, 3, height=64, width=64)
    encoder = worker(tmp_path / "c", transform=Transform(resolution=64, min_size=100))
    assert encoder.run(unit_of(write_tar(tmp_path / "s/0.tar", members))).filtered == {"min_size": 3}
    encoder.run(unit_of(write_tar(tmp_path / "t/1.tar", {})))
    assert [record.inputs for record in records(tmp_path / "c")] == [combine(hash_tar(members, 0, 3)), combine([])]


def test_columns_that_are_not_passed_through_do_not_count(worker: MakeWorker, tmp_path: Path) -> None:
    layout = OutputSchema(columns=PassthroughColumns(pa.schema([("txt", pa.string())]), ("txt",)))
    members = img2dataset_members(0, 3, height=64, width=64)
    worker(tmp_path / "a", layout=layout).run(unit_of(write_tar(tmp_path / "a/0.tar", members)))
    other = {name: b"{}" if name.endswith("json") else data for name, data in members.items()} | {"000000002.cls": b"7"}
    worker(tmp_path / "b", layout=layout).run(unit_of(write_tar(tmp_path / "b/0.tar", other)))
    (a,), (b,) = records(tmp_path / "a"), records(tmp_path / "b")
    assert a.inputs == b.inputs == combine(hash_tar(members, 0, 3, ("txt",)))


@pytest.mark.parametrize("limit", ["image_bytes", "text_bytes"])
def test_a_sample_beyond_a_limit_counts_as_its_reject(worker: MakeWorker, tmp_path: Path, limit: str) -> None:
    members = img2dataset_members(0, 3, height=64, width=64)
    members["000000001.jpg" if limit == "image_bytes" else "000000001.txt"] *= 100
    limits = Limits(**{limit: 10_000 if limit == "image_bytes" else 100})
    worker(tmp_path / "c", limits=limits).run(unit_of(write_tar(tmp_path / "s/0.tar", members)))
    (record,) = records(tmp_path / "c")
    reason = {"image_bytes": "too_many_bytes", "text_bytes": "text_too_long"}[limit]
    assert record.inputs == combine([*hash_tar(members, 0, 1), reject(1, reason), *hash_tar(members, 2, 1)])


def test_the_encoding_of_column_values(worker: MakeWorker, tmp_path: Path) -> None:
    jpegs = [data for name, data in img2dataset_members(0, 3, height=64, width=64).items() if name.endswith("jpg")]
    times = pa.array([datetime.datetime(2024, 2, 29, 1, 2, 3)] * 3, pa.timestamp("us", "Europe/Paris"))
    columns = {
        "text": (["a\n\u00e9", "", None], [b"a\n\xc3\xa9", b"", None]),
        "whole": ([7, -1, None], [b"7", b"-1", None]),
        "real": ([0.1, float("nan"), None], [b"0.1", b"null", None]),
        "truth": ([True, False, None], [b"true", b"false", None]),
        "raw": (pa.array([b"\0\1", b"", None], pa.binary()), [b"AAE=", b"", None]),
        "tags": ([["b", "a"], [], None], [b'["b","a"]', b"[]", None]),
        "nested": (
            [{"z": 1, "a": None}, {"z": 2, "a": "\u00e9"}, None],
            [b'{"a":null,"z":1}', b'{"a":"\xc3\xa9","z":2}', None],
        ),
        "price": ([decimal.Decimal("1.50"), decimal.Decimal("2.00"), None], [b"1.50", b"2.00", None]),
        "day": ([datetime.date(2024, 2, 29), datetime.date(1, 1, 1), None], [b"2024-02-29", b"0001-01-01", None]),
        "time": (times, [b"2024-02-29 01:02:03.000000Z"] * 3),
        "half": (pa.array([1.5, 2.0, None], pa.float16()), [b"1.5", b"2.0", None]),
    }
    table = pa.table({"jpg": jpegs} | {name: values for name, (values, _) in columns.items()})
    (tmp_path / "s").mkdir()
    pq.write_table(table, tmp_path / "s/0.parquet")
    # a column that this file lacks is null in the rows, and does not count either
    schema = pa.schema([*table.schema.remove(0), pa.field("lacking", pa.string())])
    layout = OutputSchema(columns=PassthroughColumns(schema, ()))
    worker(tmp_path / "c", layout=layout).run(unit_of(tmp_path / "s/0.parquet"))
    (record,) = records(tmp_path / "c")
    expected = []
    for n in range(3):
        values = {name: encoded[n] for name, (_, encoded) in columns.items()}
        present = {name: value for name, value in values.items() if value is not None}
        expected.append(sample(n, str(n), jpegs[n], present))
    assert record.inputs == combine(expected)


def test_every_json_value_has_an_encoding() -> None:
    """The bytes are those in latent.json, but a string has no quotes."""
    for value in ({"a": [1, None, "\u2028"]}, [["k", 1.5]], 12, 1e300, -0.0, True):
        assert (
            encode_value(value) == json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        )
    assert encode_value(None) is None
    assert encode_value("null") == b"null" == encode_value(float("inf"))


@pytest.mark.slow
def test_batch_size_and_interruptions_do_not_change_the_hash(worker: MakeWorker, tmp_path: Path) -> None:
    unit = unit_of(write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 10, height=64, width=64)))
    worker(tmp_path / "a").run(unit)
    worker(tmp_path / "b", compute=dataclasses.replace(CPU, batch_size=6), open_workers=3).run(unit)
    for lost in (f"data/{unit.name}-00001.parquet", f"_commits/{unit.name}.json"):
        (tmp_path / "b" / lost).unlink()
    worker(tmp_path / "b").run(unit)
    assert [record.inputs for record in records(tmp_path / "a")] == [
        record.inputs for record in records(tmp_path / "b")
    ]
