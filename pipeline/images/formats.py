"""Recognize the format of an image file from its bytes, and open it with Pillow, without decoding its pixels.

The extension of a file has no influence. Only formats that Pillow reads inside this process are opened: none that it
hands to another program (EPS to Ghostscript), and none without pixels of their own (SVG, WMF).
"""

import contextlib
import importlib
import io
import re
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import AvifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from pipeline.errors import Rejected
from pipeline.images import jxl
from pipeline.images.boxes import read_jp2_profile
from pipeline.limits import Limits

# In the order in which Pillow tries them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "PPM", "ICO", "QOI", "DDS", "PCX", "SGI")
PNG_TEXT = 64 << 20  # bytes of a PNG's decompressed texts and color profile

# Pillow's own limit warns once per process, and raises above a higher number than ours. So it is checked here instead.
Image.MAX_IMAGE_PIXELS = None
# By default Pillow accepts up to 1 MiB of a text or a profile, and reports images with more as broken.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = PNG_TEXT
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several images are opened at once already

# The signatures of formats that are not opened: their place in the file, their bytes, and the format.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (40, b" EMF", "EMF"),
    (0, b"icns", "ICNS"),
    (0, b"BLP1", "BLP"),
    (0, b"BLP2", "BLP"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    *((0, name, "camera raw") for name in (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")),
    (6, b"HEAPCCDR", "camera raw"),
    (8, b"CR\2\0", "camera raw"),
)
# The same for files that Pillow did not open: the signatures that files of other formats may have, and rare formats.
_LATE_SIGNATURES = {
    "XBM": rb"(/\*[^*]*\*/)?\s*#define[ \t]+\S*width[ \t]+\d",
    "XPM": rb"/\* XPM \*/",
    "IM": rb"Image type: ",
    "FLI": rb".{4}[\x11\x12]\xaf.{6}\x08\0",
    "Windows cursor": rb"\0\0\x02\0[^\0]\0.{3}\0",  # a TGA may start with the first four
    "Microsoft Paint": rb"DanM|LinS",
    "DCX": rb"\xb1\x68\xde\x3a",
    "PIXAR": rb"\x80\xe8\0\0",
    "FTEX": rb"FTEX",
    "GIMP brush": rb".{20}GIMP",
    "Photo CD": rb".{2048}PCD_",
    "Krita": rb"PK.{28}mimetypeapplication/x-krita",
}
# What follows `ftyp` in files of ISO's base media file format. Some brands say nothing about the compression.
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_GENERAL_BRANDS = frozenset({b"mif1", b"mif2", b"msf1", b"miaf"})
_PNG, _ICO, _TIFF = b"\x89PNG\r\n\x1a\n", b"\0\0\1\0", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_COMMON = (b"\xff\xd8", _PNG, b"RIFF", b"GIF8")  # JPEG, PNG, WebP and GIF
_SUBFILE_TYPE, _REDUCED, _DNG_VERSION, _TILE_WIDTH, _TILE_LENGTH = 254, 1, 50706, 322, 323  # TIFF


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of Pillow that the user may install. package: to install. modules: those that provide `format`."""

    format: str
    package: str
    modules: tuple[str, ...]


PLUGINS = {
    "HEIC": Plugin("HEIF", "pi-heif", ("pi_heif", "pillow_heif")),
    "JPEG XL": Plugin("JXL", "pillow-jxl-plugin", ("pillow_jxl",)),
}


def open_header(source: io.BytesIO, limits: Limits) -> Image.Image:
    """Open an image file with Pillow. Its pixels are decoded by `load`.

    Raises Rejected (stage "open") if its format is unknown or not supported, its header is damaged, or it is too large.
    """
    data = source.getvalue()
    name = name_other_format(data)
    if plugin := PLUGINS.get(name):
        _check_plugin(data, name, plugin, limits)
        tried: tuple[str, ...] = (plugin.format,)
    elif name:
        raise Rejected("open", "unsupported_format", name)
    else:
        _check_icon(data, limits)
        tried = ("TGA",) if _is_tga(data) else FORMATS
    try:
        image = Image.open(source, formats=tried)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise _explain_unidentified(data, name) from None
    except Exception:  # Pillow's parsers raise exceptions of any type for damaged bytes
        raise Rejected("open", "corrupt") from None
    check_size(*image.size, limits)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, limits)
    if image.format == "JPEG2000" and (profile := read_jp2_profile(data)):  # Pillow does not read it
        image.info["icc_profile"] = profile
    return image


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise Rejected for an image with too many pixels."""
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise Rejected("open", "too_many_pixels", width, height, limits.pixels, limits.side)


def name_other_format(data: bytes) -> str:
    """Return the format of a file that Pillow does not open by itself. Empty for its own and for unknown formats."""
    if data.startswith(_COMMON):
        return ""
    if data.startswith((jxl.CODESTREAM, jxl.CONTAINER)):
        return "JPEG XL"
    if data[4:8] == b"ftyp" and len(data) >= 12:
        return _name_iso_format(data)
    if _starts_as_markup(data) and b"<svg" in data[:4096] and not _is_html(data):
        return "SVG"
    return next((name for at, signature, name in _SIGNATURES if data.startswith(signature, at)), "")


def _name_iso_format(data: bytes) -> str:
    """Return the format of a file of ISO's base media file format. Empty for AVIF."""
    brand, others = data[8:12], {data[at : at + 4] for at in range(16, min(int.from_bytes(data[:4]), 256), 4)}
    if brand in _AVIF_BRANDS or (brand in _GENERAL_BRANDS and others & _AVIF_BRANDS):
        return ""
    if brand in _HEIC_BRANDS | _GENERAL_BRANDS:
        return "HEIC"
    return "camera raw" if brand == b"crx " else "MPEG-4"


def _starts_as_markup(data: bytes) -> bool:
    return data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def _is_html(data: bytes) -> bool:
    start = data[:4096].lower()
    return _starts_as_markup(data) and any(tag in start for tag in (b"<!doctype html", b"<html", b"<head", b"<body"))


def _check_plugin(data: bytes, name: str, plugin: Plugin, limits: Limits) -> None:
    """Raise Rejected if a plugin is missing, or would decode too many pixels when it opens the file."""
    if not _load_plugin(plugin):
        raise Rejected("open", "missing_plugin", name, plugin.package)
    if name == "JPEG XL":
        try:
            size = jxl.read_jxl_size(data)
        except ValueError:
            raise Rejected("open", "corrupt") from None
        check_size(*size, limits)


@cache
def _load_plugin(plugin: Plugin) -> bool:
    """Register a plugin of Pillow. Return whether one is installed. It decodes in the thread that calls it."""
    for name in plugin.modules:
        with contextlib.suppress(ImportError):
            module: Any = importlib.import_module(name)
            if plugin.format == "HEIF":
                module.register_heif_opener(decode_threads=1)
            else:
                module.JpegXLImagePlugin.DECODE_THREADS = 0
            return True
    return False


def _is_tga(data: bytes) -> bool:
    """Return whether a file can be a TGA, which has no signature, by the values of its header."""
    if len(data) < 18 or data.startswith(_ICO):
        return False
    has_map, kind, depth, descriptor = data[1], data[2], data[16], data[17]
    is_mapped = kind in (1, 9)
    return (
        has_map == is_mapped
        and (is_mapped or kind in (2, 3, 10, 11))
        and depth in (1, 8, 15, 16, 24, 32)
        and descriptor < 0x40
        and all(struct.unpack_from("<HH", data, 12))
    )


def _check_icon(data: bytes, limits: Limits) -> None:
    """Raise Rejected if an image of an icon is too large. Pillow decodes it at once, and trusts the icon's own list."""
    if not data.startswith(_ICO):
        return
    for entry in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        offset = int.from_bytes(data[entry + 12 : entry + 16], "little")
        header = data[offset : offset + 24]
        if len(header) < 24:
            raise Rejected("open", "corrupt")
        if header.startswith(_PNG):
            width, height = struct.unpack_from(">II", header, 16)
        else:  # a BMP without its file header; of two heights, because a mask follows the image
            width, height = struct.unpack_from("<HH" if header[0] == 12 else "<ii", header, 4)
        check_size(abs(width), abs(height), limits)


def _check_tiff(image: TiffImagePlugin.TiffImageFile, limits: Limits) -> None:
    """Raise Rejected for a camera's raw file, whose first image is a thumbnail, and for tiles that are too large."""
    tags = image.tag_v2
    if _DNG_VERSION in tags or _read_integer(tags, _SUBFILE_TYPE) & _REDUCED:
        raise Rejected("open", "unsupported_format", "camera raw")
    if _TILE_WIDTH in tags and _TILE_LENGTH in tags:
        check_size(_read_integer(tags, _TILE_WIDTH), _read_integer(tags, _TILE_LENGTH), limits)


def _read_integer(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> int:
    """Return the value of a tag, 0 if it is missing. Raises Rejected if it is of another type, as in a damaged file."""
    value = tags.get(tag, 0)
    if not isinstance(value, int):
        raise Rejected("open", "corrupt")
    return value


def _has_signature(data: bytes, name: str) -> bool:
    accept = Image.OPEN[name][1]
    return bool(accept and accept(data[:16].ljust(16, b"\0")))


def _explain_unidentified(data: bytes, name: str) -> Rejected:
    """Return the reject of a file that Pillow cannot open. name: of its format, if a plugin had to open it."""
    if data.startswith(_TIFF):
        try:
            TiffImagePlugin.TiffImageFile(io.BytesIO(data))
        except SyntaxError as error:
            if "unknown" in str(error):
                return Rejected("open", "unsupported_mode")
        except MemoryError:
            raise
        except Exception:
            return Rejected("open", "corrupt")
    if name or any(_has_signature(data, known) for known in FORMATS):
        return Rejected("open", "corrupt")
    for other, signature in _LATE_SIGNATURES.items():
        if re.match(signature, data[:4096], re.DOTALL):
            return Rejected("open", "unsupported_format", other)
    return Rejected("open", "not_an_image", more=": they are a page of HTML" if _is_html(data) else "")
