"""Raw latents and model latents, and the only place that converts between them.

    raw latents     the encoder's output and the decoder's input; a cache stores these
    model latents   the input of a diffusion model: about zero mean and unit variance

The rule of a model family follows from the constants in its VAE's configuration (diffusers' pipelines, 0.42):

    latents_mean and latents_std   (z - mean) * scaling_factor / std, per channel (SDXL with Playground 2.5's VAE)
    shift_factor                   (z - shift_factor) * scaling_factor            (SD3, FLUX.1)
    otherwise                      z * scaling_factor                             (SD 1 and 2, SDXL)

A family whose rule is (z - mean) / std has scaling_factor 1. If there is a patch_size (FLUX.2), z is packed first:
patches of positions become channels, in the order channel, row, column. latents_mean and latents_std are then those of
the packed channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds, and `latentmill --help` needs no tensor
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """The rule model = (pack(raw) - shift) * scale.

    shift, scale: one value for all channels, or one per channel of the model latents. patch: height and width of the
    patches [C, p, q] of raw latents that are one position [C*p*q] of the model latents; (1, 1): nothing is packed.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    patch: tuple[int, int] = (1, 1)

    @classmethod
    def from_constants(
        cls,
        scaling_factor: float,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> "Scaling":
        """Return the rule that the constants of a VAE imply: those under `vae` in cache.json."""
        patch = patch_size or (1, 1)
        if latents_mean is not None and latents_std is not None:
            return cls(tuple(latents_mean), tuple(scaling_factor / std for std in latents_std), patch)
        return cls((shift_factor or 0.0,), (scaling_factor,), patch)

    def to_model(self, raw: "Tensor") -> "Tensor":
        """Return the model latents of raw latents [..., C, h, w], of the same dtype.

        They have the same shape, or [..., C*p*q, h/p, w/q] if patches are packed. Raises ValueError if h or w is not a
        multiple of the patch's side.
        """
        packed = self._pack(raw)
        shift, scale = self._make_constants_like(packed)
        return (packed - shift) * scale

    def to_model_in_place(self, raw: "Tensor") -> "Tensor":
        """Return what `to_model` returns. The raw latents are lost: the result may be in their memory."""
        packed = self._pack(raw)
        shift, scale = self._make_constants_like(packed)
        return packed.sub_(shift).mul_(scale)

    def to_raw(self, model: "Tensor") -> "Tensor":
        """Return the raw latents of model latents, of the same dtype: the inverse of `to_model`."""
        shift, scale = self._make_constants_like(model)
        return self._unpack(model / scale + shift)

    def _pack(self, raw: "Tensor") -> "Tensor":
        """Return latents [..., C, h, w] as [..., C*p*q, h/p, w/q]."""
        if self.patch == (1, 1):
            return raw
        (*batch, channels, rows, columns), (height, width) = raw.shape, self.patch
        if rows % height or columns % width:
            sides = f"{rows} x {columns}"
            raise ValueError(
                f"latents of {sides} cannot be packed: the sides must be multiples of {height} and {width}"
            )
        patches = raw.reshape(*batch, channels, rows // height, height, columns // width, width)
        return patches.movedim((-3, -1), (-4, -3)).flatten(-5, -3)

    def _unpack(self, packed: "Tensor") -> "Tensor":
        """Return latents [..., C*p*q, h, w] as [..., C, h*p, w*q]."""
        if self.patch == (1, 1):
            return packed
        *batch, channels, rows, columns = packed.shape
        height, width = self.patch
        patches = packed.reshape(*batch, channels // (height * width), height, width, rows, columns)
        return patches.movedim((-4, -3), (-3, -1)).flatten(-2).flatten(-3, -2)

    def _make_constants_like(self, latents: "Tensor") -> "tuple[Tensor, Tensor]":
        """Return shift and scale as [C or 1, 1, 1], of the dtype and on the device of the latents."""
        shift, scale = (latents.new_tensor(values).view(-1, 1, 1) for values in (self.shift, self.scale))
        return shift, scale
