"""Raw latents and model latents, and the only place that converts between them.

    raw latents     the encoder's output and the decoder's input; a cache stores these
    model latents   the input of a diffusion model: about zero mean and unit variance

The rule of a model family follows from the constants in its VAE's configuration (diffusers' pipelines, 0.42):

    latents_mean and latents_std   (z - mean) * scaling_factor / std, per channel (SDXL with Playground 2.5's VAE)
    shift_factor                   (z - shift_factor) * scaling_factor            (SD3, FLUX.1)
    otherwise                      z * scaling_factor                             (SD 1 and 2, SDXL)

A family whose rule is (z - mean) / std has scaling_factor 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds, and `latentmill --help` needs no tensor
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """The rule model = (raw - shift) * scale. shift, scale: one value for all channels, or one per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def from_constants(
        cls,
        scaling_factor: float,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> "Scaling":
        """Return the rule that the constants of a VAE's configuration imply."""
        if latents_mean is not None and latents_std is not None:
            return cls(tuple(latents_mean), tuple(scaling_factor / std for std in latents_std))
        return cls((shift_factor or 0.0,), (scaling_factor,))

    def to_model(self, raw: "Tensor") -> "Tensor":
        """Return the model latents of raw latents [..., C, h, w], of the same shape and dtype."""
        shift, scale = self._make_constants_like(raw)
        return (raw - shift) * scale

    def to_raw(self, model: "Tensor") -> "Tensor":
        """Return the raw latents of model latents [..., C, h, w], of the same shape and dtype."""
        shift, scale = self._make_constants_like(model)
        return model / scale + shift

    def _make_constants_like(self, latents: "Tensor") -> "tuple[Tensor, Tensor]":
        """Return shift and scale as [C or 1, 1, 1], of the dtype and on the device of the latents."""
        shift, scale = (latents.new_tensor(values).view(-1, 1, 1) for values in (self.shift, self.scale))
        return shift, scale
