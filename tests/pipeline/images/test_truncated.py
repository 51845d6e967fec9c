"""Images that lack their end: rejected, or accepted as Pillow does, in one thread only."""

import io
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.errors import Rejected
from pipeline.images import decode
from pipeline.images.decode import open_pixels
from pipeline.images.decode_settings import DecodeSettings
from pipeline.images.opener_processes import OpenerProcesses
from pipeline.images.prepare import make_opener, open_in_sandbox
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.images.transform import Transform
from pipeline.limits import DEFAULT_LIMITS
from tests.conftest import encoded, smooth
from tests.pipeline.images.test_decode import noise

ACCEPT = DecodeSettings(allow_truncated=True)
ACCEPTING = Transform(resolution=32, decoding=ACCEPT)
# Formats that Pillow decodes piece by piece, so that it can stop anywhere.
PIECEWISE: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("PPM", {}),
    ("TGA", {}),
    ("TGA", {"compression": "tga_rle"}),
    ("PCX", {}),
    ("SGI", {}),
]


def cut(kind: str = "JPEG", share: float = 0.6, **options: Any) -> bytes:
    data = encoded(noise(64, 64), kind, **options)
    return data[: int(len(data) * share)]


def reason_of(data: bytes, settings: DecodeSettings = DecodeSettings()) -> str:
    with pytest.raises(Rejected) as caught:
        open_pixels(data, DEFAULT_LIMITS, 1, settings)
    return caught.value.reason


@pytest.mark.parametrize(("kind", "options"), PIECEWISE)
def test_a_truncated_image_is_what_pillow_makes_of_it(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cut(kind, **options)
    assert reason_of(data) == "corrupt"
    accepted = open_pixels(data, DEFAULT_LIMITS, 1, ACCEPT)
    assert reason_of(data) == "corrupt"
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert np.array_equal(accepted, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_missing_pixels_of_a_jpeg_are_gray() -> None:
    whole, accepted = open_pixels(encoded(noise(64, 64))), open_pixels(cut(), DEFAULT_LIMITS, 1, ACCEPT)
    assert np.array_equal(accepted[:24], whole[:24])
    assert (accepted[-8:] == 128).all()


def test_an_end_mark_that_is_missing_is_accepted() -> None:
    data = encoded(noise(64, 64))
    assert reason_of(data[:-2]) == "corrupt"
    assert np.array_equal(open_pixels(data[:-2], DEFAULT_LIMITS, 1, ACCEPT), open_pixels(data))


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_formats_that_are_decoded_at_once_stay_corrupt(kind: str) -> None:
    assert reason_of(cut(kind), ACCEPT) == "corrupt"


@pytest.mark.parametrize("data", [b"", b"no image", encoded(noise(64, 64))[:100]])
def test_a_file_without_a_header_is_rejected(data: bytes) -> None:
    assert reason_of(data, ACCEPT) == reason_of(data)


def test_damage_that_is_no_truncation_is_rejected() -> None:
    """Pillow would accept it, too."""
    png = bytearray(encoded(noise(64, 64), "PNG"))
    png[len(png) // 2] ^= 0xFF
    assert reason_of(bytes(png), ACCEPT) == "corrupt"
    content = zlib.compress(b"too short")
    whole = encoded(noise(64, 64), "PNG")
    start = whole.index(b"IDAT")
    chunk = b"IDAT" + content
    short = whole[: start - 4] + len(content).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + whole[-12:]
    assert reason_of(short, ACCEPT) == "corrupt"


def test_another_thread_stays_strict() -> None:
    inside, done = threading.Event(), threading.Event()

    def accept() -> None:
        with decode._accept_truncated():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=accept)
    thread.start()
    inside.wait(10)
    try:
        assert reason_of(cut()) == reason_of(cut("PNG")) == "corrupt"
    finally:
        done.set()
        thread.join()


def test_an_opened_image_says_whether_it_is_truncated() -> None:
    whole, damaged = encoded(noise(64, 64)), cut()
    opener = make_opener(ACCEPTING, DEFAULT_LIMITS)
    first, second = opener(whole, "s", "0"), opener(damaged, "s", "1")
    assert first is not None
    assert second is not None
    assert (first.truncated, second.truncated) == (False, True)
    strict = make_opener(Transform(resolution=32), DEFAULT_LIMITS)
    third = strict(whole, "s", "0")
    assert third is not None
    assert third.truncated is None
    with pytest.raises(Rejected, match="corrupt"):
        strict(damaged, "s", "1")


@pytest.mark.slow
def test_other_processes_say_whether_an_image_is_truncated() -> None:
    damaged = cut()
    expected = make_opener(ACCEPTING, DEFAULT_LIMITS)(damaged, "s", "1")
    assert expected is not None
    for opened in (
        open_in_sandbox(ACCEPTING, DEFAULT_LIMITS, damaged, "s", "1"),
        OpenerProcesses(1, ACCEPTING, DEFAULT_LIMITS).open_image(damaged, "s", "1"),
    ):
        assert opened is not None
        assert opened.truncated
        assert opened.pixels.equal(expected.pixels)


def test_a_truncated_jpeg_is_reduced_as_a_whole_one() -> None:
    data = encoded(smooth(1, 512, 512))
    scaled = Transform(resolution=32, jpeg_decode="scaled", decoding=ACCEPT)
    opened = make_opener(scaled, DEFAULT_LIMITS)(data[: len(data) * 9 // 10], "s", "0")
    whole = make_opener(scaled, DEFAULT_LIMITS)(data, "s", "0")
    assert opened is not None
    assert whole is not None
    assert opened.truncated
    assert (opened.original_height, opened.original_width) == (512, 512)
    assert (opened.pixels[:16].int() - whole.pixels[:16].int()).abs().max() <= 4


def test_the_sandbox_rejects_with_the_same_detail() -> None:
    with SandboxedDecoder(DEFAULT_LIMITS) as decoder:
        for data in (b"<!DOCTYPE html><html>", b"8BPS" + bytes(100), cut()):
            with pytest.raises(Rejected) as expected:
                open_pixels(data)
            with pytest.raises(Rejected) as caught:
                decoder.open_pixels(data, DEFAULT_LIMITS)
            assert caught.value.detail == expected.value.detail
