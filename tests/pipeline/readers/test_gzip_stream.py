"""Tars that are compressed with gzip: samples, damage at an exact byte, and archives that expand too far."""

import gzip
import io
import random
import zlib
from collections.abc import Iterator

import pytest

from pipeline.errors import DamagedError
from pipeline.limits import Limits
from pipeline.readers import gzip_stream
from pipeline.readers.gzip_stream import open_gzip
from pipeline.readers.tar import read_tar
from pipeline.records import Reject, Sample
from tests.conftest import img2dataset_members
from tests.pipeline.readers.test_tar import outcome, tar

MEMBERS = img2dataset_members(0, 6, height=64, width=64)
TAR = tar(MEMBERS)
GZIP = gzip.compress(TAR, mtime=0)


def read(data: bytes) -> list[Sample | Reject]:
    return list(read_tar(io.BytesIO(data), "s.tar.gz"))


def read_content(data: bytes, limits: Limits | None = None) -> bytes:
    with open_gzip(io.BytesIO(data), "s.tar.gz", limits or Limits()) as stream:
        return b"".join(iter(lambda: stream.read(1000), b""))


def find_damage(data: bytes) -> tuple[int, int | None, str]:
    """Return the number of samples before the damage, its byte, and the message."""
    samples = 0
    try:
        for _ in read_tar(io.BytesIO(data), "s.tar.gz"):
            samples += 1
    except DamagedError as error:
        return samples, error.at, str(error)
    raise AssertionError("there is no damage")


def test_samples_equal_those_of_the_plain_tar() -> None:
    plain = [(outcome(item), item.columns) for item in read(TAR) if isinstance(item, Sample)]
    for data in (GZIP, gzip.compress(TAR, 1), gzip.compress(TAR[:3000]) + gzip.compress(TAR[3000:]), GZIP + bytes(700)):
        assert [(outcome(item), item.columns) for item in read(data) if isinstance(item, Sample)] == plain
    assert len(plain) == 6


def test_a_small_gzip_file_is_read() -> None:
    data = gzip.compress(tar({"0.jpg": bytes(5000)}))
    assert len(data) < 512
    assert [outcome(item) for item in read(data)] == [(0, "0", bytes(5000))]


@pytest.mark.parametrize("cut", [1, 8, 9, 3000, len(GZIP) - 12])
def test_samples_before_the_end_of_a_truncated_file_are_read(cut: int) -> None:
    samples, at, message = find_damage(GZIP[:-cut])
    expected = zlib.decompressobj(31).decompress(GZIP[:-cut])
    assert at == len(expected)
    assert f"ends within its compressed data, after byte {at} of its content" in message
    whole = [n for n in range(6) if TAR.index(MEMBERS[f"{n:09}.json"]) + 512 <= len(expected)]
    assert samples in (len(whole), len(whole) - 1), "the last sample may need the header that follows it"


def test_a_checksum_that_does_not_match_is_damage_at_the_end() -> None:
    damaged = bytearray(GZIP)
    damaged[-5] ^= 1
    samples, at, message = find_damage(bytes(damaged))
    assert (samples, at) == (5, len(TAR) - 1), "the last sample is complete only at the end mark"
    assert "incorrect data check" in message


def test_the_byte_of_a_damage_does_not_depend_on_how_the_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for _ in range(12):
        damaged = bytearray(GZIP)
        damaged[draw.randrange(10, len(GZIP))] ^= 1 << draw.randrange(8)
        found = []
        for size in (64 << 10, 977):
            monkeypatch.setattr(gzip_stream, "INPUT_BYTES", size)
            monkeypatch.setattr(gzip_stream, "OUTPUT_BYTES", 4 * size)
            found.append(find_damage(bytes(damaged))[:2])
        assert found[0] == found[1]


def test_other_data_after_the_end_is_damage() -> None:
    assert find_damage(GZIP + b"more")[:2] == (5, len(TAR))


def test_other_content_is_not_a_tar() -> None:
    assert find_damage(gzip.compress(b"{}" * 1000))[0] == 0


class Zeros(io.RawIOBase):
    """A gzip file whose content is endless zeros."""

    def __init__(self) -> None:
        self.compress = zlib.compressobj(wbits=31)
        self.pieces = self.make()

    def make(self) -> Iterator[bytes]:
        pending = b""
        while True:
            pending += self.compress.compress(bytes(1 << 20))
            while len(pending) >= 64:
                yield pending[:64]
                pending = pending[64:]

    def read(self, size: int = -1) -> bytes:
        return next(self.pieces)


def test_a_file_that_expands_too_far_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip_stream, "FREE_BYTES", 1 << 20)
    stream = open_gzip(Zeros(), "s.tar.gz", Limits())
    with pytest.raises(DamagedError, match=r"more than 100 times .* --input-limit expansion=N accepts it") as error:
        while stream.read(1 << 20):
            pass
    assert 1 << 20 < (error.value.at or 0) < 4 << 20
    masks = gzip.compress(tar({f"{n}.bmp": bytes(1 << 20) for n in range(3)}))
    with pytest.raises(DamagedError):
        read_content(masks)
    assert len(read_content(masks, Limits(expansion=2000))) > 3 << 20


def test_an_image_above_the_limit_is_skipped_with_little_memory() -> None:
    data = gzip.compress(tar({"0.jpg": bytes(40 << 20), "1.jpg": b"1"}), 1)
    items = list(read_tar(io.BytesIO(data), "s.tar.gz", limits=Limits(image_bytes=1 << 20)))
    assert [outcome(item)[1:] for item in items] == [("0", "too_many_bytes"), ("1", b"1")]
