"""A model in one file, under the names it was trained with: `encoder.down.0.block.0.conv1.weight`.

That is the layout of latent-diffusion (SD's `.ckpt`), kept by SDXL, SD 3 and FLUX.1 (`ae.safetensors`). The VAE may be
the whole file, or stand in a full checkpoint under `first_stage_model.` or `vae.`.

Such a file holds tensors only. Their shapes say how the model is built; how its latents are scaled they do not.
That is told by the tensors around the VAE or by the repository that the file came from; else `config` has to say it.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vae import tensors
from vae.config import AutoencoderKLConfig
from vae.errors import AssumedConfigWarning, LoadError
from vae.names import rename_keys
from vae.presets import PRESETS

PREFIXES = ("first_stage_model.", "vae.", "")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
TRAINING = ("loss.", "model_ema.")  # of no use to a trained autoencoder: its discriminator, a counter
SHAPED = (  # the fields that shapes tell
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
)


def read(
    path: Path, config: AutoencoderKLConfig | None = None, repository: str = ""
) -> tuple[AutoencoderKLConfig, dict[str, Tensor]]:
    """The configuration and the tensors, by our names, of the VAE in a file. repository: where it was had, if known.

    Raises LoadError where it holds none. Warns (AssumedConfigWarning) where its constants had to be assumed.
    """
    with tensors.open_checkpoint(path) as file:
        names = list(file.keys())
        prefix = prefix_of(names, path)
        inside = [name for name in names if name.startswith(tuple(prefix + part for part in PARTS))]
        foreign = [name for name in names if name not in set(inside) and not name.startswith(TRAINING)]
        if not prefix and foreign:
            raise LoadError(f"{path} is not the file of an AutoencoderKL: it has {foreign[0]}")
        weights = rename_keys({name.removeprefix(prefix): file.get_tensor(name) for name in inside})
    if config is None:
        config = recognised(shaped(weights, path), foreign, repository, path)
    return config, weights


def prefix_of(names: Iterable[str], path: Path) -> str:
    """What stands before the VAE's names."""
    known = set(names)
    for prefix in PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in known and f"{prefix}decoder.conv_in.weight" in known:
            return prefix
    raise LoadError(f"there is no AutoencoderKL in {path}: no encoder.conv_in.weight and decoder.conv_in.weight in it")


def shaped(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The fields of a configuration that names and shapes tell. Raises LoadError where they are not a VAE's."""

    def count(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    levels = count(r"encoder\.down_blocks\.(\d+)\.")
    try:
        return {
            "in_channels": weights["encoder.conv_in.weight"].shape[1],
            "out_channels": weights["decoder.conv_out.weight"].shape[0],
            "block_out_channels": tuple(
                weights[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)
            ),
            "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "latent_channels": weights["decoder.conv_in.weight"].shape[1],
            "use_quant_conv": "quant_conv.weight" in weights,
            "use_post_quant_conv": "post_quant_conv.weight" in weights,
            "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in weights),
        }
    except KeyError as error:
        raise LoadError(f"{path} is not the file of an AutoencoderKL: it lacks {error.args[0]}") from error


def recognised(fields: Mapping[str, Any], around: Iterable[str], repository: str, path: Path) -> AutoencoderKLConfig:
    """The whole configuration: of the family that the file is known to be of, else of the first that it fits."""
    names = list(around)
    fitting = {
        name: one for name, one in PRESETS.items() if all(one.config[field] == fields[field] for field in SHAPED)
    }
    for one in fitting.values():
        if repository in one.repositories or any(name.startswith(tuple(one.marks)) for name in names if one.marks):
            return one.config
    taken = next((one.config for one in fitting.values()), None) or _nameless(fields, path)
    choices = ", ".join(f"{name} ({scaling(one.config)})" for name, one in fitting.items()) or "no preset"
    warnings.warn(
        f"{path} does not say how its latents are scaled. Its shapes fit {choices}; assumed is "
        f"{next(iter(fitting), 'the default of the class')} ({scaling(taken)}); config= says which it is",
        AssumedConfigWarning,
        stacklevel=4,
    )
    return taken


def _nameless(fields: Mapping[str, Any], path: Path) -> AutoencoderKLConfig:
    """A model of no known family: what shapes do not tell is as the class has it."""
    levels = len(fields["block_out_channels"])
    types: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    try:
        return AutoencoderKLConfig(**fields, **types)
    except ValueError as error:
        raise LoadError(f"{path} is of no known family, and needs its configuration (config=): {error}") from error


def scaling(config: AutoencoderKLConfig) -> str:
    """The constants in a few words."""
    said = f"scaling_factor {config.scaling_factor}"
    if config.shift_factor:
        said += f", shift_factor {config.shift_factor}"
    return said + (", latents_mean and latents_std" if config.latents_mean else "")
