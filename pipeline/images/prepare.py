"""Prepare a sample for the encoder: decode its image, and transform the pixels."""

import time

from pipeline.errors import Rejected
from pipeline.images import decode
from pipeline.images.transform import Transform
from pipeline.limits import Limits, check_columns
from pipeline.records import Filtered, PreparedImage, Reject, Sample, Unit


def prepare_sample(
    unit: Unit,
    sample: Sample | Reject,
    transform: Transform,
    limits: Limits,
    open_pixels: decode.OpenPixels = decode.open_pixels,
) -> tuple[PreparedImage | Reject | Filtered, float]:
    """Decode and transform a sample, and measure the seconds. Called in the threads of a pool."""
    start = time.perf_counter()
    return _decode_and_transform(unit, sample, transform, limits, open_pixels), time.perf_counter() - start


def _decode_and_transform(
    unit: Unit,
    sample: Sample | Reject,
    transform: Transform,
    limits: Limits,
    open_pixels: decode.OpenPixels,
) -> PreparedImage | Reject | Filtered:
    if isinstance(sample, Reject):
        return sample
    try:
        check_columns(sample.columns, limits)
        jpeg = decode.read_jpeg_header(sample.image) if transform.jpeg_decode == "scaled" else None
        reduction = transform.choose_reduction(jpeg.height, jpeg.width, jpeg.is_turned) if jpeg else 1
        rgb = open_pixels(sample.image, limits, reduction)
    except Rejected as error:
        return Reject.from_error(sample.position, sample.key, error)
    height, width = (jpeg.height, jpeg.width) if jpeg else rgb.shape[:2]
    fit = transform.fit(height, width, unit.path, sample.key)
    if fit is None:
        return Filtered(sample.position)
    return PreparedImage(
        shard=unit.path,
        position=sample.position,
        key=sample.key,
        columns=sample.columns,
        pixels=transform.apply(rgb, fit, (height / reduction, width / reduction)),
        original_height=height,
        original_width=width,
        crop_top=fit.top,
        crop_left=fit.left,
        enlarged=fit.enlarged,
        flipped=fit.flipped,
    )
