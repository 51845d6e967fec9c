"""Decode images to pixels, by one rule for every kind of image.

    orientation   the EXIF orientation is applied; original sizes are measured after it
    animation     the first frame
    alpha         composited over white, also for palettes
    16-bit gray   divided by 257, rounded; 16-bit RGB keeps its high byte, as Pillow reads it
    CMYK          Pillow's conversion, without a color profile
    profiles      embedded ICC profiles are ignored, as in training code
    otherwise     RGB by Pillow's conversion (gray, palette, YCbCr, LAB, HSV)

The number of bytes and of pixels is checked before an image is decompressed.

Pillow reads the header and the metadata of every image. JPEGs are then decompressed by simplejpeg, which is faster than
Pillow. Both contain libjpeg-turbo and use the same settings, so the pixels are equal. Pillow decompresses all other
images, and every JPEG for which that is not certain: CMYK, unusual headers and damaged ones.

Decoding an image file is part of the stage `open`. It is not the command `decode`, which turns latents into images
(`pipeline.preview`).
"""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from pipeline.errors import Rejected
from pipeline.limits import DEFAULT_LIMITS, Limits

# Decodes an image file to RGB uint8 [H, W, 3], as `open_pixels` does: bytes, limits, reduction.
OpenPixels = Callable[[bytes, Limits, int], np.ndarray]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PNG_TEXT = 64 << 20  # bytes of a PNG's decompressed texts and color profile

# Pillow's own limit warns once per process, and raises above a higher number than ours. So it is checked here instead.
Image.MAX_IMAGE_PIXELS = None
# By default Pillow accepts up to 1 MiB of a text or a profile, and reports images with more as broken.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = PNG_TEXT
# Pillow's warnings, mostly about damaged metadata, name neither the image nor a remedy. They are ignored in the whole
# process, because `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

_HAS_TURBO = features.check_feature("libjpeg_turbo")  # another libjpeg has other pixels
# Markers of JPEG (ITU-T T.81, table B.1): Huffman-coded frames of the DCT (baseline, extended, progressive), the
# segments before a scan (DHT, DQT, DRI, APPn, COM), and the start of a scan.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})
_SCAN = 0xDA

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The height and width of a JPEG in pixels, after its orientation. is_turned: whether that changes the image."""

    height: int
    width: int
    is_turned: bool


def open_pixels(data: bytes, limits: Limits = DEFAULT_LIMITS, reduction: int = 1) -> np.ndarray:
    """Decode an image to RGB uint8 [H, W, 3].

    reduction: with 2, 4 or 8, a JPEG that has a `read_jpeg_header` is decoded at 1/reduction of its height and width,
    rounded up. The limits apply to the full size.

    Raises Rejected (stage "open") if it cannot be decoded. That depends on the bytes and the limits alone.
    """
    if not data:
        raise Rejected("open", "empty")
    if len(data) > limits.image_bytes:
        raise Rejected("open", "too_many_bytes", len(data), limits.image_bytes)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Rejected("open", "not_an_image") from None
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise exceptions of any type for damaged bytes
        raise Rejected("open", "corrupt") from None
    width, height = image.size
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise Rejected("open", "too_many_pixels", width, height, limits.pixels, limits.side)
    try:
        is_plain = _is_plain_jpeg(data, image)
        pixels = _decompress_jpeg(data, image, reduction) if is_plain and _HAS_TURBO else None
        if pixels is None:
            if is_plain and reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            return np.asarray(_convert_to_rgb(_rotate_upright(image)))
        orientation = _read_orientation(image)
        if orientation not in _UPRIGHT:
            return pixels
        return np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))
    except (MemoryError, Rejected):
        raise
    except Exception:
        raise Rejected("open", "corrupt") from None


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Return the header of a JPEG. None for other formats, CMYK, and JPEGs with an unusual or damaged header."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except MemoryError:
        raise
    except Exception:
        return None
    if not _is_plain_jpeg(data, image):
        return None
    orientation = _read_orientation(image)
    height, width = (image.width, image.height) if orientation in _TRANSPOSED else (image.height, image.width)
    return JpegHeader(height, width, is_turned=orientation in _UPRIGHT)


def _is_plain_jpeg(data: bytes, image: Image.Image) -> bool:
    """Return whether an image is a JPEG in RGB or gray whose header Pillow and libjpeg understand in the same way.

    data: the image file. image: the same file, opened by Pillow, but not loaded.
    """
    has_one_tile = getattr(image, "tile", None) == [("jpeg", (0, 0, *image.size), 0, (image.mode, ""))]
    return has_one_tile and image.mode in ("RGB", "L") and _has_plain_header(data)


def _decompress_jpeg(data: bytes, image: Image.Image, reduction: int) -> np.ndarray | None:
    """Decompress a plain JPEG to RGB uint8 [H, W, 3], without its orientation. None if Pillow has to decompress it.

    Damaged images are left to Pillow: simplejpeg reports each of the library's warnings as an error, but Pillow ignores
    warnings, and the two differ at the end of a truncated file.
    """
    height, width = (math.ceil(side / reduction) for side in (image.height, image.width))
    smallest = {"min_height": height, "min_width": width} if reduction > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True, **smallest)
    except MemoryError:
        raise
    except Exception:  # whatever it is, Pillow decides
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _has_plain_header(data: bytes) -> bool:
    """Return whether a JPEG's header is a sequence of segments, and has one Huffman-coded frame of the DCT.

    Frames of other kinds (lossless, arithmetic coding) do not occur in practice.
    """
    frames, at = 0, 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == _SCAN:
            return frames == 1
        if marker in _FRAMES:
            frames += 1
        elif marker not in _SEGMENTS:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _rotate_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    orientation = _read_orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _read_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation. Damaged metadata is ignored, because the image itself may be intact."""
    try:
        return image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        return None


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB by the rules of this module."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Rejected("open", "unsupported_mode")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
