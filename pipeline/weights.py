"""The VAE as it travels to workers: loaded and hashed once, by the driver."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import VaeError
from pipeline.storage import store
from vae import AssumedConfigWarning, AutoencoderKL, AutoencoderKLConfig, LoadError, hub
from vae.load import ConfigLike, is_single_file, weights_sha256

VAE_FILES = re.compile(r"(vae/)?(config\.json|diffusion_pytorch_model[^/]*\.(safetensors|bin|json))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vae:
    """A trained model as it travels to actors: float32 weights in numpy, which Ray shares between processes.

    sha256: what the weights are (`vae.load.weights_sha256`). ref: what the user called it, without credentials.
    """

    ref: str
    config: AutoencoderKLConfig
    weights: Mapping[str, np.ndarray]
    sha256: str


def load_vae(ref: str, options: Mapping[str, Any] | None = None, config: ConfigLike = None) -> Vae:
    """Load and hash the model that `ref` names: a directory as diffusers saves it, a hub id, a single file, or `demo`.

    options: for the storage behind a URL. config: of a single file, which does not say how its latents are scaled.
    Raises VaeError where there is no model, and where its configuration would have to be assumed.
    """
    if hub.parse_url(ref):  # the hub's own library fetches it, and keeps it
        return _load(ref, ref, config)
    with store.fetch(ref, options or {}, VAE_FILES) as local:
        return _load(local, ref, config)


def _load(path: str, ref: str, config: ConfigLike) -> Vae:
    try:
        if is_single_file(path) and not os.path.isdir(path):
            with warnings.catch_warnings():
                warnings.simplefilter("error", AssumedConfigWarning)
                model = AutoencoderKL.from_single_file(path, config, torch_dtype=torch.float32)
        else:
            model = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32)
    except AssumedConfigWarning as doubt:
        raise VaeError(str(doubt).replace(path, ref).replace("config=NAME", "--vae-config NAME")) from doubt
    except (LoadError, OSError) as error:
        raise VaeError(str(error).replace(path, ref).replace("config=NAME", "--vae-config NAME")) from error
    tensors = model.state_dict()
    return Vae(
        ref=ref,
        config=model.config,
        weights={name: tensor.numpy() for name, tensor in tensors.items()},
        sha256=weights_sha256(tensors),
    )
