"""The autoencoders of latent diffusion (AutoencoderKL, and FLUX.2's): models, their configurations and files.

Depends on torch, safetensors, msgpack and local files. Files on the Hugging Face hub need the optional huggingface_hub.
FlaxAutoencoderKL, the same model in JAX, needs the extra `jax`. A model's library is imported when its class is first
used. The package has no dependency on shards, storage or Ray. Start with `vae.model`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, VaeConfig
from vae.errors import AmbiguousLayoutWarning, AssumedConfigWarning, LoadError, LoadWarning

if TYPE_CHECKING:
    from vae.flax import FlaxAutoencoderKL as FlaxAutoencoderKL
    from vae.flux2 import AutoencoderKLFlux2
    from vae.model import Autoencoder, AutoencoderKL, AutoencoderKLOutput, DecoderOutput
    from vae.posterior import DiagonalGaussianDistribution

__all__ = [
    "AmbiguousLayoutWarning",
    "AssumedConfigWarning",
    "Autoencoder",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "AutoencoderKLOutput",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "LoadError",
    "LoadWarning",
    "VaeConfig",
]
_MODULES = {
    "Autoencoder": "vae.model",
    "AutoencoderKL": "vae.model",
    "AutoencoderKLFlux2": "vae.flux2",
    "AutoencoderKLOutput": "vae.model",
    "DecoderOutput": "vae.model",
    "DiagonalGaussianDistribution": "vae.posterior",
    "FlaxAutoencoderKL": "vae.flax",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
