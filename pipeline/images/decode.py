"""Decode images to pixels, by one rule for every kind of image.

    orientation   the EXIF orientation is applied; original sizes are measured after it
    animation     the first frame
    alpha         composited over white, also for palettes
    16-bit gray   divided by 257, rounded; 16-bit RGB keeps its high byte, as Pillow reads it
    CMYK          Pillow's conversion, without a color profile
    profiles      embedded ICC profiles are ignored, as in training code
    otherwise     RGB by Pillow's conversion (gray, palette, YCbCr, LAB, HSV)

The number of bytes and of pixels is checked before an image is decompressed.

Decoding an image file is part of the stage `open`. It is not the command `decode`, which turns latents into images
(`pipeline.preview`).
"""

import io
import warnings

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pipeline.errors import Rejected
from pipeline.limits import DEFAULT_LIMITS, Limits

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PNG_TEXT = 64 << 20  # bytes of a PNG's decompressed texts and color profile

# Pillow's own limit warns once per process, and raises above a higher number than ours. So it is checked here instead.
Image.MAX_IMAGE_PIXELS = None
# By default Pillow accepts up to 1 MiB of a text or a profile, and reports images with more as broken.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = PNG_TEXT
# Pillow's warnings, mostly about damaged metadata, name neither the image nor a remedy. They are ignored in the whole
# process, because `warnings.catch_warnings` is not thread-safe.
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
    """Decode an image to RGB uint8 [H, W, 3].

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
        image.load()
        return np.asarray(_convert_to_rgb(_rotate_upright(image)))
    except (MemoryError, Rejected):
        raise
    except Exception:
        raise Rejected("open", "corrupt") from None


def _rotate_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Damaged metadata is ignored, because the image itself may be intact."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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
