"""Convert opened images of every mode to 8-bit RGB, by one rule for each mode.

    16-bit gray   divided by 257, rounded; smaller depths in 16 bits (12-bit TIFF) by their own maximum
    CMYK          Pillow's conversion, without a color profile
    LAB           to sRGB by LittleCMS
    alpha         composited over white or black, also for palettes and transparent colors, or dropped
    profiles      ignored, as in training code, or converted to sRGB
    otherwise     Pillow's conversion (gray, palette, YCbCr)

Pillow itself reads other images of 16 bits per channel by their high byte, and premultiplied alpha as plain alpha.

Colors are converted with the relative colorimetric intent and black point compensation: colors that sRGB has keep
their measured values, others become the nearest one, and black stays black. For profiles without tables, such as
Display P3 and Adobe RGB, the perceptual intent gives the same. A profile that is damaged or belongs to another mode is
ignored, as browsers do. So is one whose colors are those of sRGB within 1/255, so that most images keep their bytes.
"""

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from pipeline.errors import Rejected
from pipeline.images.decode_settings import DecodeSettings

MAX_PROFILE = 8 << 20  # bytes; a larger profile is ignored, because several are kept in memory
_PROFILES = 16  # in memory
_GRID = 17  # values per channel at which a profile is compared with sRGB
_GRAYS = np.arange(256, dtype=np.uint8)[None]
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE  # without its cache, threads can share it


def convert_to_rgb(image: Image.Image, settings: DecodeSettings) -> Image.Image:
    """Convert a loaded image to RGB by the rules of this module. Raises Rejected for 32-bit integers and floats."""
    image = _reduce_to_8_bits(image)
    if image.mode == "LAB":
        image = _make_lab_transform().apply(image)
    elif settings.color == "srgb":
        image = _convert_to_srgb(image)
    if settings.alpha == "drop" or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, settings.alpha), image).convert("RGB")


def _reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """Convert gray of 16 bits to 8 bits. A transparent value becomes an alpha channel."""
    is_gray = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not is_gray:
        raise Rejected("open", "unsupported_mode")
    if not is_gray:
        return image
    values, maximum = np.asarray(image).astype(np.uint32), 65535
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        maximum = 2 ** min(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0], 16) - 1
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # Pillow does so for 8 bits only
            values = maximum - values
    gray = Image.fromarray(((values * 255 + maximum // 2) // maximum).clip(0, 255).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if "icc_profile" in image.info:
        gray.info["icc_profile"] = image.info["icc_profile"]
    return gray


def _convert_to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colors of an image from its profile to sRGB, if it has one that can be used. Alpha is kept."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE:
        return image
    is_gray, has_alpha = image.mode in ("1", "L", "LA", "La"), image.has_transparency_data
    colors = image if image.mode == "CMYK" else image.convert("L" if is_gray else "RGB")
    transform = _make_transform(profile, colors.mode)
    if transform is None and is_gray:  # a gray image with a profile of RGB
        colors = image.convert("RGB")
        transform = _make_transform(profile, "RGB")
    if transform is None:
        return image
    converted = transform.apply(colors)
    if has_alpha:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=_PROFILES)
def _make_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion from a profile to sRGB. None: damaged, of another mode, or the same as sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = _build_transform(source, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, _GRID).round().astype(np.uint8)
    values = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3) if mode == "RGB" else _GRAYS
    samples = Image.fromarray(values)
    before, after = (np.asarray(colors).astype(int) for colors in (samples.convert("RGB"), transform.apply(samples)))
    return None if np.abs(before - after).max() <= 1 else transform


def _build_transform(source: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=_FLAGS)


@cache
def _make_lab_transform() -> ImageCms.ImageCmsTransform:
    return _build_transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")
