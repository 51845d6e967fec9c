"""Open an image for the encoder: decode its bytes, and transform the pixels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from pipeline.errors import FilteredOut, Rejected
from pipeline.images import decode
from pipeline.images.fit import Fit
from pipeline.images.near_empty import is_near_empty
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.images.transform import Transform
from pipeline.limits import Limits, check_columns
from pipeline.records import Filtered, PreparedImage, Reject, Sample, Unit


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An opened image: uint8 [H, W, 3], its original size, and how it was transformed.

    truncated: see `PreparedImage`.
    """

    pixels: Tensor
    original_height: int
    original_width: int
    fit: Fit
    truncated: bool | None = None


# Opens an image: its bytes, and the shard and the key that its random numbers follow from.
# Raises Rejected and FilteredOut.
Opener = Callable[[bytes, str, str], OpenedImage]


def make_opener(transform: Transform, limits: Limits, open_pixels: decode.OpenPixels = decode.open_pixels) -> Opener:
    """Return a function that opens images in the thread that calls it. open_pixels: decodes an image file."""
    return partial(open_image, transform, limits, open_pixels)


def open_image(
    transform: Transform,
    limits: Limits,
    open_pixels: decode.OpenPixels,
    data: bytes,
    shard: str,
    key: str,
) -> OpenedImage:
    """Decode and transform an image. See `Opener`."""
    settings = transform.decoding
    jpeg = decode.read_jpeg_header(data, settings) if transform.jpeg_decode == "scaled" else None
    reduction = transform.choose_reduction(jpeg.height, jpeg.width, jpeg.is_turned) if jpeg else 1
    truncated = False if settings.allow_truncated else None
    try:
        rgb = open_pixels(data, limits, reduction, replace(settings, allow_truncated=False))
    except Rejected as error:
        if error.reason != "corrupt" or not settings.allow_truncated:
            raise
        rgb, truncated = open_pixels(data, limits, reduction, settings), True
    height, width = (jpeg.height, jpeg.width) if jpeg else rgb.shape[:2]
    fit = transform.fit(height, width, shard, key)
    pixels = transform.apply(rgb, fit, (height / reduction, width / reduction))
    if transform.min_std and is_near_empty(pixels, transform.min_std):
        raise FilteredOut("min_std")
    return OpenedImage(pixels, height, width, fit, truncated)


def open_in_sandbox(transform: Transform, limits: Limits, data: bytes, shard: str, key: str) -> OpenedImage:
    """Open an image that may have ended another process. See `Opener`."""
    with SandboxedDecoder(limits) as decoder:
        return open_image(transform, limits, decoder.open_pixels, data, shard, key)


def prepare_sample(
    unit: Unit, sample: Sample | Reject, limits: Limits, opener: Opener
) -> PreparedImage | Reject | Filtered:
    """Open the image of a sample. Called in the threads of a pool."""
    if isinstance(sample, Reject):
        return sample
    try:
        check_columns(sample.columns, limits)
        opened = opener(sample.image, sample.shard or unit.path, sample.key)
    except Rejected as error:
        return Reject.from_error(sample.position, sample.key, error, sample.shard)
    except FilteredOut as error:
        return Filtered(sample.position, error.filter)
    return PreparedImage(
        shard=sample.shard or unit.path,
        position=sample.position,
        key=sample.key,
        columns=sample.columns,
        pixels=opened.pixels,
        original_height=opened.original_height,
        original_width=opened.original_width,
        resized_height=opened.fit.height,
        resized_width=opened.fit.width,
        crop_top=opened.fit.top,
        crop_left=opened.fit.left,
        enlarged=opened.fit.enlarged,
        flipped=opened.fit.flipped,
        truncated=opened.truncated,
    )
