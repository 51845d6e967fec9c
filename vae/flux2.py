"""AutoencoderKLFlux2, the autoencoder of FLUX.2: read `vae.model` first.

It is an AutoencoderKL whose decoder may have other channels than its encoder, with statistics beside it. Raw latents
[B, C, H/f, W/f] become model latents in two steps, which are not part of `encode` and `decode`:

    pack        patches of 2 x 2 positions become channels: [B, 4C, H/2f, W/2f], in the order channel, row, column
    normalize   (z - bn.running_mean) / sqrt(bn.running_var + batch_norm_eps), per channel

`vae.scaling` has this rule. `bn` is never run: it holds the statistics under the names in the published files.

The interface is that of diffusers' AutoencoderKLFlux2, with the same names and results.
"""

import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vae.config import AutoencoderKLFlux2Config, VaeConfig
from vae.model import Autoencoder

COUNTER = "bn.num_batches_tracked"  # an integer that torch saves with the statistics; some files lack it


class AutoencoderKLFlux2(Autoencoder):
    """The autoencoder of FLUX.2, with random weights. Keyword arguments: the fields of `AutoencoderKLFlux2Config`.

    Raises ValueError for values that no AutoencoderKLFlux2 can have. Load trained weights with `from_pretrained` or
    `from_single_file`.
    """

    config_class = AutoencoderKLFlux2Config
    config: AutoencoderKLFlux2Config

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.bn = nn.BatchNorm2d(
            math.prod(self.config.patch_size) * self.config.latent_channels,
            eps=self.config.batch_norm_eps,
            momentum=self.config.batch_norm_momentum,
            affine=False,
        )

    @classmethod
    def from_weights(
        cls, config: VaeConfig, weights: dict[str, Tensor], path: str | Path, torch_dtype: torch.dtype | None = None
    ) -> Self:
        return super().from_weights(config, {COUNTER: torch.tensor(0), **weights}, path, torch_dtype)
