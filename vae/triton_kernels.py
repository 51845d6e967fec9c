"""The kernels of `vae.group_norm_silu`, in Triton's subset of Python.

A row is one position of an image with all its channels, and a tile is TILE_ROWS rows of TILE_CHANNELS channels. A
program processes `tiles` tiles, one after the other: program (i, b, c) has the i-th block of rows of image b, and the
c-th block of channels. Offsets have 64 bits. Values are converted to float32 when they are read.
"""

import triton
import triton.language as tl


@triton.jit
def _find_tile(
    tile,
    rows,
    tiles,
    CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Return the rows [R] of a tile of this program, its channels [C], and the mask [R, C] of those that exist."""
    row = (tl.program_id(0) * tiles + tile).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(2) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    return row, channel, mask


@triton.jit
def _update_moments(x, mask, mean, m2, tile):
    """Return the running moments [R, C] with the values x [R, C] of another tile (Welford's update)."""
    delta = tl.where(mask, x - mean, 0.0)
    mean += delta * (1.0 / (tile + 1))
    m2 += delta * (x - mean)
    return mean, m2


@triton.jit
def _store_moments(
    mean,
    m2,
    mean_ptr,
    m2_ptr,
    rows,
    tiles,
    CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Merge the running moments [R, C] over their rows, and store them for this program's block."""
    row, channel, _ = _find_tile(0, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)
    values = tl.minimum(tl.maximum((rows - row + TILE_ROWS - 1) // TILE_ROWS, 0), tiles)  # per row of the tile
    count = values.to(tl.float32)[:, None]
    total = tl.sum(values, axis=0).to(tl.float32)
    # The first row of a block always exists. Its mean is subtracted, so that the weighted sum is small.
    first = tl.sum(tl.where(tl.arange(0, TILE_ROWS)[:, None] == 0, mean, 0.0), axis=0)
    merged = first + tl.sum(count * (mean - first[None, :]), axis=0) / total
    deviation = mean - merged[None, :]
    merged_m2 = tl.sum(m2 + count * deviation * deviation, axis=0)
    offset = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + channel
    tl.store(mean_ptr + offset, merged, mask=channel < CHANNELS)
    tl.store(m2_ptr + offset, merged_m2, mask=channel < CHANNELS)


@triton.jit
def sum_moments(
    x_ptr,
    mean_ptr,
    m2_ptr,
    rows,
    tiles,
    image_stride,
    CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    x_ptr += tl.program_id(1).to(tl.int64) * image_stride
    mean = tl.zeros((TILE_ROWS, TILE_CHANNELS), tl.float32)
    m2 = tl.zeros((TILE_ROWS, TILE_CHANNELS), tl.float32)
    for tile in range(tiles):
        row, channel, mask = _find_tile(tile, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)
        x = tl.load(x_ptr + row[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        mean, m2 = _update_moments(x, mask, mean, m2, tile)
    _store_moments(mean, m2, mean_ptr, m2_ptr, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)


@triton.jit
def merge_moments(
    mean_ptr,
    m2_ptr,
    bias_ptr,
    weight_ptr,
    center_ptr,
    scale_ptr,
    rows,
    blocks,
    rows_per_block,
    eps,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Store what `_normalize` subtracts (`center`) and multiplies by (`scale`), for the channels of one group."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, TILE_CHANNELS)
    is_channel = lane < PER_GROUP
    channel = group * PER_GROUP + lane
    bias = tl.zeros((TILE_CHANNELS,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    start = image * blocks * CHANNELS
    values = tl.full((), PER_GROUP, tl.float32) * rows
    # The mean of one channel is subtracted before means are summed, so that the sums are small.
    near = tl.load(mean_ptr + start + group * PER_GROUP) + tl.sum(tl.where(lane == 0, bias, 0.0), axis=0)
    total = tl.zeros((TILE_BLOCKS, TILE_CHANNELS), tl.float32)
    for first in range(0, blocks, TILE_BLOCKS):
        block = first + tl.arange(0, TILE_BLOCKS)
        mask = (block < blocks)[:, None] & is_channel[None, :]
        count = tl.minimum(rows_per_block, rows - block * rows_per_block).to(tl.float32)[:, None]
        mean = tl.load(mean_ptr + start + block[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        total += tl.where(mask, count * (mean + bias[None, :] - near), 0.0)
    merged = near + tl.sum(tl.sum(total, axis=1), axis=0) / values
    total = tl.zeros((TILE_BLOCKS, TILE_CHANNELS), tl.float32)
    for first in range(0, blocks, TILE_BLOCKS):
        block = first + tl.arange(0, TILE_BLOCKS)
        mask = (block < blocks)[:, None] & is_channel[None, :]
        count = tl.minimum(rows_per_block, rows - block * rows_per_block).to(tl.float32)[:, None]
        offset = start + block[:, None] * CHANNELS + channel[None, :]
        deviation = tl.load(mean_ptr + offset, mask=mask, other=0.0) + bias[None, :] - merged
        m2 = tl.load(m2_ptr + offset, mask=mask, other=0.0)
        total += tl.where(mask, m2 + count * deviation * deviation, 0.0)
    variance = tl.sum(tl.sum(total, axis=1), axis=0) / values
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(center_ptr + image * CHANNELS + channel, merged - bias, mask=is_channel)
    tl.store(scale_ptr + image * CHANNELS + channel, weight / tl.sqrt(variance + eps), mask=is_channel)


@triton.jit
def normalize(
    x_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    rows,
    tiles,
    image_stride,
    CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    x_ptr += image * image_stride
    out_ptr += image * rows * CHANNELS
    _, channel, _ = _find_tile(0, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)
    center = tl.load(center_ptr + image * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    scale = tl.load(scale_ptr + image * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    shift = tl.load(shift_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        row, channel, mask = _find_tile(tile, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)
        offset = row[:, None] * CHANNELS + channel[None, :]
        y = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - center) * scale + shift
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_residual(
    h_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    m2_ptr,
    rows,
    tiles,
    width,
    h_stride,
    x_stride,
    out_stride,
    CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    h_ptr += image * h_stride
    x_ptr += image * x_stride
    out_ptr += image * out_stride
    mean = tl.zeros((TILE_ROWS, TILE_CHANNELS), tl.float32)
    m2 = tl.zeros((TILE_ROWS, TILE_CHANNELS), tl.float32)
    for tile in range(tiles):
        row, channel, mask = _find_tile(tile, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)
        offset = row[:, None] * CHANNELS + channel[None, :]
        y = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
        y += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = y.to(out_ptr.dtype.element_ty)
        if PADDED:
            tl.store(out_ptr + (row + row // width)[:, None] * CHANNELS + channel[None, :], rounded, mask=mask)
        else:
            tl.store(out_ptr + offset, rounded, mask=mask)
            mean, m2 = _update_moments(rounded.to(tl.float32), mask, mean, m2, tile)
    if not PADDED:
        _store_moments(mean, m2, mean_ptr, m2_ptr, rows, tiles, CHANNELS, TILE_ROWS, TILE_CHANNELS)
