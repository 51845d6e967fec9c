"""Prepared images for the tests of the encoder: those of the self-check, cut to a size."""

from pipeline.encoder import make_checked_image
from pipeline.records import PreparedImage


def make_image(number: int, height: int = 256, width: int = 256) -> PreparedImage:
    """Return a prepared image. height, width: up to 256 pixels."""
    return PreparedImage(
        shard="s",
        position=number,
        key=str(number),
        columns={},
        pixels=make_checked_image(number)[:height, :width].contiguous(),
        original_height=height,
        original_width=width,
        resized_height=height,
        resized_width=width,
        crop_top=0,
        crop_left=0,
        enlarged=False,
    )
