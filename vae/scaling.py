"""The scaling rule of a model, for both classes. `latentmill.scaling` has the rule itself."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latentmill.scaling import Scaling
from vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, VaeConfig
from vae.errors import LoadError

if TYPE_CHECKING:  # the constants of a cache can be checked without torch
    from torch import Tensor


def constants_of(config: VaeConfig, weights: "Mapping[str, Tensor]") -> dict[str, Any]:
    """Return the arguments of `Scaling.from_constants`: the rule between a model's raw latents and model latents.

    An AutoencoderKL has them in its configuration, an AutoencoderKLFlux2 in its weights (a state dict).
    Raises LoadError if the weights have no valid statistics.
    """
    if isinstance(config, AutoencoderKLFlux2Config):
        mean, variance = (weights[f"bn.running_{name}"].float() for name in ("mean", "var"))
        std = (variance + config.batch_norm_eps).sqrt()
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise LoadError("the statistics of the latents (bn) are not finite, or a variance is not positive")
        return {
            "scaling_factor": 1.0,
            "shift_factor": None,
            "latents_mean": tuple(mean.tolist()),
            "latents_std": tuple(std.tolist()),
            "patch_size": config.patch_size,
        }
    assert isinstance(config, AutoencoderKLConfig)
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {**{name: config[name] for name in names}, "patch_size": None}


def scaling_of(config: VaeConfig, weights: "Mapping[str, Tensor] | None" = None) -> Scaling:
    """Return the rule between the raw latents of a VAE and model latents. weights: only FLUX.2's are needed."""
    return Scaling.from_constants(**constants_of(config, weights or {}))


def fits(config: VaeConfig, constants: Mapping[str, Any]) -> bool:
    """Return whether constants can be those of a model with this configuration.

    For an AutoencoderKL, they are equal. An AutoencoderKLFlux2 has them in its weights: their number is checked.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in constants.items()}
    if not isinstance(config, AutoencoderKLFlux2Config):
        return values == constants_of(config, {})
    import torch

    statistics = torch.ones(math.prod(config.patch_size) * config.latent_channels)
    expected = constants_of(config, {"bn.running_mean": statistics, "bn.running_var": statistics})
    return all(
        len(values[name] or ()) == len(statistics) if name in ("latents_mean", "latents_std") else values[name] == value
        for name, value in expected.items()
    )
