"""The reader of Arrow IPC files, in the stream and the file format, with damage, bombs and random bytes."""

import io
import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import DamagedError, NoImagesError, ShardError
from pipeline.limits import Limits
from pipeline.readers.arrow import read_arrow, read_available_columns
from pipeline.readers.skipped import NO_IMAGES
from pipeline.records import Reject, Sample
from tests.pipeline.readers.test_parquet import outcome

ROWS = 40
TABLE = pa.table(
    {
        "image": [{"bytes": b"image %d" % n, "path": None} for n in range(ROWS)],
        "text": [f"text {n}" for n in range(ROWS)],
        "word": pa.array([f"w{n % 3}" for n in range(ROWS)]).dictionary_encode(),
        "id": [f"id.{n}" for n in range(ROWS)],
    }
)
WANTED = pa.schema([("text", pa.string()), ("word", pa.string())])
FORMATS = pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])


def write(make: Any, table: pa.Table = TABLE, rows: int = 17, **options: Any) -> bytes:
    sink = io.BytesIO()
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


def read(
    data: bytes, image: str | None = None, key: str | None = None, limits: Limits | None = None
) -> list[Sample | Reject]:
    return list(read_arrow(io.BytesIO(data), "d.arrow", image, key, WANTED, limits or Limits()))


@FORMATS
def test_rows_are_samples(make: Any) -> None:
    items = read(write(make))
    assert [outcome(item) for item in items] == [(n, str(n), b"image %d" % n) for n in range(ROWS)]
    assert isinstance(items[5], Sample)
    assert items[5].columns == {"text": "text 5", "word": "w2"}
    assert [item.key for item in read(write(make), key="id")][:2] == ["id%2E0", "id%2E1"]


@FORMATS
def test_the_available_columns_of_a_file(make: Any) -> None:
    schema = read_available_columns(io.BytesIO(write(make)), "d.arrow", None)
    assert schema == pa.schema([*WANTED, ("id", pa.string())])


def test_rows_without_an_embedded_image_are_rejected() -> None:
    image = [{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"2", "path": "2.jpg"}]
    table = pa.table({"image": pa.array(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})
    reasons = [outcome(item)[2] for item in read(write(pa.ipc.new_stream, table))]
    assert reasons == ["image_not_embedded", "no_image", b"2"]


def test_a_file_without_images_is_skipped() -> None:
    """An index of shuffled rows, for example."""
    data, skipped = write(pa.ipc.new_stream, pa.table({"indices": pa.array([1, 0], pa.uint64())})), Counter[str]()
    assert list(read_arrow(io.BytesIO(data), "d.arrow", None, None, WANTED, skipped=skipped)) == []
    assert skipped == {NO_IMAGES: 1}
    with pytest.raises(NoImagesError, match=r"d\.arrow has no column with the bytes of images: it has indices"):
        read_available_columns(io.BytesIO(data), "d.arrow", None)


@FORMATS
def test_rows_before_the_end_of_a_truncated_file_are_read(make: Any) -> None:
    data = write(make)
    found = set()
    end = data.rindex(b"\xff\xff\xff\xff\0\0\0\0")
    for cut in range(end + 4, 8, -111):
        items = []
        with pytest.raises(DamagedError, match=f"is truncated at byte {cut}") as error:
            for item in read_arrow(io.BytesIO(data[:cut]), "d.arrow", None, None, WANTED):
                items.append(item)
        assert error.value.at == cut
        found.add(len(items))
    assert {0, 17, 34} <= found


def test_other_data_after_the_end_is_damage() -> None:
    data = write(pa.ipc.new_stream)
    for more in (data, b"\0"):
        with pytest.raises(DamagedError, match=f"other data follows its end mark at byte {len(data)}"):
            read(data + more)
    with pytest.raises(DamagedError, match="other data follows its end mark"):
        read(write(pa.ipc.new_file)[:-1])
    for other in (b"", b"PAR1" * 10, b"ARROW1\0\0"):
        with pytest.raises(DamagedError):
            read(other)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_batches_are_refused_before_they_are_decompressed(codec: str) -> None:
    with pytest.raises(ShardError, match=r"d\.arrow is compressed: write it without compression"):
        read(write(pa.ipc.new_stream, compression=codec))


class MostRead(io.BytesIO):
    """A file that records its largest read."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.most = max(self.most, len(data))
        return data


def test_a_batch_above_the_limit_is_not_read() -> None:
    table = pa.table({"image": [bytes(1 << 20)] * 4})
    stream = MostRead(write(pa.ipc.new_stream, table, rows=4))
    with pytest.raises(ShardError, match="batch_bytes=N"):
        list(read_arrow(stream, "d.arrow", None, None, WANTED, Limits(batch_bytes=1 << 20)))
    assert stream.most < 10_000
    assert len(read(write(pa.ipc.new_stream, table, rows=1), limits=Limits(batch_bytes=2 << 20))) == 4


def test_text_that_is_not_utf8_is_damage_of_its_batch() -> None:
    data = write(pa.ipc.new_stream).replace(b"text 30", b"text \xff0")
    items = []
    with pytest.raises(DamagedError, match=r"cannot be read as Arrow: .*UTF"):
        for item in read_arrow(io.BytesIO(data), "d.arrow", None, None, WANTED):
            items.append(item)
    assert len(items) == 17


@FORMATS
def test_random_damage_is_an_error_or_gives_other_values(make: Any) -> None:
    """Arrow does not check offsets by itself: a wrong one would read foreign memory."""
    data, draw, outcomes = write(make), random.Random(1), Counter[str]()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 4, 30))):
            place = draw.randrange(len(data))
            damaged[place] = draw.choice((0, 255, 127, draw.randrange(256)))
        try:
            items = read(bytes(damaged))
            outcomes["read"] += 1
            assert [item.position for item in items] == list(range(len(items)))
        except ShardError:
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 30
