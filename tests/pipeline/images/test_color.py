"""Colors of opened images: profiles, alpha, and modes that Pillow reads with another range."""

import contextlib
import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from pipeline.errors import Rejected
from pipeline.images import color
from pipeline.images.boxes import read_jp2_profile
from pipeline.images.decode import open_pixels, read_jpeg_header
from pipeline.images.decode_settings import DecodeSettings
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.limits import DEFAULT_LIMITS, Limits
from tests.conftest import encoded, smooth
from tests.pipeline.images.profiles import (
    CYAN,
    convert_lab_to_srgb,
    convert_p3_to_srgb,
    embed_in_jp2,
    encode_srgb,
    make_box,
    make_cmyk,
    make_gray,
    make_p3,
)
from tests.pipeline.images.test_decode import GREY, make_png
from tests.pipeline.images.test_formats import make_tiff

P3 = make_p3()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {},
}


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def open_with(data: bytes, limits: Limits = DEFAULT_LIMITS, reduction: int = 1, **settings: Any) -> np.ndarray:
    return open_pixels(data, limits, reduction, DecodeSettings(**settings))


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Profiles


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_wide_profile_is_ignored_or_converted(kind: str) -> None:
    pixels = smooth(1)
    data = encoded(pixels, kind, icc_profile=P3, **LOSSLESS[kind])
    assert np.array_equal(open_pixels(data), pixels)
    converted = open_with(data, color="srgb")
    assert distance(converted, convert_p3_to_srgb(pixels)) <= 2
    assert distance(converted, pixels) > 10


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_a_profile_of_a_lossy_format_is_converted(kind: str) -> None:
    data = encoded(smooth(1), kind, icc_profile=P3, quality=95)
    kept = open_pixels(data)
    assert distance(open_with(data, color="srgb"), convert_p3_to_srgb(kept)) <= 2


@pytest.mark.parametrize("method", [2, 3])
def test_a_profile_of_a_jpeg_2000_is_converted(method: int) -> None:
    pixels = smooth(1)
    data = embed_in_jp2(encoded(pixels, "JPEG2000"), P3, method)
    assert np.array_equal(open_pixels(data), pixels)
    assert distance(open_with(data, color="srgb"), convert_p3_to_srgb(pixels)) <= 2


def test_a_gray_profile_of_a_jpeg_2000_is_converted() -> None:
    values = np.repeat(np.arange(256, dtype=np.uint8)[None], 8, 0)
    data = embed_in_jp2(save(Image.fromarray(values), "JPEG2000"), make_gray(1.5))
    assert distance(open_with(data, color="srgb"), as_rgb(encode_srgb((values / 255) ** 1.5))) <= 2


@pytest.mark.parametrize("method", [0, 1, 4])
def test_a_colr_box_of_another_method_is_no_profile(method: int) -> None:
    data = embed_in_jp2(encoded(smooth(1), "JPEG2000"), P3, method)
    assert read_jp2_profile(data) is None
    assert np.array_equal(open_with(data, color="srgb"), smooth(1))


def test_only_the_first_colr_box_of_a_jpeg_2000_counts() -> None:
    plain = encoded(smooth(1), "JPEG2000")
    second = make_box(b"colr", b"\2\0\0" + make_p3(1.0))
    assert read_jp2_profile(embed_in_jp2(plain, P3, 2, second)) == P3
    assert read_jp2_profile(embed_in_jp2(plain, struct.pack(">I", 16), 1, second)) is None


def test_boxes_have_sizes_of_32_or_64_bits_or_reach_to_the_end() -> None:
    color = b"\2\0\0profile"
    long = make_box(b"ftyp", b"abc", is_long=True) + make_box(b"jp2h", make_box(b"colr", color, is_long=True))
    last = struct.pack(">I4s", 0, b"jp2h") + struct.pack(">I4s", 0, b"colr") + color
    assert [read_jp2_profile(data) for data in (long, last)] == [b"profile", b"profile"]
    for damaged in (struct.pack(">I4s", 7, b"ftyp"), struct.pack(">I4sQ", 1, b"ftyp", 15), long[:7]):
        assert read_jp2_profile(damaged + last) is None


@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_a_jpeg_2000_with_a_damaged_profile_or_box_is_converted_or_rejected(kind: str) -> None:
    draw = np.random.default_rng(0)
    profile = P3 if kind == "RGB" else make_gray(1.8)
    plain = save(Image.fromarray(smooth(3, 8, 8)).convert(kind), "JPEG2000")
    data = embed_in_jp2(plain, profile)
    end = data.index(b"jp2c")
    for number in range(200):
        changed = bytearray(data)
        for place in draw.integers(data.index(b"jp2h") - 4, end if number % 2 else data.index(b"colr") + 20, 2):
            changed[place] = draw.integers(256)
        with contextlib.suppress(Rejected):
            assert open_with(bytes(changed), Limits(pixels=10_000), color="srgb").ndim == 3
    for garbage in (b"garbage", profile[:100], P3 + bytes(color.MAX_PROFILE)):
        opened = open_with(embed_in_jp2(plain, garbage), color="srgb")
        assert np.array_equal(opened, open_pixels(plain))


def test_a_reduced_jpeg_is_converted() -> None:
    data = encoded(smooth(1), icc_profile=P3)
    kept = open_with(data, reduction=2)
    assert kept.shape == (48, 64, 3)
    assert distance(open_with(data, reduction=2, color="srgb"), convert_p3_to_srgb(kept)) <= 2


def test_the_sandbox_has_the_same_settings() -> None:
    data = encoded(smooth(1), "PNG", icc_profile=P3)
    settings = DecodeSettings(color="srgb", alpha="drop", exif="ignore", allow_truncated=True)
    with SandboxedDecoder(DEFAULT_LIMITS) as decoder:
        assert np.array_equal(
            decoder.open_pixels(data, DEFAULT_LIMITS, 1, settings), open_pixels(data, DEFAULT_LIMITS, 1, settings)
        )


@pytest.mark.parametrize("profile", [None, SRGB, b"", b"garbage" * 100, P3[:200], P3[:128] + bytes(500)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_profile_that_of_srgb_and_a_damaged_one_change_nothing(profile: bytes | None, kind: str) -> None:
    data = encoded(smooth(2), kind, icc_profile=profile)
    assert np.array_equal(open_with(data, color="srgb"), open_pixels(data))


def test_every_damaged_profile_is_ignored_or_converted() -> None:
    draw = np.random.default_rng(0)
    pixels = smooth(3, 8, 8)
    for profile in (P3, make_gray(1.8), make_cmyk()):
        for _ in range(15):
            changed = bytearray(profile)
            for place in draw.integers(0, len(profile), 4):
                changed[place] = draw.integers(256)
            for mode in ("RGB", "L", "CMYK"):
                image = Image.fromarray(pixels).convert(mode)
                image.info["icc_profile"] = bytes(changed)
                assert color.convert_to_rgb(image, DecodeSettings(color="srgb")).size == (8, 8)


def test_a_very_large_profile_is_ignored() -> None:
    data = encoded(smooth(1), "PNG", icc_profile=P3 + bytes(color.MAX_PROFILE))
    assert np.array_equal(open_with(data, color="srgb"), open_pixels(data))


def test_a_gray_profile_is_converted() -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    data = save(Image.fromarray(values), icc_profile=make_gray(1.5))
    expected = encode_srgb((values / 255) ** 1.5)
    assert distance(open_with(data, color="srgb"), np.repeat(expected[:, :, None], 3, 2)) <= 2
    jpeg = save(Image.fromarray(np.repeat(values, 8, 0)), "JPEG", icc_profile=make_gray(1.5), quality=100)
    assert distance(open_with(jpeg, color="srgb")[:, ::16], np.repeat(expected[:, ::16, None], 3, 2)) <= 8
    assert np.array_equal(open_with(encoded(smooth(1), "PNG", icc_profile=make_gray(1.5)), color="srgb"), smooth(1))


def test_a_gray_image_with_a_profile_of_rgb_is_converted_as_rgb() -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    data = save(Image.fromarray(values), icc_profile=make_p3(1.5))
    gray = np.repeat(values[:, :, None], 3, 2)
    assert distance(open_with(data, color="srgb"), convert_p3_to_srgb(gray, 1.5)) <= 2


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_a_cmyk_profile_is_converted(kind: str) -> None:
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, 8:16, 0], inks[:, 16:, 3] = 255, 255  # paper, cyan, black
    image = Image.frombytes("CMYK", (24, 8), inks.tobytes())
    options = {"quality": 100} if kind == "JPEG" else {}
    opened = open_with(save(image, kind, icc_profile=make_cmyk(), **options), color="srgb")
    expected = np.array([[255, 255, 255], convert_lab_to_srgb(CYAN), [0, 0, 0]])
    assert distance(opened[4, [4, 12, 20]], expected) <= 4
    assert distance(open_pixels(save(image, kind, **options))[4, [12]], np.array([[0, 255, 255]])) <= 2


def test_alpha_palettes_and_transparent_colors_keep_their_alpha_while_colors_are_converted() -> None:
    srgb = tuple(convert_p3_to_srgb(np.array([[200, 40, 90]]))[0].tolist())
    rgba = Image.new("RGBA", (2, 1), (200, 40, 90, 255))
    rgba.putpixel((0, 0), (200, 40, 90, 0))
    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([0, 0, 0, 200, 40, 90])
    colored = Image.new("RGB", (2, 1), (200, 40, 90))
    colored.putpixel((0, 0), (1, 2, 3))
    files = [
        save(rgba, icc_profile=P3),
        save(palette, icc_profile=P3, transparency=0),
        save(colored, icc_profile=P3, transparency=(1, 2, 3)),
    ]
    for data in files:
        opened = open_with(data, color="srgb")[0]
        assert opened[0].tolist() == [255, 255, 255]
        assert distance(opened[1], np.array(srgb)) <= 2
    assert distance(open_with(files[0], color="srgb", alpha="drop")[0, 0], np.array(srgb)) <= 2


def test_lab_is_converted_to_srgb() -> None:
    pixels = smooth(4)
    lab = ImageCms.profileToProfile(
        Image.fromarray(pixels), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    opened = open_pixels(save(lab, "TIFF"))
    assert np.abs(opened.astype(int) - pixels).mean() < 2
    assert np.array_equal(open_with(save(lab, "TIFF"), color="srgb"), opened)


# Alpha


def make_transparent() -> dict[str, bytes]:
    """Return files with hidden colors below their transparent pixels."""
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    values[:4, :, 3] = 0
    rgba = Image.fromarray(values)
    palette = Image.fromarray(values[:, :, :3]).quantize(16)
    return {
        "RGBA": save(rgba),
        "LA": save(rgba.convert("LA")),
        "WebP": save(rgba, "WEBP", lossless=True, exact=True),
        "TIFF": save(rgba, "TIFF"),
        "palette": save(palette, transparency=3),
        "palette with alphas": save(palette, transparency=bytes(range(0, 256, 16))),
        "GIF": save(palette, "GIF", transparency=3),
        "a color": save(Image.fromarray(values[:, :, :3]), transparency=tuple(values[0, 0, :3].tolist())),
    }


TRANSPARENT = make_transparent()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", TRANSPARENT)
def test_dropped_alpha_gives_what_trainers_have(name: str) -> None:
    expected = np.asarray(Image.open(io.BytesIO(TRANSPARENT[name])).convert("RGB"))
    assert np.array_equal(open_with(TRANSPARENT[name], alpha="drop"), expected)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_alpha_is_composited_over_black(name: str) -> None:
    rgba = np.asarray(Image.open(io.BytesIO(TRANSPARENT[name])).convert("RGBA")).astype(float)
    alpha = rgba[:, :, 3:] / 255
    assert distance(open_with(TRANSPARENT[name], alpha="black"), np.rint(rgba[:, :, :3] * alpha)) <= 1
    assert distance(open_pixels(TRANSPARENT[name]), np.rint(rgba[:, :, :3] * alpha + 255 * (1 - alpha))) <= 1


# Orientation


def oriented(kind: str, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(smooth(5, 32, 48), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_the_orientation_is_ignored_if_that_is_set(kind: str) -> None:
    data = oriented(kind)
    ignored = open_with(data, exif="ignore")
    assert ignored.shape == (32, 48, 3)
    assert np.array_equal(open_pixels(data), np.rot90(ignored, -1))


def test_a_tiff_is_turned_by_pillow_itself() -> None:
    turned = np.rot90(smooth(5, 32, 48), -1)
    for setting in ("apply", "ignore"):
        assert np.array_equal(open_with(oriented("TIFF"), exif=setting), turned)


def test_the_header_of_a_jpeg_follows_the_setting() -> None:
    header, ignored = (
        read_jpeg_header(oriented("JPEG"), DecodeSettings(exif=setting)) for setting in ("apply", "ignore")
    )
    assert header is not None
    assert ignored is not None
    assert (header.height, header.width, header.is_turned) == (48, 32, True)
    assert (ignored.height, ignored.width, ignored.is_turned) == (32, 48, False)


# Gray of 16 bits, integers and floats


def gray16() -> np.ndarray:
    return np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


def as_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[:, :, None], 3, 2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_gray_of_16_bits_is_divided_by_257(kind: str) -> None:
    assert np.array_equal(open_pixels(save(Image.fromarray(gray16()), kind)), as_rgb(np.rint(gray16() / 257)))


def test_a_tiff_whose_zero_is_white_is_not_inverted() -> None:
    white_is_zero = {TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0}
    data = save(Image.fromarray(65535 - gray16()), "TIFF", tiffinfo=white_is_zero)
    assert np.array_equal(open_pixels(data), as_rgb(np.rint(gray16() / 257)))


def test_a_tiff_of_12_bits_is_scaled_by_its_maximum() -> None:
    size = {"ImageWidth": 4, "ImageLength": 1, "RowsPerStrip": 1, "StripOffsets": 8, "StripByteCounts": 6}
    data = make_tiff(
        bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x10]),
        **size,
        BitsPerSample=12,
        SamplesPerPixel=1,
        Compression=1,
        PhotometricInterpretation=1,
    )
    assert open_pixels(data)[0, :, 0].tolist() == [255, 128, 0, 1]


@pytest.mark.parametrize("maximum", [255, 1023, 65535])
def test_a_pgm_is_scaled_by_its_maximum(maximum: int) -> None:
    values = np.arange(256) * maximum // 255
    content = values.astype(">u2" if maximum > 255 else np.uint8).tobytes()
    data = f"P5 256 1 {maximum}\n".encode() + content
    assert distance(open_pixels(data), as_rgb(np.rint(values[None] * 255 / maximum))) <= 1


def test_a_transparent_value_of_16_bit_gray_is_white() -> None:
    row = struct.pack(">2H", 1000, 257)
    data = make_png((2, 1), 16, GREY, [row], ((b"tRNS", struct.pack(">H", 1000)),))
    assert open_pixels(data)[0].tolist() == [[255] * 3, [1] * 3]
    assert open_with(data, alpha="drop")[0].tolist() == [[4] * 3, [1] * 3]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_tiff_of_integers_or_floats_is_rejected_by_its_mode(dtype: Any) -> None:
    with pytest.raises(Rejected) as caught:
        open_pixels(save(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))
    assert caught.value.reason == "unsupported_mode"


def test_a_pfm_and_a_tiff_of_an_unknown_mode_are_rejected_by_their_mode() -> None:
    five = {TiffImagePlugin.SAMPLEFORMAT: 3}
    for data in (b"Pf 1 1 -1.0\n" + bytes(4), save(Image.fromarray(smooth(1, 8, 8)), "TIFF", tiffinfo=five)):
        with pytest.raises(Rejected) as caught:
            open_pixels(data)
        assert caught.value.reason == "unsupported_mode"


def test_premultiplied_alpha_is_read_as_plain_alpha() -> None:
    entry = struct.pack("<HHI", TiffImagePlugin.EXTRASAMPLES, 3, 1)
    plain = save(Image.new("RGBA", (8, 8), (100, 50, 25, 128)), "TIFF")
    data = plain.replace(entry + b"\2\0", entry + b"\1\0")
    assert data != plain
    expected = [round(value * 255 / 128) for value in (100, 50, 25)]
    assert distance(open_with(data, alpha="drop")[0, 0], np.array(expected)) <= 1
