"""Bytes to pixels ("open"), by one rule for every kind of image.

    orientation   the EXIF orientation is applied; original sizes are counted after it
    animation     the first frame
    alpha         composited over white, in a palette too
    16-bit grey   divided by 257, rounded; 16-bit RGB keeps its high byte, as Pillow reads it
    CMYK          Pillow's conversion, without a colour profile
    profiles      embedded ICC profiles are ignored, as training code does
    else          RGB by Pillow's conversion (grey, palette, YCbCr, LAB, HSV)

Size and number of pixels are checked before anything is decompressed.
"""

import io
import warnings

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pipeline.errors import Rejected
from pipeline.limits import DEFAULT_LIMITS, Limits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PNG_TEXT = 64 << 20  # bytes of a PNG's texts and colour profile once they are decompressed

# Pillow's own limit warns once a process and raises later than ours; it is checked here instead.
Image.MAX_IMAGE_PIXELS = None
# Pillow takes up to 1 MiB of a text or a profile, and calls images that have more broken.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = PNG_TEXT
# What Pillow warns of (damaged metadata, mostly) says neither which image nor what to do. For the process, because
# `warnings.catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

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


def open_pixels(data: bytes, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """An encoded image as RGB uint8 [H, W, 3].

    Raises Rejected (stage "open") for what cannot be opened: it depends on the bytes alone.
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
    except Exception:  # Pillow's parsers raise whatever damaged bytes lead them to
        raise Rejected("open", "corrupt") from None
    width, height = image.size
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise Rejected("open", "too_many_pixels", width, height, limits.pixels, limits.side)
    try:
        image.load()
        return np.asarray(_rgb(_upright(image)))
    except (MemoryError, Rejected):
        raise
    except Exception:
        raise Rejected("open", "corrupt") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation asks. Damaged metadata does not spoil a whole image: it counts as none."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
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
