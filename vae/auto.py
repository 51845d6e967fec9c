"""Models of any class: the class follows from the configuration."""

from pathlib import Path

import torch

from vae import load
from vae.config import AutoencoderKLFlux2Config, VaeConfig
from vae.flux2 import AutoencoderKLFlux2
from vae.model import Autoencoder, AutoencoderKL


def class_of(config: VaeConfig) -> type[Autoencoder]:
    """Return the class of the models with this configuration."""
    return AutoencoderKLFlux2 if isinstance(config, AutoencoderKLFlux2Config) else AutoencoderKL


def load_model(path: str | Path, config: load.ConfigLike = None, torch_dtype: torch.dtype | None = None) -> Autoencoder:
    """Load a trained model for inference: what `from_pretrained` or `from_single_file` of its class loads from `path`.

    config: for a single file. Raises `vae.LoadError` if there is no model of any class.
    """
    is_file = load.is_single_file(path) and not Path(path).is_dir()
    resolved, weights = load.load_file(path, config) if is_file else load.load_directory(path)
    return class_of(resolved).from_weights(resolved, weights, path, torch_dtype)
