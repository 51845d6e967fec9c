"""How image files are decoded: the settings that belong to a cache's identity."""

from dataclasses import dataclass

from pipeline.records import Alpha, Color, Exif


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """How an image file becomes RGB. The defaults are those of the transform `center-crop`.

    exif: "apply" turns the image by its EXIF orientation. alpha: "white" and "black" composite it over that color;
    "drop" keeps the colors of transparent pixels. color: "srgb" converts from the embedded color profile to sRGB.
    allow_truncated: accept files that lack their end.
    """

    exif: Exif = "apply"
    alpha: Alpha = "white"
    color: Color = "keep"
    allow_truncated: bool = False


DEFAULT_DECODING = DecodeSettings()
