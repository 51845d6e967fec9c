"""Raw latents and model latents, and the only place that converts between them.

    raw latents     what the encoder puts out and the decoder takes in; what a cache stores
    model latents   what a diffusion model sees: brought to about zero mean and unit variance

Which rule a model family uses follows from its VAE's configuration (diffusers' pipelines, 0.42):

    latents_mean and latents_std   (z - mean) * scaling_factor / std, a channel   (SDXL with Playground 2.5's VAE)
    shift_factor                   (z - shift_factor) * scaling_factor            (SD3, FLUX.1)
    else                           z * scaling_factor                             (SD 1 and 2, SDXL)

A family whose rule is (z - mean) / std has scaling_factor 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vae.config import AutoencoderKLConfig


@dataclass(frozen=True, slots=True)
class Scaling:
    """model = (raw - shift) * scale; both are numbers, or a channel each."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw latents [..., C, h, w] -> model latents of the same shape and dtype."""
        shift, scale = self._as(raw)
        return (raw - shift) * scale

    def to_raw(self, model: Tensor) -> Tensor:
        """Model latents [..., C, h, w] -> raw latents of the same shape and dtype."""
        shift, scale = self._as(model)
        return model / scale + shift

    def _as(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, dtype=latents.dtype, device=latents.device).view(-1, 1, 1)
            for values in (self.shift, self.scale)
        )


def scaling_of(config: AutoencoderKLConfig) -> Scaling:
    """The rule that a VAE's configuration implies."""
    factor = config.scaling_factor
    if config.latents_mean is not None and config.latents_std is not None:
        return Scaling(config.latents_mean, tuple(factor / std for std in config.latents_std))
    return Scaling((config.shift_factor or 0.0,), (factor,))
