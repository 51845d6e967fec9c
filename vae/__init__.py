"""The autoencoders of latent diffusion (AutoencoderKL, and FLUX.2's): models, their configurations and files.

Depends on torch, safetensors, msgpack and local files. Files on the Hugging Face hub need the optional huggingface_hub.
FlaxAutoencoderKL, the same model in JAX, needs the extra `jax`, which is imported when the class is first used. The
package has no dependency on shards, storage or Ray. Start with `vae.model`.
"""

from typing import TYPE_CHECKING, Any

from vae.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, VaeConfig
from vae.errors import AmbiguousLayoutWarning, AssumedConfigWarning, LoadError, LoadWarning
from vae.flux2 import AutoencoderKLFlux2
from vae.model import Autoencoder, AutoencoderKL, AutoencoderKLOutput, DecoderOutput
from vae.posterior import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from vae.flax import FlaxAutoencoderKL as FlaxAutoencoderKL

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


def __getattr__(name: str) -> Any:
    if name == "FlaxAutoencoderKL":
        from vae.flax import FlaxAutoencoderKL

        return FlaxAutoencoderKL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
