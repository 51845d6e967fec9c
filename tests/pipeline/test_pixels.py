import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import REASONS, Rejected
from pipeline.pixels import Limits, open_pixels
from tests.conftest import encoded, smooth


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def reason(data: bytes, limits: Limits = Limits()) -> str:
    with pytest.raises(Rejected) as caught:
        open_pixels(data, limits)
    assert caught.value.stage == "open"
    template = re.escape(REASONS[caught.value.reason]).replace(r"\{\}", r"\d+")
    assert re.fullmatch(template, caught.value.detail), "a detail is a sentence of ours, with numbers at most"
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_kinds_come_as_they_are(kind: str) -> None:
    pixels = smooth(1, 30, 40)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(open_pixels(encoded(pixels, kind, **options)), pixels)


def test_jpeg_comes_close() -> None:
    pixels = smooth(2, 48, 64)
    assert np.abs(open_pixels(encoded(pixels, quality=95)).astype(int) - pixels).mean() < 3


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_the_orientation_is_applied(orientation: int, expected: Any) -> None:
    pixels = smooth(3, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(open_pixels(encoded(pixels, "PNG", exif=exif)), expected(pixels))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(mode: str) -> None:
    image = Image.new(mode, (3, 1), "black")
    image.putalpha(Image.frombytes("L", (3, 1), bytes([0, 128, 255])))
    assert open_pixels(saved(image, "PNG"))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_a_transparent_palette_colour_is_white_and_others_are_themselves() -> None:
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert open_pixels(saved(image, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert open_pixels(saved(image, "PNG", transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_a_transparent_colour_of_rgb_is_white() -> None:
    image = Image.frombytes("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6]))
    assert open_pixels(saved(image, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_16_bit_grey_is_divided_by_257() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65534, 65535]], np.uint16)
    opened = open_pixels(saved(Image.fromarray(values), "PNG"))
    assert opened[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert opened.shape == (1, 7, 3)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_kinds_follow_pillow(mode: str) -> None:
    image = Image.fromarray(smooth(4, 16, 16)).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = saved(image, kind)
    assert np.array_equal(open_pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_what_is_no_picture_is_rejected_by_name() -> None:
    jpeg = encoded(smooth(5))
    assert reason(b"") == "empty"
    assert reason(b"not a picture") == "not_a_picture"
    assert reason(jpeg, Limits(bytes=10)) == "too_many_bytes"
    assert reason(jpeg, Limits(pixels=1000)) == "too_many_pixels"
    assert reason(jpeg, Limits(side=100)) == "too_many_pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_picture_that_is_cut_off_is_rejected(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    assert reason(data[: int(len(data) * share)]) in ("corrupt", "not_a_picture")


def test_a_bomb_is_rejected_before_it_is_decompressed() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    assert reason(bomb) == "too_many_pixels"


def test_damaged_bytes_give_an_array_or_a_reject_and_nothing_else() -> None:
    draw = np.random.default_rng(0)
    whole = [encoded(smooth(6, 40, 40), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    rejected = 0
    for turn in range(400):
        data = bytearray(whole[turn % len(whole)])
        for place in draw.integers(0, len(data), 1 + turn % 5):
            data[place] = draw.integers(256)
        try:
            assert open_pixels(bytes(data)).dtype == np.uint8
        except Rejected:
            rejected += 1
    assert rejected > 50
