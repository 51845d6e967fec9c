"""Make checkpoints in the layouts in use: the names of latent-diffusion, and the tensors around a VAE."""

import re
from collections.abc import Mapping

from torch import Tensor

# A tensor outside the VAE for each family of full checkpoints. The names are those of the public checkpoints.
AROUND = {
    "sd": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "playground-v2.5": "edm_mean",
    "sd3": "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",
    "flux": "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
}


def ldm(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors in the layout of latent-diffusion.

    The decoder's levels are numbered from the finest, and attention has 1x1 convolutions.
    """
    levels = len({name.split(".")[2] for name in weights if name.startswith("decoder.up_blocks.")})
    return {prefix + _old_name(name, levels): _old_shape(name, tensor) for name, tensor in weights.items()}


def _old_name(name: str, levels: int) -> str:
    part, _, rest = name.partition(".")
    if rest.startswith("up_blocks."):
        level, rest = rest.removeprefix("up_blocks.").split(".", 1)
        rest = f"up.{levels - 1 - int(level)}.{rest}"
    rest = (
        rest.replace("down_blocks.", "down.")
        .replace("downsamplers.0", "downsample")
        .replace("upsamplers.0", "upsample")
    )
    rest = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", rest)
    attention = "mid_block.attentions.0."
    if rest.startswith(attention):
        old = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
        step, _, last = rest.removeprefix(attention).rpartition(".")
        rest = f"mid.attn_1.{old[step]}.{last}"
    return f"{part}." + rest.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut").replace(
        "conv_norm_out", "norm_out"
    )


def _old_shape(name: str, tensor: Tensor) -> Tensor:
    is_matrix = ".attentions." in name and tensor.dim() == 2
    return tensor[:, :, None, None].contiguous() if is_matrix else tensor
