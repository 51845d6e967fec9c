"""Images larger than memory: overlapping tiles, each through the model alone, blended where they overlap.

A tile sees nothing beyond its edge, so the numbers are not those of the whole image; they are those of diffusers'
tiling, which is the reference for them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a model is run in tiles. Sides in pixels or latents of what goes in or comes out.

    size: of a tile that goes in. step: from one tile's beginning to the next one's. blend: over how much of what comes
    out two neighbours are mixed. keep: how much of a tile's output is its own, before the next one begins.
    """

    size: int
    step: int
    blend: int
    keep: int

    @classmethod
    def of(cls, size_in: int, size_out: int, overlap: float) -> "Tiles":
        """Tiles of `size_in` that come out as `size_out` and share a fraction `overlap` with their neighbours."""
        blend = int(size_out * overlap)
        return cls(size=size_in, step=int(size_in * (1 - overlap)), blend=blend, keep=size_out - blend)


def run_in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
    """`run` on tiles of x [B, C, H, W], put together again. Two rows of tiles are held at a time, and the result."""
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], tiles.step):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[3], tiles.step)):
            tile = run(x[:, :, top : top + tiles.size, left : left + tiles.size])
            if above:
                _blend(above[column], tile, tiles.blend, dim=2)
            if row:
                _blend(row[-1], tile, tiles.blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, : tiles.keep, : tiles.keep] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> None:
    """Fade the beginning of `tile` in from the end of the tile before it, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    share = (torch.arange(extent, dtype=torch.float32, device=tile.device) / max(extent, 1)).view(shape).to(tile.dtype)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start = tile.narrow(dim, 0, extent)
    start.copy_(end * (1 - share) + start * share)
