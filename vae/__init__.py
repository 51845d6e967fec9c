"""The autoencoder of latent diffusion. Knows torch and local files; nothing of shards, storage or Ray."""

from vae.config import AutoencoderKLConfig
from vae.errors import AssumedConfigWarning, LoadError
from vae.model import AutoencoderKL, AutoencoderKLOutput, DecoderOutput
from vae.posterior import DiagonalGaussianDistribution

__all__ = [
    "AssumedConfigWarning",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLOutput",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "LoadError",
]
