"""Odd and damaged image files: all formats and modes that Pillow writes, with damage, and files that are no images."""

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipeline.images import formats
from tests.conftest import encoded, smooth
from tests.pipeline.images.profiles import embed_in_jp2, make_cmyk, make_gray, make_p3

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "JPEG": ({"quality": 20}, {"progressive": True}, {"subsampling": 0, "optimize": True}, {"restart_marker_rows": 1}),
    "PNG": ({"bits": 1}, {"compress_level": 0}, {"save_all": True, "append_images": [Image.new("RGB", (32, 24))]}),
    "WEBP": ({"lossless": True}, {"save_all": True, "append_images": [Image.new("RGB", (32, 24))]}),
    "AVIF": ({"quality": 10}, {"subsampling": "4:4:4"}),
    "GIF": ({"save_all": True, "append_images": [Image.new("RGB", (32, 24))]}, {"transparency": 0}),
    "TIFF": (
        *({"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd")),
        *({"compression": name} for name in ("group3", "group4", "webp")),
        {"big_tiff": True},
        {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]},
        {"strip_size": 100},
    ),
    "JPEG2000": ({"no_jp2": True}, {"irreversible": True}, {"tile_size": (16, 16)}, {"num_resolutions": 2}),
    "ICO": ({"bitmap_format": "bmp"}, {"sizes": [(16, 16), (24, 24)]}),
    "TGA": ({"compression": "tga_rle"}, {"orientation": 1}),
    "DDS": tuple({"pixel_format": name} for name in ("DXT1", "DXT3", "DXT5", "BC5")),
}
READ = frozenset({*formats.FORMATS, "TGA", "MPO"})


@dataclass(frozen=True)
class OddFile:
    """An image file. is_sound: it is undamaged, and of a format and a mode that are read. extension: with its dot."""

    name: str
    extension: str
    data: bytes
    is_sound: bool = False


def make_sound_files(modes: Sequence[str] = MODES) -> Iterator[OddFile]:
    """Yield a file for each format, mode and option that Pillow writes."""
    Image.init()
    extensions = {kind: end for end, kind in reversed(Image.registered_extensions().items())}
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in sorted(Image.SAVE):
        for mode in modes:
            profile = make_cmyk() if mode == "CMYK" else make_gray(1.6) if mode in ("L", "LA") else make_p3()
            choices = [{}, {"icc_profile": profile, "exif": exif}, *(OPTIONS.get(kind, ()) if len(mode) > 2 else ())]
            for number, options in enumerate(choices):
                if data := write_image(make_image(mode), kind, options):
                    if kind == "JPEG2000" and "icc_profile" in options:  # Pillow does not write it
                        data = embed_in_jp2(data, profile)
                    name = f"{kind}-{mode.replace(';', '')}-{number}"
                    is_sound = kind in READ and mode not in ("I", "F")
                    yield OddFile(name, extensions.get(kind, ".img"), data, is_sound)


def write_image(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    """Return an image file. Empty if Pillow does not write this mode with these options."""
    sink = io.BytesIO()
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(sink, kind, **options)
        return sink.getvalue()
    return b""


def make_image(mode: str) -> Image.Image:
    image = Image.fromarray(smooth(len(mode), 24, 32))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        lab = ImageCms.profileToProfile(image, *spaces, outputMode="LAB")
        assert lab is not None
        return lab
    if mode in ("RGBA", "LA", "PA"):
        image.putalpha(Image.fromarray(smooth(9, 24, 32)[:, :, 0]))
    return image.quantize(16).convert("PA") if mode == "PA" else image.convert(mode)


def damage(data: bytes, draw: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield a file with damage of several kinds. Most damage changes a header, if there is one."""
    for share in (0.03, 0.2, 0.5, 0.8, 0.98):
        yield f"cut-{share}", data[: int(len(data) * share)]
    for number in range(4):
        changed = bytearray(data)
        for place in draw.integers(0, min(len(data), 200 if number % 2 else len(data)), 3):
            changed[place] = draw.integers(256)
        yield f"changed-{number}", bytes(changed)
    middle = int(draw.integers(len(data)))
    yield "removed", data[:middle] + data[middle + 7 :]
    yield "doubled", data[:middle] + data[max(0, middle - 50) :]
    yield "zeros", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    yield "appended", data + bytes(100) + data


def make_other_files() -> Iterator[OddFile]:
    """Yield files that are no images, or not what their name says."""
    draw = np.random.default_rng(1)
    contents = {
        "empty": b"",
        "one-byte": b"\xff",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json": b'{"error": "not found"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="1" height="1"/></svg>',
        "text": b"See the other folder.\n" * 20,
        "zip": b"PK\3\4" + bytes(200),
        "gzip": b"\x1f\x8b\x08" + zlib.compress(b"x" * 500),
        "mp4": b"\0\0\0\x18ftypmp42" + bytes(500),
        "heic": b"\0\0\0\x18ftypheic" + bytes(500),
        "jxl": b"\xff\x0a" + bytes(100),
        "psd": b"8BPS" + bytes(500),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "trailer": encoded(smooth(1)) + b"\0" * 4096,
        "two-images": encoded(smooth(1)) + encoded(smooth(2), "PNG"),
    }
    for name, data in contents.items():
        yield OddFile(name, ".jpg", data)
    for number in range(40):
        yield OddFile(f"random-{number}", ".png", draw.bytes(int(draw.integers(1, 4000))))
    for kind, end in (("PNG", ".jpg"), ("AVIF", ".jpeg"), ("TIFF", ".webp"), ("JPEG", ".cr2"), ("GIF", ".heic")):
        yield OddFile(f"renamed-{kind}", end, encoded(smooth(3), kind), is_sound=True)


def make_corpus() -> Iterator[OddFile]:
    """Yield the whole corpus, some thousand files, always the same."""
    draw = np.random.default_rng(0)
    yield from make_other_files()
    for file in make_sound_files():
        yield file
        for name, data in damage(file.data, draw):
            yield OddFile(f"{file.name}-{name}", file.extension, data)
