"""Run the model on images larger than memory: overlapping tiles, each run alone, then blended where they overlap.

A tile has no context beyond its edges, so the results differ from those of the whole image. They agree with the tiling
of diffusers, which is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """The geometry of tiling. Lengths are in pixels or latents: those of the input, or those of the output.

    size: side of an input tile.
    step: distance between the starts of neighboring input tiles.
    blend: width of the band of output over which neighboring tiles are blended.
    keep: side of the part of a tile's output that is kept; the next tile's output follows it.
    """

    size: int
    step: int
    blend: int
    keep: int

    @classmethod
    def of(cls, size_in: int, size_out: int, overlap: float) -> "Tiles":
        """Return the geometry of tiles of side `size_in` whose output has side `size_out`.

        overlap: fraction of a tile's side that it shares with its neighbor, in [0, 1).
        """
        blend = int(size_out * overlap)
        return cls(size=size_in, step=int(size_in * (1 - overlap)), blend=blend, keep=size_out - blend)


def run_in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
    """Return the blended results of `run` on the tiles of x [B, C, H, W].

    Memory: two rows of output tiles, and the result.
    """
    rows: list[Tensor] = []
    previous_row: list[Tensor] = []
    for top in range(0, x.shape[2], tiles.step):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[3], tiles.step)):
            tile = run(x[:, :, top : top + tiles.size, left : left + tiles.size])
            if previous_row:
                _blend(previous_row[column], tile, tiles.blend, dim=2)
            if row:
                _blend(row[-1], tile, tiles.blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, : tiles.keep, : tiles.keep] for tile in row], dim=3))
        previous_row = row
    return torch.cat(rows, dim=2)


def _blend(previous: Tensor, tile: Tensor, extent: int, dim: int) -> None:
    """Blend the end of the `previous` tile into the beginning of `tile`, in place, over `extent` values of `dim`."""
    extent = min(previous.shape[dim], tile.shape[dim], extent)
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    ramp = (torch.arange(extent, dtype=torch.float32, device=tile.device) / max(extent, 1)).view(shape).to(tile.dtype)
    end = previous.narrow(dim, previous.shape[dim] - extent, extent)
    start = tile.narrow(dim, 0, extent)
    start.copy_(end * (1 - ramp) + start * ramp)
