"""Batches: rows of several groups as tensors and lists, scaled as a diffusion model sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentmill.loading.index import Index
from latentmill.loading.row_groups import RowGroup
from latentmill.micro_conditioning import Convention

if TYPE_CHECKING:
    from latentmill.cache import Cache


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """What a batch has.

    columns: further columns. caption_column: the one that is `captions`; None: `txt` if the cache has it, otherwise
    captions are None. sample: of a cache of moments, "mode" (the mean; the default), "posterior" (a draw for each
    epoch) or "moments" (the raw moments). scale: True: model latents by the constants in cache.json. "dataset":
    (z - mean) / std by stats.json, per raw channel. False: raw latents. dtype: None: as stored, which needs
    scale=False. flip: "random" takes each epoch for each row `latent` or
    `latent_flipped`, of a cache with `--flip both`. conditioning: the meaning of the sizes (`latentmill.time_ids`).
    """

    columns: tuple[str, ...] = ()
    caption_column: str | None = None
    sample: Literal["mode", "posterior", "moments"] | None = None
    scale: bool | Literal["dataset"] = True
    dtype: torch.dtype | None = torch.float32
    flip: Literal["none", "random"] = "none"
    conditioning: Convention = "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """Settings that were checked against a cache. columns: those that a `GroupReader` must read for them."""

    settings: BatchSettings
    columns: tuple[str, ...]


def check_settings(cache: "Cache", settings: BatchSettings) -> BatchRules:
    """Return the rules of batches. Raises UsageError for settings that the cache does not allow, saying what it has."""
    raise NotImplementedError


def make_batch(
    rules: BatchRules,
    index: Index,
    groups: Mapping[int, RowGroup],
    rows: NDArray[np.int64],
    valid: NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    step: int = 0,
) -> dict[str, Any]:
    """Return a batch of rows of one bucket, as docs/training.md describes it.

    groups: by their number in the index, at least those that `rows` needs. rows: the numbers of rows of the cache, [B].
    valid: [B]; None: all. Draws are keyed by (seed, epoch, shard, key), so they depend on no other row.
    """
    raise NotImplementedError


def draw(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a random latent [..., C, h, w] of moments [..., 2C, h, w]: mean + std * noise, of their dtype and device.

    The log-variance is clamped to [-30, 20] as in `vae.posterior`. generator: of the noise, on any device.
    """
    raise NotImplementedError
