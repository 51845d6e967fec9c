"""Thousands of damaged images and shards: each is opened or rejected, and every sample is accounted for.

A case depends only on its number. A failure names the case, and `make_case(...)` makes it again.
"""

import io
import random
import tarfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import Rejected, ShardError
from pipeline.images.decode import open_pixels
from pipeline.limits import Limits
from pipeline.readers.parquet import read_parquet
from pipeline.readers.tar import read_tar
from pipeline.records import Reject, Sample
from tests.conftest import encoded, img2dataset_members, smooth
from tests.pipeline.readers.test_tar import tar

SECONDS = 5  # the limit for one case
LIMITS = Limits(pixels=1_000_000)
BATCH = 500
TEXTS = pa.schema([("txt", pa.string())])


def images() -> list[bytes]:
    """Return a small image of each supported kind."""
    rgb = smooth(1, 24, 32)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.fromarray(smooth(seed, 24, 32)) for seed in (1, 2)]
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    others = [
        (Image.fromarray(rgb).convert("P"), "PNG", {}),
        (Image.fromarray(rgb).convert("LA"), "PNG", {}),
        (Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257), "PNG", {}),
        (Image.fromarray(rgb).convert("CMYK"), "JPEG", {}),
        (Image.fromarray(rgb), "JPEG", {"exif": turned, "progressive": True}),
    ]
    made = [encoded(rgb, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")] + [sink.getvalue()]
    for image, kind, options in others:
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        made.append(sink.getvalue())
    return made


def tars() -> list[bytes]:
    """Return shards of four samples in the three tar formats, two of them with long names."""
    members = img2dataset_members(0, 4, height=16, width=16)
    long = {f"{'folder/' * 20}{name}": data for name, data in members.items()}
    made = []
    for form, content in ((tarfile.USTAR_FORMAT, members), (tarfile.GNU_FORMAT, long), (tarfile.PAX_FORMAT, long)):
        data = tar(content, form).rstrip(b"\0")  # the last member is a text
        made.append(data + bytes(-len(data) % 512 + 1024))
    return made


def parquets() -> list[bytes]:
    """Return files of twelve rows in three row groups.

    They have plain bytes or Hugging Face's struct, with and without checksums. Two files have more columns, other
    encodings and small pages.
    """
    jpegs = [encoded(smooth(seed, 16, 16)) for seed in range(12)]
    plain = pa.table({"key": [f"k{n}" for n in range(12)], "jpg": jpegs})
    struct = pa.table({"key": plain["key"], "image": [{"bytes": jpeg, "path": None} for jpeg in jpegs]})
    made = []
    for table, checksums in ((plain, True), (struct, True), (plain, False), (struct, False)):
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=4, write_page_checksum=checksums)
        made.append(sink.getvalue())
    texts = pa.array([None if n % 5 == 0 else f"caption {n % 3}" for n in range(12)]).dictionary_encode()
    rich = plain.append_column("txt", texts).append_column("tags", pa.array([["x"] * (n % 3) for n in range(12)]))
    for compression, pages in (("zstd", "1.0"), ("snappy", "2.0")):
        sink = io.BytesIO()
        options = {"row_group_size": 4, "data_page_size": 256, "compression": compression, "data_page_version": pages}
        pq.write_table(rich, sink, **options)
        made.append(sink.getvalue())
    return made


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def overwrite(data: bytearray, draw: random.Random) -> None:
    place, count = draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 64))
    filler = draw.choice((b"\0", b"\xff", b"\x7f", b"0", draw.randbytes(1)))
    data[place : place + count] = (filler * count)[: len(data) - place]


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def remove(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    del data[place : place + draw.choice((1, 7, 100, 512))]


def insert(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    data[place:place] = draw.randbytes(draw.choice((1, 7, 100, 512)))


def repeat(data: bytearray, draw: random.Random) -> None:
    start, count = draw.randrange(len(data)), draw.choice((8, 100, 512, 1024))
    data[start:start] = data[start : start + count]


def swap(data: bytearray, draw: random.Random) -> None:
    size = draw.choice((4, 64, 512))
    first, second = (draw.randrange(max(1, len(data) - size)) for _ in range(2))
    data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, overwrite, cut, remove, insert, repeat, swap)


def make_case(whole: list[bytes], number: int) -> tuple[str, bytes]:
    """Return a description and a damaged file: one or two mutations, or halves of two files."""
    draw = random.Random(number)
    data = bytearray(whole[number % len(whole)])
    if draw.random() < 0.05:
        other = draw.choice(whole)
        return f"case {number}: spliced", bytes(data[: len(data) // 2] + other[len(other) // 2 :])
    names = []
    for _ in range(draw.choice((1, 1, 2))):
        if data:
            mutation = draw.choice(MUTATIONS)
            names.append(mutation.__name__)
            mutation(data, draw)
    return f"case {number}: {' and '.join(names)}", bytes(data)


def make_cases(whole: list[bytes], batch: int) -> Iterator[tuple[str, bytes]]:
    """Yield a batch of cases. Each of them must end in time."""
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        description, data = make_case(whole, number)
        start = time.monotonic()
        yield description, data
        assert time.monotonic() - start < SECONDS, description


def read_all(description: str, read: Callable[[], Iterator[Sample | Reject]]) -> tuple[list[Sample | Reject], bool]:
    """Return the items of a reader, and whether it reached the end. Check their positions, and that keys are unique."""
    items: list[Sample | Reject] = []
    whole = True
    try:
        for item in read():
            items.append(item)
    except ShardError:
        whole = False
    except Exception as error:
        raise AssertionError(f"{description}: {type(error).__name__}: {error}") from error
    assert [item.position for item in items] == list(range(len(items))), description
    keys = [item.key for item in items if isinstance(item, Sample)]
    assert len(keys) == len(set(keys)), description
    return items, whole


@pytest.mark.parametrize("batch", range(12))
def test_damaged_images_are_opened_or_rejected(batch: int) -> None:
    whole = images()
    opened = 0
    for description, data in make_cases(whole, batch):
        try:
            array = open_pixels(data, LIMITS)
        except Rejected as reject:
            assert reject.stage == "open", description
        except Exception as error:
            raise AssertionError(f"{description}: {type(error).__name__}: {error}") from error
        else:
            opened += 1
            assert array.dtype == np.uint8, description
            assert array.ndim == 3, description
            assert array.shape[2] == 3, description
            assert array.shape[0] * array.shape[1] <= LIMITS.pixels, description
    assert 20 < opened < BATCH - 20, "some can be opened, some cannot"


@pytest.mark.parametrize("batch", range(6))
def test_every_sample_of_a_damaged_tar_is_accounted_for(batch: int) -> None:
    whole = tars()
    ended = 0
    for description, data in make_cases(whole, batch):
        _, end = read_all(description, lambda data=data: read_tar(io.BytesIO(data), "s.tar"))  # type: ignore[misc]
        ended += end
    assert 20 < ended < BATCH - 20


def test_a_tar_that_is_truncated_anywhere_is_an_error() -> None:
    for whole in tars():
        for length in range(0, len(whole) - 1, 37):
            _, end = read_all(f"cut at {length}", lambda: read_tar(io.BytesIO(whole[:length]), "s.tar"))  # noqa: B023
            assert not end, length


@pytest.mark.parametrize("batch", range(4))
def test_every_row_of_a_damaged_parquet_file_is_accounted_for(batch: int) -> None:
    """The ranges have as many rows as the footer gives, or there is an error. (A changed value cannot be detected.)"""
    whole = parquets()
    ended = 0
    for description, data in make_cases(whole, batch):
        found, ends = 0, True
        for part in ((0, 2), (1, 2)):

            def read(data: bytes = data, part: tuple[int, int] = part) -> Iterator[Sample | Reject]:
                return read_parquet(io.BytesIO(data), "s.parquet", len(data), part, None, None, TEXTS)

            items, end = read_all(description, read)
            found, ends = found + len(items), ends and end
        if ends:
            assert found == pq.read_metadata(io.BytesIO(data)).num_rows, description
            ended += 1
    assert 20 < ended < BATCH - 20


@pytest.mark.parametrize("number", [50_280, 54_047, 57_196])
def test_damage_that_fuzzing_found(number: int) -> None:
    """Footers whose statistics abort pyarrow 26.0.1, with two row counts, and with rows beyond the end of the file."""
    description, data = make_case(parquets()[:4], number)
    schema = pa.schema([])
    _, end = read_all(description, lambda: read_parquet(io.BytesIO(data), "p", len(data), (0, 1), None, None, schema))
    assert not end
    assert len(list(read_parquet(io.BytesIO(parquets()[0]), "p", len(data), (0, 1), None, None, schema))) == 12


def test_undamaged_files_are_read_completely() -> None:
    assert all(open_pixels(data).shape in ((24, 32, 3), (32, 24, 3)) for data in images())
    for data in tars():
        assert len(list(read_tar(io.BytesIO(data), "s.tar"))) == 4
    for data in parquets():
        parts = ((0, 2), (1, 2))
        read = (read_parquet(io.BytesIO(data), "p", len(data), part, None, None, pa.schema([])) for part in parts)
        assert sum(len(list(items)) for items in read) == 12
