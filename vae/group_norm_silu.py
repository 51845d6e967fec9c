"""Triton kernels for the normalizations, activations and additions of an encoder in the memory format channels_last.

They replace the operations between two convolutions, which are limited by memory traffic. Activations are read and
written once per step, in their own dtype, and all sums are in float32:

    x [B, C, H, W] -> `sum_moments` -> `normalize`: group norm, then SiLU     reads x twice, writes it once
    h, x           -> `add_residual`: h + x, and the moments of the sum       reads h and x once, writes h + x once

The bias of the convolution before is added by the kernel that reads the convolution's output. So the convolution itself
has none, and needs no pass to add it.

Group norm (Wu & He 2018) needs a mean and a variance per image and group. They are computed from the mean and the sum
of squared deviations of each channel in a block of rows by the parallel algorithm of Chan, Golub & LeVeque 1983,
"Algorithms for computing the sample variance", and in a block by Welford's update (1962). So they are exact for values
whose mean is far larger than their deviation, where the difference of E[x^2] and E[x]^2 is not.

The sums have a fixed order, that depends on H, W and C alone. So the results are the same in every run, and no bit
depends on the other images of a batch. Offsets have 64 bits: there is no limit of 2^31 elements.

The module needs triton, and a GPU or Triton's interpreter (the environment variable TRITON_INTERPRET=1).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vae import triton_kernels as kernels

TILE = 4096  # values that a program reads at once
MAX_TILES = 16  # that a program reads
BLOCKS = 64  # programs per image that are wanted; an image with more rows has programs with more tiles
MERGED = 1024  # partial moments that a program reads at once
WARPS = 4


@dataclass(frozen=True, slots=True)
class Moments:
    """The moments of an activation by image, block of rows and channel.

    mean, m2: float32 [B, blocks, C]; the mean, and the sum of the squared deviations from it.
    rows_per_block: rows of C channels in a block; the last block of an image may have fewer.
    """

    mean: Tensor
    m2: Tensor
    rows_per_block: int


@dataclass(frozen=True, slots=True)
class _Grid:
    """How an activation is divided into programs, each of `tiles` tiles of tile_rows x tile_channels."""

    rows: int
    tile_rows: int
    tile_channels: int
    tiles: int
    programs: tuple[int, int, int]  # row blocks, images, channel blocks

    @property
    def rows_per_block(self) -> int:
        return self.tile_rows * self.tiles

    @classmethod
    def of(cls, x: Tensor) -> "_Grid":
        """Return the division of an activation. It depends on the shape of an image, not on the number of images."""
        batch, channels, height, width = x.shape
        rows = height * width
        tile_channels = min(triton.next_power_of_2(channels), TILE)
        tile_rows = TILE // tile_channels
        tiles = max(1, min(MAX_TILES, rows // (tile_rows * BLOCKS)))
        blocks = triton.cdiv(rows, tile_rows * tiles)
        return cls(rows, tile_rows, tile_channels, tiles, (blocks, batch, triton.cdiv(channels, tile_channels)))


def sum_moments(x: Tensor) -> Moments:
    """Return the moments of x [B, C, H, W], which is channels_last. Raises ValueError if it is not."""
    _check_layout(x)
    grid = _Grid.of(x)
    moments = _make_moments(x, grid)
    kernels.sum_moments[grid.programs](
        x,
        moments.mean,
        moments.m2,
        grid.rows,
        grid.tiles,
        x.stride(0),
        CHANNELS=x.shape[1],
        TILE_ROWS=grid.tile_rows,
        TILE_CHANNELS=grid.tile_channels,
        num_warps=WARPS,
    )
    return moments


def normalize(
    x: Tensor,
    norm: torch.nn.GroupNorm,
    *,
    silu: bool,
    bias: Tensor | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """Return the group norm of x + bias [B, C, H, W], followed by SiLU or by nothing, in channels_last.

    x: channels_last. bias: [C], of the convolution that made x. moments: of x without `bias`, if they are known.
    Raises ValueError for another memory format.
    """
    _check_layout(x)
    moments = moments or sum_moments(x)
    grid, (batch, channels) = _Grid.of(x), x.shape[:2]
    per_group = channels // norm.num_groups
    center, scale = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    tile_channels = triton.next_power_of_2(per_group)
    kernels.merge_moments[(norm.num_groups, batch)](
        moments.mean,
        moments.m2,
        bias,
        norm.weight,
        center,
        scale,
        grid.rows,
        moments.mean.shape[1],
        moments.rows_per_block,
        norm.eps,
        CHANNELS=channels,
        PER_GROUP=per_group,
        TILE_BLOCKS=max(1, MERGED // tile_channels),
        TILE_CHANNELS=tile_channels,
        HAS_BIAS=bias is not None,
        num_warps=WARPS,
    )
    out = torch.empty_like(x, memory_format=torch.channels_last)
    kernels.normalize[grid.programs](
        x,
        center,
        scale,
        norm.bias,
        out,
        grid.rows,
        grid.tiles,
        x.stride(0),
        CHANNELS=channels,
        TILE_ROWS=grid.tile_rows,
        TILE_CHANNELS=grid.tile_channels,
        SILU=silu,
        num_warps=WARPS,
    )
    return out


def add_residual(h: Tensor, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Moments]:
    """Return h + x + bias [B, C, H, W] in channels_last, and the moments of this sum.

    h, x: [B, C, H, W] of one dtype, channels_last. bias: [C]. Raises ValueError for other memory formats.
    """
    _check_layout(h, x)
    out = torch.empty_like(h, memory_format=torch.channels_last)
    moments = _make_moments(h, _Grid.of(h))
    _launch_addition(h, x, bias, out, moments)
    return out, moments


def add_residual_padded(h: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return h + x + bias with a row of zeros below and a column of zeros on the right: [B, C, H + 1, W + 1].

    So the convolution of a `vae.blocks.Downsample` needs no copy that is padded. See `add_residual`.
    """
    _check_layout(h, x)
    batch, channels, height, width = h.shape
    rows = torch.empty(batch, height + 1, width + 1, channels, dtype=h.dtype, device=h.device)
    rows[:, height].zero_()
    rows[:, :, width].zero_()
    out = rows.permute(0, 3, 1, 2)
    _launch_addition(h, x, bias, out, None)
    return out


def _launch_addition(h: Tensor, x: Tensor, bias: Tensor | None, out: Tensor, moments: Moments | None) -> None:
    grid = _Grid.of(h)
    kernels.add_residual[grid.programs](
        h,
        x,
        bias,
        out,
        None if moments is None else moments.mean,
        None if moments is None else moments.m2,
        grid.rows,
        grid.tiles,
        h.shape[3],
        h.stride(0),
        x.stride(0),
        out.stride(0),
        CHANNELS=h.shape[1],
        TILE_ROWS=grid.tile_rows,
        TILE_CHANNELS=grid.tile_channels,
        HAS_BIAS=bias is not None,
        PADDED=moments is None,
        num_warps=WARPS,
    )


def _make_moments(x: Tensor, grid: _Grid) -> Moments:
    mean, m2 = torch.empty(2, x.shape[0], grid.programs[0], x.shape[1], dtype=torch.float32, device=x.device)
    return Moments(mean, m2, grid.rows_per_block)


def _check_layout(*activations: Tensor) -> None:
    """Raise ValueError unless all have one shape, and each image is contiguous in channels_last."""
    for x in activations:
        if x.shape != activations[0].shape or not x[:1].is_contiguous(memory_format=torch.channels_last):
            shapes = ", ".join(f"{list(x.shape)} with strides {x.stride()}" for x in activations)
            raise ValueError(f"activations must have one shape and the memory format channels_last, not {shapes}")
