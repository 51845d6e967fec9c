"""Read a VAE from a single file, under the tensor names of its training: `encoder.down.0.block.0.conv1.weight`.

This is the layout of latent-diffusion (the `.ckpt` files of SD). SDXL, SD 3 and FLUX.1 (`ae.safetensors`) use it too.
The VAE is the whole file, or part of a full checkpoint under the prefix `first_stage_model.` or `vae.`.

Such a file has tensors only. Their shapes determine the architecture, but not the scaling constants of its latents.
The constants follow from the tensors around the VAE, or from the repository of the file. Otherwise `config` is needed.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vae import checkpoint
from vae.config import AutoencoderKLConfig
from vae.errors import AssumedConfigWarning, LoadError
from vae.keys import rename_keys
from vae.presets import PRESETS, Preset

PREFIXES = ("first_stage_model.", "vae.", "")
MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
TRAINING_ONLY = ("loss.", "model_ema.")  # the discriminator and a counter, which inference does not need
SHAPE_FIELDS = (  # the fields that the tensors' names and shapes determine
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
    """Return the configuration of the VAE in a file, and its tensors under their diffusers names.

    config: default: derived from the tensors. repository: the hub repository of the file, if it is known.
    Raises LoadError if the file has no VAE. Warns (AssumedConfigWarning) if the scaling constants had to be assumed.
    """
    with checkpoint.open_checkpoint(path) as file:
        names = list(file.keys())
        prefix = find_prefix(names, path)
        vae_names = [name for name in names if name.startswith(tuple(prefix + module for module in MODULES))]
        other_names = [name for name in names if name not in set(vae_names) and not name.startswith(TRAINING_ONLY)]
        if not prefix and other_names:
            raise LoadError(f"{path} is not a checkpoint of an AutoencoderKL: it has the tensor {other_names[0]}")
        weights = rename_keys({name.removeprefix(prefix): file.get_tensor(name) for name in vae_names})
    if config is None:
        config = identify_config(infer_fields(weights, path), other_names, repository, path)
    return config, weights


def find_prefix(names: Iterable[str], path: Path) -> str:
    """Return the prefix of the VAE's tensor names. Raises LoadError if there is no VAE; path: for its message."""
    known = set(names)
    for prefix in PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in known and f"{prefix}decoder.conv_in.weight" in known:
            return prefix
    raise LoadError(f"there is no AutoencoderKL in {path}: no encoder.conv_in.weight and decoder.conv_in.weight in it")


def infer_fields(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the fields of a configuration that the tensors' names and shapes determine (`SHAPE_FIELDS`).

    weights: under their diffusers names. Raises LoadError if they are not a VAE's.
    """

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
        raise LoadError(f"{path} is not a checkpoint of an AutoencoderKL: it lacks {error.args[0]}") from error


def identify_config(
    fields: Mapping[str, Any], other_names: Iterable[str], repository: str, path: Path
) -> AutoencoderKLConfig:
    """Return the whole configuration of a file whose tensors determine `fields`.

    It is the preset that matches the fields and is identified by the repository or by a tensor outside the VAE
    (`other_names`). Otherwise it is the first preset that matches the fields, with an AssumedConfigWarning.
    """
    names = list(other_names)
    matching = {
        name: preset
        for name, preset in PRESETS.items()
        if all(preset.config[field] == fields[field] for field in SHAPE_FIELDS)
    }
    for preset in matching.values():
        if repository in preset.repositories or _has_mark(names, preset):
            return preset.config
    first = next(iter(matching.values()), None)
    assumed = first.config if first else _complete_config(fields, path)
    choices = ", ".join(f"{name} ({format_scaling(preset.config)})" for name, preset in matching.items())
    warnings.warn(
        f"{path} has no scaling constants for its latents. Its shapes match {choices or 'no preset'}. Assumed: "
        f"{next(iter(matching), 'the defaults of AutoencoderKL')} ({format_scaling(assumed)}). "
        "Choose the configuration with config=NAME",
        AssumedConfigWarning,
        stacklevel=4,
    )
    return assumed


def _has_mark(names: Iterable[str], preset: Preset) -> bool:
    return any(name.startswith(tuple(preset.marks)) for name in names)


def _complete_config(fields: Mapping[str, Any], path: Path) -> AutoencoderKLConfig:
    """Return a configuration with the defaults of AutoencoderKL for all that the tensors do not determine."""
    levels = len(fields["block_out_channels"])
    types: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    try:
        return AutoencoderKLConfig(**fields, **types)
    except ValueError as error:
        raise LoadError(
            f"{path} matches no preset and not the defaults of AutoencoderKL ({error}); "
            "give its configuration with config=NAME"
        ) from error


def format_scaling(config: AutoencoderKLConfig) -> str:
    """Return the scaling constants as text for a message."""
    text = f"scaling_factor {config.scaling_factor}"
    if config.shift_factor:
        text += f", shift_factor {config.shift_factor}"
    return text + (", latents_mean and latents_std" if config.latents_mean else "")
