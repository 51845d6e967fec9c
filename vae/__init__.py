"""The autoencoder of latent diffusion (AutoencoderKL): the model, its configuration, and its files.

Depends on torch, safetensors and local files. Files on the Hugging Face hub need the optional huggingface_hub.
The package has no dependency on shards, storage or Ray. Start with `vae.model`.
"""

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
