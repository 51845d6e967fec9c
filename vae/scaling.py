"""The scaling rule that a VAE's configuration implies. `latentmill.scaling` has the rule itself."""

from latentmill.scaling import Scaling
from vae.config import AutoencoderKLConfig


def scaling_of(config: AutoencoderKLConfig) -> Scaling:
    """Return the rule between the raw latents of a VAE and model latents."""
    return Scaling.from_constants(config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std)
