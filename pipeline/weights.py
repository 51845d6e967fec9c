"""The weights of a VAE, loaded and hashed once by the driver and then sent to the workers."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import VaeError
from pipeline.storage import reading
from vae import AssumedConfigWarning, Autoencoder, LoadError, LoadWarning, VaeConfig, hub
from vae.auto import load_model
from vae.load import ConfigLike, weights_sha256
from vae.scaling import constants_of

VAE_FILES = re.compile(
    r"(vae/)?(config\.json|diffusion_pytorch_model[^/]*\.(safetensors|bin|json)|diffusion_flax_model\.msgpack)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vae:
    """A trained model in the form that is sent to workers.

    weights: numpy arrays, float32 but for counters, which Ray shares between processes. sha256: of the parameters
    (`vae.load.weights_sha256`). reference: the name that the user gave, without credentials. constants: of the scaling
    (`vae.scaling.constants_of`). notes: what was chosen or left out of the model's files.
    """

    reference: str
    config: VaeConfig
    weights: Mapping[str, np.ndarray]
    sha256: str
    constants: Mapping[str, Any]
    notes: tuple[str, ...] = ()


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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LoadWarning)
            warnings.simplefilter("error", AssumedConfigWarning)
            model: Autoencoder = load_model(path, config, torch_dtype=torch.float32)
        tensors = model.state_dict()
        constants = constants_of(model.config, tensors)
    except (LoadError, AssumedConfigWarning, OSError) as error:
        raise VaeError(_name_reference(str(error), path, ref)) from error
    for warning in caught:
        if not issubclass(warning.category, LoadWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    notes = [str(warning.message) for warning in caught if issubclass(warning.category, LoadWarning)]
    return Vae(
        reference=ref,
        config=model.config,
        weights={name: tensor.numpy() for name, tensor in tensors.items()},
        sha256=weights_sha256(dict(model.named_parameters())),
        constants=constants,
        notes=tuple(_name_reference(note, path, ref) for note in notes),
    )


def _name_reference(text: str, path: str, ref: str) -> str:
    """Return a message about a local path as one about the reference and the options that the user gave."""
    return text.replace(path, ref).replace("config=NAME", "--vae-config NAME")
