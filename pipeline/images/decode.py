"""Decode images to pixels, by one rule for every kind of image.

    orientation   the EXIF orientation is applied, or ignored; original sizes are measured after it
    animation     the first frame or page
    colors        see `color`
    truncated     rejected, or accepted as by Pillow: missing pixels are gray in a JPEG, black in other formats

The number of bytes and of pixels is checked before an image is decompressed.

Pillow reads the header and the metadata of every image. JPEGs are then decompressed by simplejpeg, which is faster than
Pillow. Both contain libjpeg-turbo and use the same settings, so the pixels are equal. Pillow decompresses all other
images, and every JPEG for which that is not certain: CMYK, unusual headers and damaged ones.

Decoding an image file is part of the stage `open`. It is not the command `decode`, which turns latents into images
(`pipeline.preview`).
"""

import contextlib
import io
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, features

from pipeline.errors import Rejected
from pipeline.images.color import convert_to_rgb
from pipeline.images.decode_settings import DEFAULT_DECODING, DecodeSettings
from pipeline.images.formats import open_header
from pipeline.limits import DEFAULT_LIMITS, Limits

# Decodes an image file to RGB uint8 [H, W, 3], as `open_pixels` does: bytes, limits, reduction, settings.
OpenPixels = Callable[[bytes, Limits, int, DecodeSettings], np.ndarray]

# The warnings of Pillow and its plugins, mostly about damaged metadata, name neither the image nor a remedy. They are
# ignored in the whole process, because `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"(PIL|pi_heif|pillow_heif|pillow_jxl)\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

_log = logging.getLogger(__name__)

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


class _ThreadFlag(threading.local):
    """A flag of Pillow that is set in one thread only. Pillow has one for the process, and tests only its truth."""

    is_set = False

    def __bool__(self) -> bool:
        return self.is_set


_accepts_truncated = _ThreadFlag()
ImageFile.LOAD_TRUNCATED_IMAGES = _accepts_truncated  # type: ignore[assignment]


class _Source(io.BytesIO):
    """An image file that notices if it lacks its end: if a read returned less than a whole file would have."""

    is_truncated = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is not None and size > 0:
            self.is_truncated |= not data or len(data) < size < ImageFile.MAXBLOCK
        return data


def open_pixels(
    data: bytes, limits: Limits = DEFAULT_LIMITS, reduction: int = 1, settings: DecodeSettings = DEFAULT_DECODING
) -> np.ndarray:
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
        return _decode(io.BytesIO(data), limits, reduction, settings)
    except Rejected as error:
        if error.reason != "corrupt" or not settings.allow_truncated:
            raise
    source = _Source(data)
    with _accept_truncated():
        pixels = _decode(source, limits, reduction, settings)
    if not source.is_truncated:  # it is damaged, but not truncated
        raise Rejected("open", "corrupt")
    return pixels


@contextlib.contextmanager
def _accept_truncated() -> Iterator[None]:
    """Let Pillow decode truncated images, in this thread."""
    _accepts_truncated.is_set = True
    try:
        yield
    finally:
        _accepts_truncated.is_set = False


def _decode(source: io.BytesIO, limits: Limits, reduction: int, settings: DecodeSettings) -> np.ndarray:
    data, image = source.getvalue(), open_header(source, limits)
    is_plain = _is_plain_jpeg(data, image)
    is_fast = is_plain and _HAS_TURBO and not _has_profile(image, settings)
    pixels = _decompress_jpeg(data, image, reduction) if is_fast else None
    if pixels is None:
        pixels = _load(image, reduction if is_plain else 1, settings)
    orientation = _read_orientation(image, settings)
    if orientation not in _UPRIGHT:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))


def _load(image: Image.Image, reduction: int, settings: DecodeSettings) -> np.ndarray:
    """Let Pillow decode an opened image to RGB uint8 [H, W, 3], without its orientation."""
    try:
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
        return np.asarray(convert_to_rgb(image, settings))  # it reads tags and profiles, which may be damaged as well
    except (MemoryError, Rejected):
        raise
    except Exception:
        _log.debug("an image is corrupt", exc_info=True)  # so that an error of `color` can be told from damage
        raise Rejected("open", "corrupt") from None


def read_jpeg_header(data: bytes, settings: DecodeSettings = DEFAULT_DECODING) -> JpegHeader | None:
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
    orientation = _read_orientation(image, settings)
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


def _has_profile(image: Image.Image, settings: DecodeSettings) -> bool:
    """Return whether the colors of a JPEG may have to be converted."""
    return settings.color == "srgb" and "icc_profile" in image.info


def _read_orientation(image: Image.Image, settings: DecodeSettings) -> int | None:
    """Return the EXIF orientation, if it counts.

    Damaged metadata is ignored, because the image itself may be intact.
    """
    if settings.exif == "ignore" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return None  # JPEG XL has an orientation of its own, which its decoder applies; that of the EXIF is a copy
    try:
        return image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        return None
