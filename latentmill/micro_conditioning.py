"""SDXL's micro-conditioning from the columns of a row: six numbers, with the meaning that a trainer gives them.

The UNet of SDXL takes the original size of an image, the top left corner of its crop, and the size of the crop (Podell
et al. 2023, section 2.2). Trainers agree on the order, height before width and top before left, but not on the meaning.
A row has the facts (`original_*`, `resized_*`, `crop_*`, `height`, `width`, `flipped`), from which each follows.
"""

from collections.abc import Mapping
from typing import Any, Literal

Convention = Literal["diffusers", "sd-scripts", "simpletuner"]
TimeIds = tuple[int, int, int, int, int, int]


def time_ids(row: Mapping[str, Any], convention: Convention = "diffusers", flipped: bool | None = None) -> TimeIds:
    """Return (original height, original width, crop top, crop left, target height, target width), in pixels.

    row: of a cache; only its columns with sizes are read. convention: whose meaning the numbers have.

    - "diffusers", also Stability's: the original size is that of the file. The crop is in the resized image. It is
      mirrored before the crop, so `left` counts in the mirrored image.
    - "sd-scripts": the original size is that of the file. Instead of the crop that was made, the borders of the whole
      image inside the target are given, as its `get_crop_ltrb` computes them. In a mirrored image, left and right are
      exchanged.
    - "simpletuner": the original size is that of the resized image. The crop is as for diffusers; SimpleTuner itself
      mirrors no images.

    flipped: whether the numbers are for the mirrored image; None: whether the row's `latent` is.
    Raises ValueError for another convention, and KeyError if the row lacks a column.
    """
    mirrored = bool(row["flipped"]) if flipped is None else flipped
    target = row["height"], row["width"]
    if convention == "sd-scripts":
        left, top, _, _ = find_borders(row, mirrored)
        return (row["original_height"], row["original_width"], int(top), int(left), *target)
    left = row["resized_width"] - row["crop_left"] - row["width"] if mirrored else row["crop_left"]
    if convention == "diffusers":
        return (row["original_height"], row["original_width"], row["crop_top"], left, *target)
    if convention == "simpletuner":
        return (row["resized_height"], row["resized_width"], row["crop_top"], left, *target)
    raise ValueError(f"'{convention}' is not one of diffusers, sd-scripts, simpletuner")


def find_borders(row: Mapping[str, Any], flipped: bool | None = None) -> tuple[float, float, float, float]:
    """Return sd-scripts' `crop_ltrb` of a row: left, top, right and bottom, in pixels of the target.

    They are the borders of the whole image inside the target, as if it were resized to fit into it. flipped: as in
    `time_ids`.
    """
    mirrored = bool(row["flipped"]) if flipped is None else flipped
    width, height = float(row["width"]), float(row["height"])
    ratio = row["original_width"] / row["original_height"]
    wide, tall = (height * ratio, height) if width / height > ratio else (width, width / ratio)
    left, top = (width - wide) // 2, (height - tall) // 2
    right = left + wide
    if mirrored:
        left, right = width - right, width - left
    return left, top, right, top + tall
