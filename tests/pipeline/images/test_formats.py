"""Formats of image files: read whatever the extension, or rejected by name, and within the limits before decoding."""

import base64
import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from pipeline.errors import Rejected
from pipeline.images import formats
from pipeline.images.decode import open_pixels
from pipeline.images.jxl import read_jxl_size
from pipeline.limits import DEFAULT_LIMITS, Limits
from pipeline.records import IMAGE_EXTENSIONS, is_image
from tests.conftest import encoded, smooth
from tests.pipeline.images.test_decode import noise

LOSSLESS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"compression": "packbits"}),
    ("TIFF", {"big_tiff": True}),
    ("JPEG2000", {}),
    ("JPEG2000", {"no_jp2": True}),
    ("PPM", {}),
    ("ICO", {"sizes": [(32, 32)]}),
    ("ICO", {"sizes": [(32, 32)], "bitmap_format": "bmp"}),
    ("QOI", {}),
    ("DDS", {}),
    ("PCX", {}),
    ("SGI", {}),
    ("TGA", {}),
    ("TGA", {"compression": "tga_rle"}),
]
LOSSY: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("MPO", {}),
    ("GIF", {}),
    ("WEBP", {}),
    ("AVIF", {}),
    ("TIFF", {"compression": "jpeg"}),
    ("JPEG2000", {"irreversible": True, "quality_layers": [20]}),
]
# Two files of 64 x 48 pixels, the left half green. Made by pillow-heif 1.8.1 and pillow-jxl-plugin 1.3.8.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAA"
    "AERAAAEAAQAAAAABoQABAAAAAAAAAEgAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADd"
    "aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAA"
    "AwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xh"
    "cAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAFBtZGF0AAAA"
    "RCgBrxOA+BDhp//LKP/7a/V/70AeJ//cnXR+Y0EX9mTbtwGHXD0JAbETj792s4eZcHZrPiruf9M09UHfQAo+uwRc65dA"
)
JXL = base64.b64decode("/wrLQCQIAAEAjABLGIsVANSIG+PG/b9ACACAAjIOgATEB0guBSC4P7Bn4OKiAA==")


def expect_reject(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Rejected:
    with pytest.raises(Rejected) as caught:
        open_pixels(data, limits)
    return caught.value


# Formats that are read


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_lossless_formats_keep_their_pixels(kind: str, options: dict[str, Any]) -> None:
    side = 32 if kind == "ICO" else 40
    pixels = noise(side, side)
    assert np.array_equal(open_pixels(encoded(pixels, kind, **options)), pixels)


@pytest.mark.parametrize(("kind", "options"), LOSSY)
def test_lossy_formats_keep_their_pixels_approximately(kind: str, options: dict[str, Any]) -> None:
    pixels = smooth(2, 48, 64)
    assert np.abs(open_pixels(encoded(pixels, kind, **options)).astype(int) - pixels).mean() < 8


@pytest.mark.parametrize("kind", ["TIFF", "JPEG2000", "TGA", "PCX", "SGI", "ICO", "DDS", "PPM", "AVIF"])
def test_every_mode_that_pillow_writes_equals_pillow(kind: str) -> None:
    written = []
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA"):
        image, sink = Image.fromarray(smooth(3, 32, 32)).convert(mode), io.BytesIO()
        with contextlib.suppress(OSError, KeyError, ValueError):  # Pillow does not write this mode
            image.save(sink, kind)
            written.append(sink.getvalue())
    assert len(written) > 1
    for data in written:
        expected = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB")
        assert np.array_equal(open_pixels(data), np.asarray(expected))


def test_the_first_page_of_a_tiff_and_the_largest_icon_are_used() -> None:
    pages = [Image.new("RGB", (40, 30), name) for name in ("red", "blue")]
    sink = io.BytesIO()
    pages[0].save(sink, "TIFF", save_all=True, append_images=pages[1:])
    assert (open_pixels(sink.getvalue()) == [255, 0, 0]).all()
    assert open_pixels(encoded(noise(64, 64), "ICO", sizes=[(16, 16), (64, 64), (32, 32)])).shape == (64, 64, 3)


def test_files_with_the_extensions_of_these_formats_are_images() -> None:
    others = {".pdf", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}  # Pillow names them, but decodes none
    others |= {".pcd", ".palm", ".gbr"}  # mostly other things, as point clouds
    assert {name[1:] for name in Image.registered_extensions().keys() - others} <= IMAGE_EXTENSIONS
    assert all(map(is_image, ("a.JFIF", "a.jpe", "a.heic", "a.JXL", "a.cr2", "a.svg", "a.psd", "a.fit", "a.im")))
    assert not any(
        map(is_image, ("a.txt", "a.json", "a.npy", "a.mp4", "a.pdf", "a.pcd", "jpg", "a.jpg_large", "a.jpg~"))
    )


# Formats that are rejected by name


def with_tag(tag: int, value: int) -> bytes:
    return encoded(noise(16, 16), "TIFF", tiffinfo={tag: value})


OTHERS = {
    "Photoshop": b"8BPS\0\1" + bytes(100),
    "EPS": encoded(noise(16, 16), "EPS"),
    "PDF": encoded(noise(16, 16), "PDF"),
    "ICNS": encoded(noise(16, 16), "ICNS"),
    "BLP": b"BLP2" + bytes(200),
    "SVG": b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "OpenEXR": b"v/1\1" + bytes(100),
    "Radiance HDR": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n",
    "DICOM": bytes(128) + b"DICM" + bytes(100),
    "FITS": b"SIMPLE  =                    T" + bytes(3000),
    "MPEG-4": b"\0\0\0\x18ftypmp42" + bytes(100),
}
LATE = {
    "XBM": encoded(noise(16, 16)[:, :, 0] > 100, "XBM"),
    "XBM with a comment": b"/* Created with GIMP */\n#define a-b_width 16\n#define a-b_height 16\n",
    "XPM": b'/* XPM */\nstatic char *a[] = {"1 1 1 1",};',
    "IM": b"Image type: RGB image\r\nName: a.im\r\n" + bytes(1000),
    "FLI": struct.pack("<IHHHHHH", 128, 0xAF12, 1, 16, 16, 8, 3) + bytes(112),
    "Windows cursor": b"\0\0\2\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 1, 0]) + struct.pack("<II", 40, 22) + bytes(40),
    "Microsoft Paint": encoded(noise(16, 16)[:, :, 0] > 100, "MSP"),
    "DCX": struct.pack("<I", 0x3ADE68B1) + bytes(100),
    "PIXAR": b"\x80\xe8\0\0" + bytes(600),
    "FTEX": b"FTEX" + bytes(100),
    "GIMP brush": struct.pack(">5I", 28, 2, 1, 1, 4) + b"GIMP" + bytes(100),
    "Photo CD": b"\xff" * 2048 + b"PCD_IPI" + bytes(3000),
    "Krita": b"PK\3\4" + bytes(26) + b"mimetypeapplication/x-kritaPK" + bytes(100),
}
RAW = {
    "CR2": b"II*\0\x10\0\0\0CR\2\0" + bytes(100),
    "CR3": b"\0\0\0\x18ftypcrx " + bytes(100),
    "RAF": b"FUJIFILMCCD-RAW " + bytes(100),
    "NEF": with_tag(254, 1),  # the first image of the file is a thumbnail
    "DNG": with_tag(50706, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named(name: str) -> None:
    reject = expect_reject(OTHERS[name])
    assert reject.reason == "unsupported_format"
    assert reject.detail == f"the image is in the format {name}, which is not supported; convert it"


@pytest.mark.parametrize("name", LATE)
def test_a_format_is_named_by_its_first_bytes_if_pillow_knows_no_other(name: str) -> None:
    reject = expect_reject(LATE[name])
    assert (reject.reason, name.split(" with")[0] in reject.detail) == ("unsupported_format", True), reject.detail


@pytest.mark.parametrize(
    "text", [b"#define A 1\n", b"/*" * 2000, b"/**/" * 1000, b"a.width 16", b"GIMP", b"\xb1\x68"], ids=len
)
def test_bytes_that_resemble_a_signature_are_no_image(text: bytes) -> None:
    assert expect_reject(text).reason == "not_an_image"


@pytest.mark.parametrize("name", RAW)
def test_the_thumbnail_of_a_camera_raw_file_is_not_used(name: str) -> None:
    assert expect_reject(RAW[name]).detail == (
        "the image is in the format camera raw, which is not supported; convert it"
    )


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html>", b"\xef\xbb\xbf\n <html><body><svg/>", b"<!-- 404 --><HEAD>"], ids=len
)
def test_a_page_of_html_is_named(page: bytes) -> None:
    reject = expect_reject(page)
    assert reject.reason == "not_an_image"
    assert reject.detail == "the bytes are not a supported image format: they are a page of HTML"


@pytest.mark.parametrize("kind", [*formats.FORMATS, "TGA"])
def test_a_file_with_only_its_first_bytes_is_rejected(kind: str) -> None:
    options = {"sizes": [(16, 16)]} if kind == "ICO" else {}
    data = encoded(noise(16, 16), kind, **options)
    for length in (*range(1, 40), 60):
        assert expect_reject(data[:length]).reason in ("corrupt", "not_an_image", "unsupported_mode")
    if kind != "TGA":
        assert expect_reject(data[:20]).reason in ("corrupt", "unsupported_mode")


# Plugins


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(formats.importlib, "import_module", fail)
    formats._load_plugin.cache_clear()
    yield
    formats._load_plugin.cache_clear()


@pytest.mark.usefixtures("no_plugins")
@pytest.mark.parametrize(
    ("data", "name", "package"),
    [
        (HEIC, "HEIC", "pi-heif"),
        (HEIC[:12], "HEIC", "pi-heif"),
        (HEIC.replace(b"ftypheic", b"ftypmif1"), "HEIC", "pi-heif"),
        (JXL, "JPEG XL", "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL", "pillow-jxl-plugin"),
    ],
    ids=["HEIC", "the start of an HEIC", "HEIF", "JPEG XL", "JPEG XL in a container"],
)
def test_a_missing_plugin_is_named(data: bytes, name: str, package: str) -> None:
    reject = expect_reject(data)
    assert reject.reason == "missing_plugin"
    assert reject.detail == f"the image is in the format {name}, and its plugin is missing; run `pip install {package}`"


@pytest.mark.parametrize(
    ("data", "modules"), [(HEIC, ("pi_heif", "pillow_heif")), (JXL, ("pillow_jxl",))], ids=["HEIC", "JPEG XL"]
)
def test_an_installed_plugin_is_used(data: bytes, modules: tuple[str, ...]) -> None:
    if not any(formats.importlib.util.find_spec(name) for name in modules):
        pytest.skip(f"{modules[0]} is not installed")
    pixels = open_pixels(data)
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels[20, [8, 56]].astype(int) - [[10, 200, 30], [200, 40, 90]]).max() < 8
    assert expect_reject(data, Limits(pixels=1000)).reason == "too_many_pixels"
    assert expect_reject(data[: len(data) * 3 // 4]).reason == "corrupt"


@pytest.mark.parametrize(
    ("start", "size"),  # of files that pillow-jxl-plugin made
    [
        ("ff0a001010090800010028004b188b15", (1, 1)),
        ("ff0a4140240800010038004b188b1580", (8, 8)),
        ("ff0a050888040800010040004b188b15", (40, 24)),
        ("ff0a3141240804010058004b188b1580", (300, 200)),
        ("ff0a4880ce0788040802010034000000", (1000, 10)),
        ("ff0aba5d0391080201001c0000000000", (4000, 3000)),
        ("ff0a00004f460091080201001c000000", (9000, 1)),
        (
            "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000013b26a786c63ff0aba5d0391080201001c",
            (4000, 3000),
        ),
    ],
)
def test_the_size_of_a_jxl_is_read_from_its_header(start: str, size: tuple[int, int]) -> None:
    assert read_jxl_size(bytes.fromhex(start)) == size


# Limits


@pytest.mark.parametrize("kind", [*formats.FORMATS, "TGA", "MPO"])
def test_the_size_is_checked_before_an_image_is_decompressed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the image was decompressed")

    options = {"sizes": [(64, 64)]} if kind == "ICO" else {}
    data = encoded(noise(64, 64), kind, **options)
    owners = {ImageFile.ImageFile, type(Image.open(io.BytesIO(data)))}
    for owner in owners:
        monkeypatch.setattr(owner, "load", refuse)
    assert expect_reject(data, Limits(pixels=1000)).reason == "too_many_pixels"
    assert expect_reject(data, Limits(side=63)).reason == "too_many_pixels"


def make_icon(content: bytes) -> bytes:
    """Return an icon that claims to have an image of 16 x 16 pixels."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


@pytest.mark.parametrize(
    "content",
    [
        encoded(np.zeros((1, 66_000, 3), np.uint8), "PNG"),
        struct.pack("<IiiHHIIiiII", 40, 30_000, -60_000, 1, 8, 1, 0, 0, 0, 0, 0) + bytes(1100),
        struct.pack("<IHHHH", 12, 30_000, 60_000, 1, 24) + bytes(100),
    ],
)
def test_an_icon_cannot_hide_a_large_image(content: bytes) -> None:
    assert expect_reject(make_icon(content)).reason == "too_many_pixels"


def make_tiff(data: bytes, **tags: int) -> bytes:
    """Return a TIFF with these tags, each of one 32-bit value, and this content at byte 8."""
    entries = sorted((int(ExifTags.Base[name]), value) for name, value in tags.items())
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)


def test_a_tiff_cannot_hide_a_large_tile() -> None:
    gray = {"ImageWidth": 16, "ImageLength": 16, "BitsPerSample": 8, "PhotometricInterpretation": 1, "Compression": 5}
    content = {"TileOffsets": 8, "TileByteCounts": 64}
    tile = make_tiff(bytes(64), **gray, **content, TileWidth=9_000, TileLength=9_000)
    assert expect_reject(tile).reason == "corrupt"
    tile = make_tiff(bytes(64), **gray, **content, TileWidth=60_000, TileLength=60_000)
    assert expect_reject(tile).reason == "too_many_pixels"


@pytest.mark.parametrize("names", [("NewSubfileType",), ("TileWidth", "TileLength")])
@pytest.mark.parametrize(("kind", "count"), [(2, 4), (11, 1)])  # a text, a float
def test_a_tiff_whose_tags_are_no_integers_is_corrupt(names: tuple[str, ...], kind: int, count: int) -> None:
    gray = {"ImageWidth": 4, "ImageLength": 4, "BitsPerSample": 8, "PhotometricInterpretation": 1}
    data = bytearray(make_tiff(bytes(16), **gray, StripOffsets=8, StripByteCounts=16, **dict.fromkeys(names, 16)))
    table = int.from_bytes(data[4:8], "little")
    for name in names:
        place = data.index(struct.pack("<HH", ExifTags.Base[name], 4), table)
        data[place + 2 : place + 12] = struct.pack("<HI", kind, count) + b"\0\0\xc0\x7f"
    assert expect_reject(bytes(data)).reason == "corrupt"


def test_a_jpeg_2000_whose_header_and_codestream_differ_is_corrupt() -> None:
    data = encoded(np.zeros((2000, 2000, 3), np.uint8), "JPEG2000")
    place = data.index(b"ihdr") + 4
    assert expect_reject(data[:place] + struct.pack(">II", 16, 16) + data[place + 8 :]).reason == "corrupt"


def test_a_jpeg_inside_a_tiff_has_the_size_of_the_tiff() -> None:
    small, large = (encoded(np.zeros((side, side, 3), np.uint8), "TIFF", compression="jpeg") for side in (16, 2000))
    assert open_pixels(small).shape == (16, 16, 3)
    tags = int.from_bytes(large[4:8], "little")
    shrunk = bytearray(large)
    for tag in (256, 257, 278):  # width, length, rows per strip
        place = shrunk.index(struct.pack("<H", tag), tags)
        shrunk[place + 2 : place + 12] = struct.pack("<HII", 4, 1, 16)
    assert expect_reject(bytes(shrunk)).reason == "corrupt"


def test_texts_of_a_png_in_an_icon_have_the_limit_of_a_png() -> None:
    png = encoded(noise(16, 16), "PNG")
    text = b"zTXtk\0\0" + zlib.compress(bytes((64 << 20) + 1), 1)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    assert expect_reject(make_icon(png[:33] + chunk + png[33:])).reason == "corrupt"
