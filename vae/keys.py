"""Tensor names: this package uses those of diffusers, and older layouts are renamed to them."""

from collections.abc import Mapping

from torch import Tensor

from latentmill.weight_names import is_attention, rename_names


def rename_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under their diffusers names, whichever layout the names have (`latentmill.weight_names`).

    The 1x1 convolutions [out, in, 1, 1] of an older attention become matrices [out, in]. Other values are unchanged.
    """
    renamed = {}
    for old, name in rename_names(weights).items():
        tensor = weights[old]
        is_convolution = is_attention(name) and tensor.dim() == 4
        renamed[name] = tensor[:, :, 0, 0].contiguous() if is_convolution else tensor
    return renamed
