"""Read a VAE from a single file, under the tensor names of its training: `encoder.down.0.block.0.conv1.weight`.

This is the layout of latent-diffusion (the `.ckpt` files of SD). SDXL, SD 3, FLUX.1 and FLUX.2 (`ae.safetensors`) use
it too. The VAE is the whole file, or part of a full checkpoint under the prefix `first_stage_model.` or `vae.`.

Such a file has tensors only. Their shapes determine the architecture, but not the scaling constants of its latents.
The constants follow from the tensors around the VAE, or from the repository of the file. Otherwise `config` is needed.
FLUX.2's are tensors (`bn.`), which also show its class.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vae import checkpoint
from vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, VaeConfig
from vae.errors import AssumedConfigWarning, LoadError, LoadWarning
from vae.keys import rename_keys
from vae.presets import PRESETS, Preset

PREFIXES = ("first_stage_model.", "vae.", "")
MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")
AVERAGE = "model_ema."  # in files of latent-diffusion: a counter, and maybe a moving average of the weights
TRAINING_ONLY = ("loss.", AVERAGE)  # what inference does not need; `loss.` is the discriminator


def read(path: Path, config: VaeConfig | None = None, repository: str = "") -> tuple[VaeConfig, dict[str, Tensor]]:
    """Return the configuration of the VAE in a file, and its tensors under their diffusers names.

    config: default: derived from the tensors. repository: the hub repository of the file, if it is known.
    Raises LoadError if the file has no VAE. Warns if the scaling constants had to be assumed (AssumedConfigWarning) and
    if there are several VAEs (LoadWarning).
    """
    with checkpoint.open_checkpoint(path) as file:
        names = list(file.keys())
        prefix = find_prefix(names, path)
        if any(name.startswith((f"{prefix}{AVERAGE}encoder", f"{prefix}{AVERAGE}decoder")) for name in names):
            text = f"{path} has the weights of its VAE twice, as trained and as their moving average ({AVERAGE})"
            warnings.warn(f"{text}; those as trained are used", LoadWarning, stacklevel=2)
        vae_names = [name for name in names if name.startswith(tuple(prefix + module for module in MODULES))]
        other_names = [name for name in names if name not in set(vae_names) and not name.startswith(TRAINING_ONLY)]
        if not prefix and other_names:
            raise LoadError(f"{path} is not a checkpoint of an AutoencoderKL: it has the tensor {other_names[0]}")
        weights = rename_keys({name.removeprefix(prefix): file.get_tensor(name) for name in vae_names})
    if config is None:
        config = identify_config(infer_fields(weights, path), other_names, repository, path)
    return config, weights


def find_prefix(names: Iterable[str], path: Path) -> str:
    """Return the prefix of the VAE's tensor names: the first of PREFIXES under which there is a VAE.

    path: for messages. Raises LoadError if there is no VAE. Warns (LoadWarning) if there are several.
    """
    known, first = set(names), "conv_in.weight"
    found = [p for p in PREFIXES if f"{p}encoder.{first}" in known and f"{p}decoder.{first}" in known]
    if not found:
        raise LoadError(f"there is no AutoencoderKL in {path}: no encoder.{first} and decoder.{first} in it")
    if len(found) > 1:
        text = f"{path} has {len(found)} VAEs; the one with the tensor {found[0]}encoder.{first} is used"
        warnings.warn(f"{text}, not {' or '.join(f'{prefix}encoder.{first}' for prefix in found[1:])}", LoadWarning, 3)
    return found[0]


def infer_fields(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the fields of a configuration that the tensors' names and shapes determine.

    Only FLUX.2's class has `decoder_block_out_channels`.
    weights: under their diffusers names. Raises LoadError if they are not a VAE's.
    """

    def count(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    def read_channels(pattern: str) -> tuple[int, ...]:
        return tuple(weights[pattern.format(level)].shape[0] for level in range(levels))

    levels = count(r"encoder\.down_blocks\.(\d+)\.")
    try:
        channels = read_channels("encoder.down_blocks.{}.resnets.0.conv1.weight")
        of_decoder = read_channels("decoder.up_blocks.{}.resnets.0.conv1.weight")[::-1]
        is_flux2 = "bn.running_mean" in weights
        return {
            **({"decoder_block_out_channels": None if of_decoder == channels else of_decoder} if is_flux2 else {}),
            "in_channels": weights["encoder.conv_in.weight"].shape[1],
            "out_channels": weights["decoder.conv_out.weight"].shape[0],
            "block_out_channels": channels,
            "layers_per_block": count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "latent_channels": weights["decoder.conv_in.weight"].shape[1],
            "use_quant_conv": "quant_conv.weight" in weights,
            "use_post_quant_conv": "post_quant_conv.weight" in weights,
            "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in weights),
        }
    except KeyError as error:
        raise LoadError(f"{path} is not a checkpoint of an AutoencoderKL: it lacks {error.args[0]}") from error
    except IndexError as error:
        raise LoadError(f"{path} is not a checkpoint of an AutoencoderKL: a weight has no dimensions") from error


def identify_config(fields: Mapping[str, Any], other_names: Iterable[str], repository: str, path: Path) -> VaeConfig:
    """Return the whole configuration of a file whose tensors determine `fields`.

    It is the preset that matches the fields and is identified by the repository or by a tensor outside the VAE
    (`other_names`). Otherwise it is the first preset that matches the fields, with an AssumedConfigWarning.
    """
    names = list(other_names)
    matching = {
        name: preset
        for name, preset in PRESETS.items()
        if all(preset.config.get(field) == value for field, value in fields.items())
        and isinstance(preset.config, _class_of(fields))
    }
    for preset in matching.values():
        if isinstance(preset.config, AutoencoderKLFlux2Config):  # its constants are in the file
            return preset.config
        if repository in preset.repositories or _has_mark(names, preset):
            return preset.config
    first = next(iter(matching.values()), None)
    assumed = first.config if first else _complete_config(fields, path)
    choices = ", ".join(f"{name} ({format_scaling(preset.config)})" for name, preset in matching.items())
    warnings.warn(
        f"{path} has no scaling constants for its latents. Its shapes match {choices or 'no preset'}. Assumed: "
        f"{next(iter(matching), f'the defaults of {assumed.class_names()[0]}')} ({format_scaling(assumed)}). "
        "Choose the configuration with config=NAME",
        AssumedConfigWarning,
        stacklevel=4,
    )
    return assumed


def _class_of(fields: Mapping[str, Any]) -> type[AutoencoderKLConfig] | type[AutoencoderKLFlux2Config]:
    return AutoencoderKLFlux2Config if "decoder_block_out_channels" in fields else AutoencoderKLConfig


def _has_mark(names: Iterable[str], preset: Preset) -> bool:
    return any(name.startswith(tuple(preset.marks)) for name in names)


def _complete_config(fields: Mapping[str, Any], path: Path) -> VaeConfig:
    """Return a configuration with the defaults of its class for all that the tensors do not determine."""
    levels = len(fields["block_out_channels"])
    types: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    try:
        return _class_of(fields)(**fields, **types)
    except ValueError as error:
        raise LoadError(
            f"{path} matches no preset and not the defaults of {_class_of(fields).class_names()[0]} ({error}); "
            "give its configuration with config=NAME"
        ) from error


def format_scaling(config: VaeConfig) -> str:
    """Return the scaling constants as text for a message."""
    if not isinstance(config, AutoencoderKLConfig):
        return "constants from its bn"
    text = f"scaling_factor {config.scaling_factor}"
    if config.shift_factor:
        text += f", shift_factor {config.shift_factor}"
    return text + (", latents_mean and latents_std" if config.latents_mean else "")
