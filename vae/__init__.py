"""The autoencoder of latent diffusion (AutoencoderKL): the model, its configuration, and its files.

Depends on torch, safetensors, msgpack and local files. Files on the Hugging Face hub need the optional huggingface_hub.
FlaxAutoencoderKL, the same model in JAX, needs the extra `jax`, which is imported when the class is first used. The
package has no dependency on shards, storage or Ray. Start with `vae.model`.
"""

from typing import TYPE_CHECKING, Any

from vae.config import AutoencoderKLConfig
from vae.errors import AmbiguousLayoutWarning, AssumedConfigWarning, LoadError
from vae.model import AutoencoderKL, AutoencoderKLOutput, DecoderOutput
from vae.posterior import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from vae.flax import FlaxAutoencoderKL as FlaxAutoencoderKL

__all__ = [
    "AmbiguousLayoutWarning",
    "AssumedConfigWarning",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLOutput",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "LoadError",
]


def __getattr__(name: str) -> Any:
    if name == "FlaxAutoencoderKL":
        from vae.flax import FlaxAutoencoderKL

        return FlaxAutoencoderKL
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
