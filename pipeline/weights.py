"""The weights of a VAE, loaded and hashed once by the driver and then sent to the workers."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import VaeError
from pipeline.storage import reading
from vae import AssumedConfigWarning, AutoencoderKL, AutoencoderKLConfig, LoadError, hub
from vae.load import ConfigLike, is_single_file, weights_sha256

VAE_FILES = re.compile(
    r"(vae/)?(config\.json|diffusion_pytorch_model[^/]*\.(safetensors|bin|json)|diffusion_flax_model\.msgpack)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vae:
    """A trained model in the form that is sent to workers.

    weights: float32 numpy arrays, which Ray shares between processes. sha256: of the weights
    (`vae.load.weights_sha256`). ref: the name that the user gave, without credentials.
    """

    ref: str
    config: AutoencoderKLConfig
    weights: Mapping[str, np.ndarray]
    sha256: str


def load_vae(ref: str, options: Mapping[str, Any] | None = None, config: ConfigLike = None) -> Vae:
    """Load and hash the model that `ref` names: a directory saved by diffusers, a hub id, a single file, or `demo`.

    options: for the storage behind a URL. config: for a single file, which does not record how its latents are scaled.
    Raises VaeError if there is no model, or if its configuration would have to be assumed.
    """
    if hub.parse_url(ref):  # the hub's own library downloads it and caches it
        return _load(ref, ref, config)
    with reading.fetch(ref, options or {}, VAE_FILES) as local:
        return _load(local, ref, config)


def _load(path: str, ref: str, config: ConfigLike) -> Vae:
    try:
        if is_single_file(path) and not os.path.isdir(path):
            with warnings.catch_warnings():
                warnings.simplefilter("error", AssumedConfigWarning)
                model = AutoencoderKL.from_single_file(path, config, torch_dtype=torch.float32)
        else:
            model = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32)
    except AssumedConfigWarning as warning:
        raise VaeError(str(warning).replace(path, ref).replace("config=NAME", "--vae-config NAME")) from warning
    except (LoadError, OSError) as error:
        raise VaeError(str(error).replace(path, ref).replace("config=NAME", "--vae-config NAME")) from error
    tensors = model.state_dict()
    return Vae(
        ref=ref,
        config=model.config,
        weights={name: tensor.numpy() for name, tensor in tensors.items()},
        sha256=weights_sha256(tensors),
    )
