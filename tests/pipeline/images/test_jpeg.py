"""JPEGs are decompressed by simplejpeg, or by Pillow. Pixels and rejects must be those of Pillow, for every file.

These tests fail if a later version of simplejpeg or Pillow decodes a JPEG differently than the other.
"""

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.errors import Rejected
from pipeline.images import decode
from pipeline.images.decode import JpegHeader, open_pixels, read_jpeg_header
from pipeline.limits import DEFAULT_LIMITS, Limits
from tests.conftest import encoded, smooth

BASELINE, EXTENDED, PROGRESSIVE, LOSSLESS, ARITHMETIC = 0xC0, 0xC1, 0xC2, 0xC3, 0xC9  # frames
END = b"\xff\xd9"
Outcome = tuple[Any, ...]


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function that opens an image with Pillow alone."""

    def open_image(data: bytes, limits: Limits = DEFAULT_LIMITS, reduction: int = 1) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_HAS_TURBO", False)
            patch.setattr(simplejpeg, "decode_jpeg", None)
            return describe(data, limits, reduction)

    return open_image


@pytest.fixture
def decompressed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows by an item per call of simplejpeg: whether it returned pixels."""
    calls: list[bool] = []
    original = simplejpeg.decode_jpeg

    def decode_and_record(*arguments: Any, **options: Any) -> np.ndarray:
        calls.append(False)
        pixels: np.ndarray = original(*arguments, **options)
        calls[-1] = True
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_and_record)
    return calls


def describe(data: bytes, limits: Limits = DEFAULT_LIMITS, reduction: int = 1) -> Outcome:
    """Return an image's size and pixels, or its reject."""
    try:
        pixels = open_pixels(data, limits, reduction)
    except Rejected as reject:
        return reject.stage, reject.reason, reject.facts
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    return pixels.shape, pixels.tobytes()


def textured(seed: int, height: int, width: int) -> np.ndarray:
    """Return an image with smooth colors and noise, RGB uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(-40, 41, (height, width, 3))
    return (smooth(seed, height, width) + noise).clip(0, 255).astype(np.uint8)


def subsampled(pixels: np.ndarray, subsampling: str) -> bytes:
    """Return a JPEG of simplejpeg, which knows more kinds of subsampling than Pillow."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, colorsubsampling=subsampling))


def converted(pixels: np.ndarray, mode: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, "JPEG", **options)
    return sink.getvalue()


def find_segment(jpeg: bytes, *markers: int) -> int:
    """Return the offset of the first segment with one of these markers."""
    at = 2
    while jpeg[at + 1] not in markers:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return at


def find_frame(jpeg: bytes) -> int:
    return find_segment(jpeg, *range(BASELINE, ARITHMETIC + 1)[:4])


def with_bytes(jpeg: bytes, at: int, new: bytes) -> bytes:
    return jpeg[:at] + new + jpeg[at + len(new) :]


def with_frame(jpeg: bytes, marker: int) -> bytes:
    return with_bytes(jpeg, find_frame(jpeg) + 1, bytes([marker]))


def with_precision(jpeg: bytes, bits: int) -> bytes:
    return with_bytes(jpeg, find_frame(jpeg) + 4, bytes([bits]))


def with_size(jpeg: bytes, height: int, width: int) -> bytes:
    return with_bytes(jpeg, find_frame(jpeg) + 5, struct.pack(">HH", height, width))


def with_inserted(jpeg: bytes, new: bytes) -> bytes:
    """Return the JPEG with bytes before its frame header."""
    at = find_frame(jpeg)
    return jpeg[:at] + new + jpeg[at:]


def with_adobe_transform(jpeg: bytes, transform: int) -> bytes:
    return with_bytes(jpeg, find_segment(jpeg, 0xEE) + 15, bytes([transform]))


def without_last_scans(jpeg: bytes, count: int) -> bytes:
    """Return a progressive JPEG without its last scans. It is valid: libjpeg smooths the blocks."""
    for _ in range(count):
        jpeg = jpeg[: jpeg.rindex(b"\xff\xda")]
    return jpeg + END


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def make_mpo(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    first, second = Image.fromarray(pixels), Image.fromarray(pixels[::-1])
    first.save(sink, "MPO", save_all=True, append_images=[second])
    return sink.getvalue()


def plain_jpegs(pixels: np.ndarray) -> dict[str, bytes]:
    """Return JPEGs that simplejpeg decompresses."""
    jpeg, progressive = encoded(pixels), encoded(pixels, progressive=True)
    return {
        **{f"subsampling {name}": subsampled(pixels, name) for name in ("444", "422", "420", "440", "411")},
        **{f"subsampling {name}, Pillow": encoded(pixels, subsampling=name) for name in (0, 1, 2)},
        **{f"quality {quality}": encoded(pixels, quality=quality) for quality in (1, 30, 100)},
        **{f"orientation {value}": encoded(pixels, exif=orientation(value)) for value in range(1, 9)},
        "progressive": progressive,
        "progressive, 4:4:4": encoded(pixels, progressive=True, subsampling=0),
        **{f"{count} scans less": without_last_scans(progressive, count) for count in (1, 3, 5, 8)},
        "optimized": encoded(pixels, optimize=True),
        "grey": converted(pixels, "L"),
        "grey, progressive": converted(pixels, "L", progressive=True),
        "RGB": encoded(pixels, keep_rgb=True),
        "RGB, progressive": encoded(pixels, keep_rgb=True, progressive=True),
        "restart markers by block": encoded(pixels, restart_marker_blocks=2),
        "restart markers by row": encoded(pixels, restart_marker_rows=1, progressive=True),
        "extended": with_frame(jpeg, EXTENDED),
        "comment": with_inserted(jpeg, b"\xff\xfe\x00\x07hello"),
        "ICC profile": encoded(pixels, icc_profile=bytes(100_000)),
        "bytes after the end": jpeg + b"\xff\xd8garbage" * 20,
        "two images": jpeg + progressive,
        "MPO": make_mpo(pixels),
    }


def other_jpegs(pixels: np.ndarray) -> dict[str, bytes]:
    """Return JPEGs that Pillow decompresses or rejects."""
    jpeg, cmyk = encoded(pixels), converted(pixels, "CMYK")
    height, width = pixels.shape[:2]
    return {
        "CMYK": cmyk,
        "CMYK, progressive": converted(pixels, "CMYK", progressive=True),
        "YCCK": with_adobe_transform(cmyk, 2),
        "no end": jpeg.removesuffix(END),
        "arithmetic coding": with_frame(jpeg, ARITHMETIC),
        "lossless": with_frame(jpeg, LOSSLESS),
        "baseline as progressive": with_frame(jpeg, PROGRESSIVE),
        "12 bits": with_precision(jpeg, 12),
        "taller": with_size(jpeg, height + 64, width),
        "wider": with_size(jpeg, height, width + 64),
        "no height": with_size(jpeg, 0, width),
        "fill bytes": with_inserted(jpeg, b"\xff\xff\xff"),
        "junk between segments": with_inserted(jpeg, b"junk"),
        "restart marker in the header": with_inserted(jpeg, b"\xff\xd0"),
        "second frame": with_inserted(jpeg, jpeg[find_frame(jpeg) :][: 2 + 17]),
        "JFIF 2": with_bytes(jpeg, find_segment(jpeg, 0xE0) + 9, b"\x02"),
        "only a header": jpeg[: find_segment(jpeg, 0xDA)] + END,
    }


def unreported_damage(pixels: np.ndarray) -> dict[str, bytes]:
    """Return damaged JPEGs for which libjpeg has a warning or not, depending on the size."""
    jpeg = encoded(pixels)
    height, width = pixels.shape[:2]
    return {
        "lower": with_size(jpeg, height // 2, width),
        "narrower": with_size(jpeg, height, width // 2),
        "junk before the end": jpeg.removesuffix(END) + b"junk" + END,
        "a bit more": jpeg.removesuffix(END) + b"\x80" + END,
    }


SIZES = [(1, 1), (1, 40), (7, 9), (8, 8), (16, 17), (33, 31), (48, 64)]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_plain_jpegs_equal_pillow(
    size: tuple[int, int], by_pillow: Callable[..., Outcome], decompressed: list[bool]
) -> None:
    for name, data in plain_jpegs(textured(1, *size)).items():
        decompressed.clear()
        assert describe(data) == by_pillow(data), name
        assert decompressed == [True], f"{name}: not decompressed by simplejpeg"


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_rejects_of_other_and_damaged_jpegs_equal_pillow(
    size: tuple[int, int], by_pillow: Callable[..., Outcome], decompressed: list[bool]
) -> None:
    for name, data in other_jpegs(textured(2, *size)).items():
        decompressed.clear()
        assert describe(data) == by_pillow(data), name
        assert decompressed in ([], [False]), f"{name}: decompressed by simplejpeg"
    for name, data in unreported_damage(textured(2, *size)).items():
        assert describe(data) == by_pillow(data), name


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 8}])
def test_jpegs_of_more_than_a_block_equal_pillow(
    options: dict[str, Any], by_pillow: Callable[..., Outcome], decompressed: list[bool]
) -> None:
    """Pillow reads files in blocks of 64 KiB. Here, the end, the middle and a block's limit are damaged, too."""
    data = encoded(textured(3, 400, 501), quality=97, **options)
    assert len(data) > 2 << 16
    assert describe(data) == by_pillow(data)
    assert decompressed == [True]
    for cut in (1 << 16, (1 << 16) + 1, 100_000, len(data) - 1000, len(data) - 3):
        assert describe(data[:cut]) == by_pillow(data[:cut]), cut
        damaged = with_bytes(data, cut, b"\xff\x31\x00\x00"[: len(data) - cut])
        assert describe(damaged) == by_pillow(damaged), cut


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield copies of a file: one to four bytes changed, or bytes removed, repeated or inserted."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(int(draw.integers(1, 5))):
            at, length = int(draw.integers(2, len(mutated) - 1)), int(draw.integers(1, 12))
            kind = int(draw.integers(8))
            if kind < 4:
                mutated[at] = int(draw.choice([0, 0xFF, 0xD9, *draw.integers(0, 256, 3)]))
            elif kind < 5:
                mutated[at] ^= 1 << int(draw.integers(8))
            elif kind < 6:
                del mutated[at : at + length]
            elif kind < 7:
                mutated[at:at] = mutated[at : at + length]
            else:
                mutated[at:at] = draw.bytes(length)
        yield bytes(mutated)


FUZZED = ("subsampling 420", "subsampling 440", "progressive", "grey", "RGB", "restart markers by block", "MPO")


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_jpegs_equal_pillow(
    name: str, by_pillow: Callable[..., Outcome], decompressed: list[bool], count: int = 150
) -> None:
    data = plain_jpegs(textured(4, 33, 47))[name]
    limits = Limits(pixels=1 << 20)  # a damaged header may announce any size
    outcomes = set()
    for damaged in mutations(data, count, seed=FUZZED.index(name)):
        outcome = describe(damaged, limits)
        assert outcome == by_pillow(damaged, limits), damaged.hex()
        outcomes.add(outcome[:2] if outcome[0] == "open" else "pixels")
    assert outcomes >= {"pixels", ("open", "corrupt")}
    assert {True, False} <= set(decompressed), "some damage is no damage for simplejpeg, and some is"


@pytest.mark.parametrize("name", ["subsampling 420", "progressive", "restart markers by block", "grey"])
def test_truncated_jpegs_equal_pillow(name: str, by_pillow: Callable[..., Outcome]) -> None:
    data = plain_jpegs(textured(5, 24, 40))[name]
    for length in range(1, len(data), 7):
        assert describe(data[:length]) == by_pillow(data[:length]), length
        ended = data[:length] + END
        assert describe(ended) == by_pillow(ended), length


def test_pillow_with_another_libjpeg_decompresses_all_jpegs(
    monkeypatch: pytest.MonkeyPatch, decompressed: list[bool]
) -> None:
    monkeypatch.setattr(decode, "_HAS_TURBO", False)
    assert open_pixels(encoded(smooth(6))).shape == (96, 128, 3)
    assert decompressed == []


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, OverflowError])
def test_pillow_decides_after_any_error_of_simplejpeg(
    error: type[Exception], by_pillow: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    data = encoded(textured(14, 30, 50))
    expected = by_pillow(data)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    assert describe(data) == expected


def test_a_lack_of_memory_in_simplejpeg_is_not_a_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", exhausted)
    with pytest.raises(MemoryError):
        open_pixels(encoded(smooth(7)))


# Decoding at a reduced size


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("size", [(48, 64), (65, 79), (123, 40)])
def test_reduced_pixels_equal_pillows_draft(
    size: tuple[int, int], reduction: int, by_pillow: Callable[..., Outcome], decompressed: list[bool]
) -> None:
    for name, data in plain_jpegs(textured(8, *size)).items():
        decompressed.clear()
        pixels = open_pixels(data, DEFAULT_LIMITS, reduction)
        header = read_jpeg_header(data)
        assert header is not None and {header.height, header.width} == set(size), name
        assert pixels.shape == (-(-header.height // reduction), -(-header.width // reduction), 3), name
        assert describe(data, DEFAULT_LIMITS, reduction) == by_pillow(data, DEFAULT_LIMITS, reduction), name
        assert decompressed == [True, True], name


@pytest.mark.parametrize("size", [(33, 47), (64, 48)])
def test_other_jpegs_are_not_reduced_and_damaged_ones_equal_pillow(
    size: tuple[int, int], by_pillow: Callable[..., Outcome]
) -> None:
    whole = {**other_jpegs(textured(9, *size)), **unreported_damage(textured(9, *size))}
    for name, data in whole.items():
        reduced = describe(data, DEFAULT_LIMITS, 4)
        assert reduced == by_pillow(data, DEFAULT_LIMITS, 4), name
        if read_jpeg_header(data) is None:
            assert reduced == describe(data), name
    assert read_jpeg_header(whole["CMYK"]) is None
    assert read_jpeg_header(whole["lossless"]) is None
    assert read_jpeg_header(whole["no end"]) == JpegHeader(*size, is_turned=False)


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_jpegs_that_are_reduced_equal_pillow(name: str, by_pillow: Callable[..., Outcome]) -> None:
    data, limits = plain_jpegs(textured(10, 40, 61))[name], Limits(pixels=1 << 20)
    for number, damaged in enumerate(mutations(data, 60, seed=100 + FUZZED.index(name))):
        reduction = (2, 4, 8)[number % 3]
        outcome = describe(damaged, limits, reduction)
        assert outcome == by_pillow(damaged, limits, reduction), damaged.hex()
        if outcome[0] != "open" and (header := read_jpeg_header(damaged)):
            assert outcome[0] == (-(-header.height // reduction), -(-header.width // reduction), 3)


def test_the_limits_apply_to_the_size_before_the_reduction() -> None:
    data = encoded(textured(11, 60, 80))
    for limits in (Limits(pixels=4799), Limits(side=79), Limits(image_bytes=len(data) - 1)):
        assert describe(data, limits, 8) == describe(data, limits)
    assert describe(data, Limits(pixels=4800, side=80), 8)[0] == (8, 10, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_have_no_jpeg_header_and_are_not_reduced(kind: str) -> None:
    data = encoded(smooth(12), kind)
    assert read_jpeg_header(data) is None
    assert open_pixels(data, DEFAULT_LIMITS, 4).shape == (96, 128, 3)


@pytest.mark.parametrize("value", range(10))
def test_the_header_is_that_of_the_upright_image(value: int) -> None:
    header = read_jpeg_header(encoded(textured(13, 30, 50), exif=orientation(value)))
    assert header == JpegHeader(*((50, 30) if 5 <= value <= 8 else (30, 50)), is_turned=2 <= value <= 8)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"no image", encoded(smooth(1))[:100]])
def test_bytes_without_a_whole_header_have_no_jpeg_header(data: bytes) -> None:
    assert read_jpeg_header(data) is None
