"""From bytes to pixels: the rule for each kind of image, and the rejects."""

import io
import logging
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from pipeline.errors import REASONS, Rejected
from pipeline.images import decode, formats
from pipeline.images.decode import open_pixels
from pipeline.limits import Limits
from tests.conftest import encoded, smooth

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
ORIENTATION = 0x0112
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def save_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def noise(height: int = 48, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def make_png(
    size: tuple[int, int], depth: int, colour: int, rows: list[bytes], extra: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """Return a PNG. size: width and height. rows: packed values, one item per row. extra: chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    between = b"".join(chunk(name, data) for name, data in extra)
    return b"\x89PNG\r\n\x1a\n" + header + between + body + chunk(b"IEND", b"")


def make_rgb_png(pixels: np.ndarray, *extra: tuple[bytes, bytes]) -> bytes:
    height, width = pixels.shape[:2]
    return make_png((width, height), 8, RGB, [row.tobytes() for row in pixels], extra)


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    """Return the JPEG with an APPn segment inserted at its start."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def make_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Return the payload of an EXIF segment. Each entry: tag, type, count and the four bytes of the value."""
    table = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4)


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def expect_reject(data: bytes, limits: Limits = Limits()) -> Rejected:
    with pytest.raises(Rejected) as caught:
        open_pixels(data, limits)
    reject = caught.value
    assert reject.stage == "open"
    assert_own_message(reject)
    return reject


def assert_own_message(reject: Rejected) -> None:
    """Check that the detail is a message of latentmill with numbers: no text of a library, no address, no path."""
    template = re.escape(REASONS[reject.reason]).replace(r"\{\}", r"[\w .-]+")
    assert re.fullmatch(f"{template}(: they are a page of HTML)?", reject.detail)


# Pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_keep_their_pixels(kind: str) -> None:
    pixels = noise()
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_pixels(encoded(pixels, kind, **options))
    assert opened.dtype == np.uint8
    assert np.array_equal(opened, pixels)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_keep_their_pixels_approximately(kind: str) -> None:
    pixels = smooth(2, 48, 64)
    assert np.abs(open_pixels(encoded(pixels, kind, quality=95)).astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_orientation_is_applied(kind: str, options: dict[str, Any], orientation: int) -> None:
    pixels = noise(20, 30)
    data = encoded(pixels, kind, exif=orientation_exif(orientation), **options)
    assert np.array_equal(open_pixels(data), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_of_a_jpeg_is_applied(orientation: int) -> None:
    pixels = smooth(3, 16, 48)
    plain = open_pixels(encoded(pixels))
    turned = open_pixels(encoded(pixels, exif=orientation_exif(orientation)))
    assert np.array_equal(turned, UPRIGHT[orientation](plain))


def test_the_orientation_of_16_bit_grey_is_applied() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 2570
    opened = open_pixels(save_image(Image.fromarray(values), "PNG", exif=orientation_exif(6)))
    assert opened[:, :, 0].tolist() == [[30, 0], [40, 10], [50, 20]]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_changes_nothing(orientation: int) -> None:
    pixels = noise(20, 30)
    assert np.array_equal(open_pixels(encoded(pixels, "PNG", exif=orientation_exif(orientation))), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_over_white(mode: str, kind: str) -> None:
    image = Image.new(mode, (3, 1), "black")
    image.putalpha(Image.frombytes("L", (3, 1), bytes([0, 128, 255])))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert open_pixels(save_image(image, kind, **options))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_every_alpha_is_composited_over_white() -> None:
    values = np.random.default_rng(1).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    alpha = values[:, :, 3:] / 255
    expected = values[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(open_pixels(save_image(Image.fromarray(values), "PNG")) - expected).max() <= 1


def test_a_palette_with_alphas_is_composited_over_white() -> None:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 0, 0, 0, 40, 50, 60])
    assert open_pixels(save_image(image, "PNG"))[0].tolist() == [[10, 20, 30], [0] * 3, [40, 50, 60]]
    opened = open_pixels(save_image(image, "PNG", transparency=bytes([0, 128, 255])))
    assert opened[0].tolist() == [[255] * 3, [127] * 3, [40, 50, 60]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(kind: str) -> None:
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert open_pixels(save_image(image, kind, transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_a_transparent_colour_of_rgb_is_white() -> None:
    data = make_png((2, 1), 8, RGB, [bytes([1, 2, 3, 4, 5, 6])], ((b"tRNS", struct.pack(">HHH", 1, 2, 3)),))
    assert open_pixels(data)[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_a_transparent_grey_is_white() -> None:
    data = make_png((3, 1), 8, GREY, [bytes([1, 2, 3])], ((b"tRNS", struct.pack(">H", 2)),))
    assert open_pixels(data)[0].tolist() == [[1] * 3, [255] * 3, [3] * 3]


def test_16_bit_grey_is_divided_by_257_and_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    opened = open_pixels(save_image(Image.fromarray(values), "PNG"))
    assert opened.shape == (256, 256, 3)
    assert np.array_equal(opened, np.repeat(np.rint(values / 257)[:, :, None], 3, axis=2))


def test_16_bit_rgb_keeps_its_high_byte() -> None:
    row = struct.pack(">6H", 0, 255, 256, 0x12FF, 0xFE80, 0xFFFF)
    assert open_pixels(make_png((2, 1), 16, RGB, [row]))[0].tolist() == [[0, 0, 1], [0x12, 0xFE, 0xFF]]


@pytest.mark.parametrize(("depth", "steps"), [(1, 1), (2, 3), (4, 15), (8, 255)])
def test_grey_of_every_depth_goes_from_black_to_white(depth: int, steps: int) -> None:
    per_byte = 8 // depth
    values = [0, steps] * (per_byte // 2 or 1)
    packed = 0
    for value in values:
        packed = packed << depth | value
    row = packed.to_bytes(len(values) * depth // 8, "big")
    assert open_pixels(make_png((len(values), 1), depth, GREY, [row]))[0, :2].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_equal_pillow(mode: str) -> None:
    image = Image.fromarray(smooth(4, 16, 16)).convert(mode)
    data = save_image(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    assert np.array_equal(open_pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_cmyk_jpeg_keeps_its_colours_approximately() -> None:
    pixels = smooth(5, 32, 32)
    opened = open_pixels(save_image(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(opened.astype(int) - pixels).mean() < 6


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("PNG", {"default_image": False}), ("WEBP", {"lossless": True})]
)
def test_the_first_frame_of_an_animation_is_used(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = save_image(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (open_pixels(data) == [255, 0, 0]).all()


# Rejects


def test_bytes_that_are_not_an_image_are_rejected() -> None:
    assert expect_reject(b"").reason == "empty"
    assert expect_reject(b"not an image").reason == "not_an_image"
    assert expect_reject(b"\0" * 10_000).reason == "not_an_image"


def test_limits_are_inclusive() -> None:
    data = encoded(smooth(5, 30, 40), "PNG")
    assert open_pixels(data, Limits(image_bytes=len(data), pixels=1200, side=40)).shape == (30, 40, 3)
    reject = expect_reject(data, Limits(image_bytes=len(data) - 1))
    assert reject.detail == f"the image has {len(data)} bytes, but the limit is {len(data) - 1}"
    reject = expect_reject(data, Limits(pixels=1199, side=50))
    assert reject.detail == "the image has 40 x 30 pixels, but the limit is 1199 in total and 50 per side"
    assert expect_reject(data, Limits(side=39)).reason == "too_many_pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_size_is_checked_before_an_image_is_decompressed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the image was decompressed")

    data = encoded(smooth(5), kind)
    for owner in (ImageFile.ImageFile, type(Image.open(io.BytesIO(data)))):
        monkeypatch.setattr(owner, "load", refuse)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    assert expect_reject(data, Limits(pixels=1000)).reason == "too_many_pixels"


@pytest.mark.parametrize("size", [(60_000, 60_000), (100_000, 1), (1, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_with_too_many_pixels_is_rejected(size: tuple[int, int]) -> None:
    assert expect_reject(make_png(size, 8, RGB, [bytes(300)])).reason == "too_many_pixels"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
    ],
)
def test_a_truncated_image_never_gives_other_pixels(kind: str, options: dict[str, Any]) -> None:
    data = encoded(noise(24, 24), kind, **options)
    whole = open_pixels(data)
    for length in range(1, len(data), 11):
        try:
            opened = open_pixels(data[:length])
        except Rejected as reject:
            assert reject.reason in ("corrupt", "not_an_image")
            assert_own_message(reject)
        else:
            assert np.array_equal(opened, whole), f"{length} of {len(data)} bytes gave another image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
def test_an_image_without_its_end_is_corrupt(kind: str, share: float) -> None:
    data = encoded(noise(64, 64), kind)
    assert expect_reject(data[: int(len(data) * share)]).reason == "corrupt"


@pytest.mark.parametrize("mode", ["I", "F"])
def test_unsupported_pixel_modes_are_rejected(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # No supported format has these modes. A later Pillow may read 16-bit grey as "I" again, as an earlier one did.
    monkeypatch.setattr(Image, "open", lambda *_, **__: Image.new(mode, (2, 2)))
    assert expect_reject(b"anything").reason == "unsupported_mode"


def test_a_lack_of_memory_is_not_a_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(MemoryError):
        open_pixels(encoded(smooth(5), "BMP"))


# Warnings of Pillow and damaged metadata

NEGATIVE_WIDTH = (0x0100, 6, 1, b"\xff\0\0\0")
TURNED = (ORIENTATION, 3, 1, struct.pack("<HH", 6, 0))
MALFORMED_MPO = b"MPF\0II*\0\x08\0\0\0\0\0"


def test_warnings_of_pillow_are_hidden_and_reject_nothing(tmp_path: Path) -> None:
    """A separate process is used, because pytest changes the warning filters."""
    damaged = {
        "whole": encoded(noise()),
        "invalid APNG": make_rgb_png(noise(), (b"acTL", bytes(8))),
        "malformed MPO": with_segment(encoded(noise()), 0xE2, MALFORMED_MPO),
        "cut EXIF": with_segment(encoded(noise()), 0xE1, make_exif()[:-6]),
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    script = (
        "import pathlib, sys; from pipeline.images.decode import open_pixels\n"
        "for f in sorted(pathlib.Path(sys.argv[1]).glob('*')): print(f.name, open_pixels(f.read_bytes()).shape)"
    )
    command = [sys.executable, "-W", "always", "-c", script, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines() == [f"{name} (48, 40, 3)" for name in sorted(damaged)]
    assert process.stderr == ""


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        pytest.param(make_rgb_png(noise(), (b"eXIf", b"garbage!")), noise(), id="PNG, no EXIF in eXIf"),
        pytest.param(
            with_segment(encoded(noise()), 0xE1, make_exif(NEGATIVE_WIDTH, TURNED)),
            np.rot90(open_pixels(encoded(noise())), -1),
            id="JPEG, turned, with a width of -1",
        ),
    ],
)
def test_damaged_metadata_does_not_change_the_pixels(damaged: bytes, expected: np.ndarray) -> None:
    assert np.array_equal(open_pixels(damaged), expected)


@pytest.mark.parametrize(
    ("name", "before"),
    [(b"iCCP", b"p\0\0"), (b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")],
    ids=["iCCP", "zTXt", "iTXt"],
)
def test_texts_and_profiles_of_a_png_have_a_size_limit(name: bytes, before: bytes) -> None:
    pixels = noise()

    def image(size: int, times: int = 1) -> bytes:
        return make_rgb_png(pixels, *[(name, before + zlib.compress(bytes(size), 1))] * times)

    assert np.array_equal(open_pixels(image(3 << 20)), pixels)
    assert expect_reject(image((64 << 20) + 1)).reason == "corrupt"
    if name != b"iCCP":  # the last profile counts, but the sizes of texts are added up
        assert expect_reject(image(33 << 20, times=2)).reason == "corrupt"


def test_threads_that_open_images_at_once_keep_the_warning_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth(5), "BMP")
    second_in, first_out = threading.Event(), threading.Event()
    entered: list[str] = []

    def load_interleaved(image: ImageFile.ImageFile) -> None:
        """Let the first thread wait for the second, and the second wait until the first has finished."""
        entered.append("thread")
        if len(entered) == 1:
            second_in.wait(0.5)
        else:
            second_in.set()
            first_out.wait(0.5)
        raise OSError

    def attempt(_: int) -> None:
        with pytest.raises(Rejected):
            open_pixels(data)
        first_out.set()

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_interleaved)
    before = list(warnings.filters)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, range(2)))
        assert warnings.filters == before


# Random damage


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    """Return the bytes with a few of them changed, removed, doubled or cut off."""
    changed = bytearray(data)
    start = int(draw.integers(len(data)))
    length = int(draw.integers(1, 20))
    match draw.integers(5):
        case 0:
            del changed[start : start + length]
        case 1:
            changed[start:start] = changed[start : start + length]
        case 2:
            del changed[start:]
        case _:
            for place in draw.integers(0, len(data), length // 4 + 1):
                changed[place] = draw.integers(256)
    return bytes(changed)


def test_damaged_bytes_give_an_array_or_a_reject() -> None:
    draw = np.random.default_rng(0)
    exif = orientation_exif(6)
    exif[0x010F] = "a camera"
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    whole = [encoded(smooth(6, 20, 24), kind, **({} if kind in ("GIF", "BMP") else {"exif": exif})) for kind in kinds]
    whole.append(save_image(Image.fromarray(smooth(7, 20, 24)).quantize(16), "PNG", transparency=3))
    arrays, reasons = 0, set()
    for number in range(500):
        try:
            array = open_pixels(mutate(whole[number % len(whole)], draw), Limits(pixels=1_000_000))
        except Rejected as reject:
            assert_own_message(reject)
            reasons.add(reject.reason)
        else:
            arrays += 1
            assert array.dtype == np.uint8
            assert array.ndim == 3
            assert array.shape[2] == 3
            assert array.size > 0
    assert arrays > 50
    assert reasons == {"empty", "corrupt", "not_an_image", "too_many_pixels"}


def test_an_error_of_our_own_is_no_damage_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a mistake")

    for name in ("_is_plain_jpeg", "_read_orientation"):
        with monkeypatch.context() as patch:
            patch.setattr(decode, name, fail)
            with pytest.raises(TypeError, match="a mistake"):
                open_pixels(encoded(noise(), "JPEG"))
    monkeypatch.setattr(formats, "_check_icon", fail)
    with pytest.raises(TypeError, match="a mistake"):
        open_pixels(encoded(noise(), "PNG"))


def test_the_cause_of_a_corrupt_image_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(noise(), "PNG")
    with caplog.at_level(logging.DEBUG, "pipeline"), pytest.raises(Rejected, match="corrupt"):
        open_pixels(data[: len(data) // 2])
    assert "image file is truncated" in caplog.text
