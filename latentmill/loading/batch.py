"""Batches: rows of several groups as tensors and lists, with latents as a diffusion model sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentmill.errors import UsageError
from latentmill.loading.batch_settings import BatchRules
from latentmill.loading.batch_settings import BatchSettings as BatchSettings
from latentmill.loading.batch_settings import check_settings as check_settings
from latentmill.loading.conditioning import make_sizes
from latentmill.loading.draws import add_noise, derive_seed, draw_noise
from latentmill.loading.draws import draw as draw
from latentmill.loading.index import Index
from latentmill.loading.row_groups import IDENTITY, RowGroup

Bools = NDArray[np.bool_]
Place = tuple[RowGroup, int]  # a group, and the number of a row in it


def make_batch(
    rules: BatchRules,
    index: Index,
    groups: Mapping[int, RowGroup],
    rows: NDArray[np.int64],
    valid: Bools | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    step: int = 0,
) -> dict[str, Any]:
    """Return a batch of rows of one bucket.

    It is a dict: `latents` [B, C, h, w] (or `moments` [B, 2C, h, w]), `captions`, `key` and `shard` as lists, the
    requested columns by their names (numbers as tensors [B], fixed-size lists of N numbers in added columns as [B, N],
    others as lists), `original_size`, `crop_top_left` and `target_size` [B, 2] and `time_ids` [B, 6] in int64,
    `flipped` and `valid` as bool [B], and `epoch`, `step` and `bucket`. Tensors are contiguous and on the CPU.

    groups: by their number in the index, at least those that `rows` needs. rows: the numbers of rows of the cache, [B].
    valid: [B]; None: all. Draws are keyed by (seed, epoch, shard, key), so they depend on no other row.
    """
    numbers = index.find_groups(rows)
    indexes = rows - index.starts[numbers]
    places = [(groups[number], row) for number, row in zip(numbers.tolist(), indexes.tolist(), strict=True)]
    bucket = places[0][0].bucket
    columns = {name: [group.columns[name][row] for group, row in places] for name in (*IDENTITY, *rules.columns)}
    geometry = np.stack([group.geometry[row] for group, row in places])

    def derive_seeds(purpose: str) -> list[int]:
        return [
            derive_seed(purpose, seed, epoch, shard, key)
            for shard, key in zip(columns["shard"], columns["key"], strict=True)
        ]

    flipped = geometry[:, -1].astype(np.bool_)
    if rules.settings.flip == "random":
        flipped = np.array(derive_seeds("flip")) % 2 == 1
    values = _gather(rules, places, flipped & (len(rules.layout.names) > 1))
    if rules.sample == "posterior":
        values = _draw_posterior(values, derive_seeds("sample"))
    captions = columns[rules.caption] if rules.caption else [None] * len(rows)
    sizes = make_sizes(geometry, bucket, flipped, rules.settings.conditioning)
    return {
        "moments" if rules.sample == "moments" else "latents": _convert(rules, values),
        "captions": captions,
        "key": columns["key"],
        "shard": columns["shard"],
        **{name: _make_column(name, columns, rules.kinds.get(name)) for name in rules.columns if name != rules.caption},
        **{name: torch.from_numpy(values) for name, values in sizes.items()},
        "time_ids": torch.from_numpy(np.concatenate(list(sizes.values()), axis=1)),
        "flipped": torch.from_numpy(flipped),
        "valid": torch.from_numpy(np.ones(len(rows), np.bool_) if valid is None else valid.copy()),
        "epoch": epoch,
        "step": step,
        "bucket": bucket,
    }


def _gather(rules: BatchRules, places: Sequence[Place], flipped: Bools) -> Tensor:
    """Return the latents of rows as they are stored, [B, C, h, w]; with the log-variances [B, 2C, h, w] if needed.

    flipped: whether to take `latent_flipped`, [B]. The bytes of each row are copied once. Copies of a `memoryview` keep
    the interpreter's lock: a thread that gives it up for each row waits for it longer than a copy takes.
    """
    layout, bucket = rules.layout, places[0][0].bucket
    (channels, height, width), size = layout.shape(bucket), layout.array_bytes(bucket)
    if rules.has_moments and rules.sample == "mode":  # the means are the first half
        channels, size = channels // 2, size // 2
    values = np.empty(len(places) * size, np.uint8)
    target = values.data
    for number, ((group, row), second) in enumerate(zip(places, flipped.tolist(), strict=True)):
        start = group.offsets.item(int(second), row)
        target[number * size : (number + 1) * size] = group.data[start : start + size]
    return torch.from_numpy(values).view(layout.torch_dtype).view(len(places), channels, height, width)


def _draw_posterior(moments: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return a latent of each of these moments, in float32. seeds: one per row."""
    mean, logvar = moments.to(torch.float32).chunk(2, dim=1)
    return add_noise(mean, logvar, draw_noise(seeds, mean.shape[1:]))


def _convert(rules: BatchRules, values: Tensor) -> Tensor:
    """Return latents with the scale and the dtype of the settings. Computation is in float32."""
    dtype = rules.settings.dtype or rules.layout.torch_dtype
    if rules.scaling is None:
        return values.to(dtype)
    if values.dtype != torch.float32:  # numpy's memory is in huge pages if it is large, torch's is not
        values = torch.from_numpy(np.empty(values.shape, np.float32)).copy_(values)
    return rules.scaling.to_model_in_place(values).to(dtype)


def _make_column(name: str, columns: Mapping[str, Sequence[Any]], kind: Any) -> Any:
    """Return a column as a tensor of this numpy dtype, [B] or [B, N], or as a list if it is None.

    Missing floats are NaN; a missing list cannot be a tensor.
    """
    values = columns[name]
    if kind is None:
        return values
    missing = [row for row, value in enumerate(values) if value is None]
    is_vector = any(isinstance(value, np.ndarray) for value in values)
    if missing and (is_vector or not np.issubdtype(kind, np.floating)):
        row = missing[0]
        raise UsageError(
            f"the column {name} has no value in the row {columns['key'][row]} of {columns['shard'][row]}, so it cannot "
            f"be a tensor: leave the column out"
        )
    return torch.from_numpy(np.array(values, kind))
