"""The names of a VAE's tensors: all layouts have those of diffusers once they are renamed.

Renamed are the layout of latent-diffusion (the checkpoints of SD, SDXL, SD 3, FLUX.1 and FLUX.2), and the attention of
diffusers before 0.17.
"""

import re
from collections.abc import Iterable

_UP = re.compile(r"^decoder\.up\.(\d+)\.")
_REPLACEMENTS = (  # older name, new name; \1 and \2 are level and block
    # latent-diffusion: the checkpoints of SD, SDXL, SD 3, FLUX.1 and FLUX.2
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
    # FLUX.2 has these in the encoder and in the decoder
    (re.compile(r"^encoder\.quant_conv\."), "quant_conv."),
    (re.compile(r"^decoder\.post_quant_conv\."), "post_quant_conv."),
    # diffusers before 0.17: the directories of SD 1
    (re.compile(r"\.query\."), ".to_q."),
    (re.compile(r"\.key\."), ".to_k."),
    (re.compile(r"\.value\."), ".to_v."),
    (re.compile(r"\.proj_attn\."), ".to_out.0."),
)


def rename_names(names: Iterable[str]) -> dict[str, str]:
    """Return the diffusers name of each tensor of a VAE by its name in the file."""
    names = list(names)
    last_level = max((int(match[1]) for name in names if (match := _UP.match(name))), default=0)
    renamed = {}
    for old in names:
        # latent-diffusion numbers the decoder's levels from the finest, diffusers in the order in which they run.
        name = _UP.sub(lambda match: f"decoder.up.{last_level - int(match[1])}.", old)
        for pattern, replacement in _REPLACEMENTS:
            name = pattern.sub(replacement, name)
        renamed[old] = name
    return renamed


def is_attention(name: str) -> bool:
    """Whether a tensor is of an attention, whose matrices are 1x1 convolutions in older files. name: in diffusers."""
    return ".attentions." in name
