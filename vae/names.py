"""The names of a model's tensors: ours, which are diffusers', and the older ones that files still have."""

import re
from collections.abc import Mapping

from torch import Tensor

_UP = re.compile(r"^decoder\.up\.(\d+)\.")
_RENAMED = (  # an older step, ours; \1 and \2 are levels and blocks
    # latent-diffusion's: SD's checkpoints, SDXL's, SD 3's, FLUX.1's
    (re.compile(r"\.down\.(\d+)\.block\.(\d+)\."), r".down_blocks.\1.resnets.\2."),
    (re.compile(r"\.down\.(\d+)\.downsample\."), r".down_blocks.\1.downsamplers.0."),
    (re.compile(r"\.up\.(\d+)\.block\.(\d+)\."), r".up_blocks.\1.resnets.\2."),
    (re.compile(r"\.up\.(\d+)\.upsample\."), r".up_blocks.\1.upsamplers.0."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\.([qkv])\."), r".mid_block.attentions.0.to_\1."),
    (re.compile(r"\.mid\.attn_1\.proj_out\."), ".mid_block.attentions.0.to_out.0."),
    (re.compile(r"\.mid\.attn_1\.norm\."), ".mid_block.attentions.0.group_norm."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
    # diffusers' before 0.17: the directories of SD 1
    (re.compile(r"\.query\."), ".to_q."),
    (re.compile(r"\.key\."), ".to_k."),
    (re.compile(r"\.value\."), ".to_v."),
    (re.compile(r"\.proj_attn\."), ".to_out.0."),
)


def rename_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, whichever they had; attention's 1x1 convolutions become matrices."""
    coarsest = max((int(match[1]) for name in weights if (match := _UP.match(name))), default=0)
    found = {}
    for old, tensor in weights.items():
        name = _UP.sub(lambda match: f"decoder.up.{coarsest - int(match[1])}.", old)  # ours counts in running order
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        convolution = ".attentions." in name and tensor.dim() == 4
        found[name] = tensor[:, :, 0, 0].contiguous() if convolution else tensor
    return found
