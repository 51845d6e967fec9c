"""SDXL's micro-conditioning of a whole batch: `latentmill.time_ids` of many rows at once."""

import numpy as np
from numpy.typing import NDArray

from latentmill.micro_conditioning import Convention

Int64s = NDArray[np.int64]


def make_sizes(
    geometry: Int64s, bucket: tuple[int, int], flipped: NDArray[np.bool_], convention: Convention
) -> dict[str, Int64s]:
    """Return `original_size`, `crop_top_left` and `target_size` of rows: (height, width) or (top, left), [B, 2].

    geometry: the columns `row_groups.GEOMETRY`, [B, 7]. bucket: the height and width of the images in pixels. flipped:
    whether the latent is of the mirrored image, [B]. convention: see `latentmill.time_ids`.
    """
    original, resized, crop = geometry[:, 0:2], geometry[:, 2:4], geometry[:, 4:6]
    if convention == "sd-scripts":
        crop = _find_borders(original, bucket, flipped)
    else:
        left = np.where(flipped, resized[:, 1] - crop[:, 1] - bucket[1], crop[:, 1])
        crop = np.stack([crop[:, 0], left], axis=1)
    return {
        "original_size": np.ascontiguousarray(resized if convention == "simpletuner" else original),
        "crop_top_left": crop,
        "target_size": np.tile(np.array(bucket, np.int64), (len(geometry), 1)),
    }


def _find_borders(original: Int64s, bucket: tuple[int, int], flipped: NDArray[np.bool_]) -> Int64s:
    """Return the top and left border of images that are resized to fit into the target as a whole, [B, 2]."""
    ratio, (out_height, out_width) = original[:, 1] / original[:, 0], bucket
    is_narrow = out_width / out_height > ratio
    wide = np.where(is_narrow, out_height * ratio, out_width)
    tall = np.where(is_narrow, out_height, out_width / ratio)
    top, left = (out_height - tall) // 2, (out_width - wide) // 2
    return np.stack([top, np.where(flipped, out_width - (left + wide), left)], axis=1).astype(np.int64)
