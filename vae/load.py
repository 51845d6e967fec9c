"""Weights on local disk: a directory with config.json and safetensors, as diffusers saves it.

Only tensors are ever read: no pickle on this path. A hub id or a URL is fetched by others first.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae.config import AutoencoderKLConfig

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
DEMO = Path(__file__).parent / "demo"  # the small model that ships with the project


class LoadError(ValueError):
    """There is no AutoencoderKL where one was asked for; the message says what is there instead."""


def find(path: str | Path) -> Path:
    """The directory that holds the model's config.json: `path` itself or its `vae/`; `demo` is the shipped model."""
    if str(path) == "demo":
        return DEMO
    given = Path(path)
    if not given.exists():
        raise LoadError(f"there is no VAE at {given}: no such directory")
    if not given.is_dir():
        raise LoadError(f"{given} is a file; a VAE is a directory with {CONFIG} and safetensors")
    for folder in (given / "vae", given):
        if (folder / CONFIG).is_file():
            return folder
    raise LoadError(f"there is no VAE at {given}: neither it nor its vae/ has a {CONFIG}")


def read_config(folder: Path) -> AutoencoderKLConfig:
    """The configuration in `folder`."""
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        return AutoencoderKLConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise LoadError(f"{folder / CONFIG}: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, or of those that an index names."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif index.is_file():
        names = read_index(index)
    else:
        raise LoadError(f"there are no weights at {folder}: no {WEIGHTS}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors.update({_new_name(key): tensor for key, tensor in load_file(folder / name).items()})
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{folder / name} cannot be read as safetensors") from error
    return tensors


def _new_name(key: str) -> str:
    """A parameter's name as diffusers has had it since 0.17: SD 1's files still have the attention's older ones."""
    before, _, last = key.rpartition(".")
    step, _, old = before.rpartition(".")
    return f"{step}.{_RENAMED[old]}.{last}" if old in _RENAMED else key


def read_index(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} cannot be read as an index of safetensors files") from error


def check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: Path) -> None:
    """Raise LoadError unless `tensors` has every name of `wanted`, no other, the same shapes, and real numbers."""
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or foreign:
        first = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which the configuration does not"
        raise LoadError(
            f"the weights at {where} do not fit its {CONFIG}: {len(missing)} tensors missing, "
            f"{len(foreign)} too many (it {first})"
        )
    for name, tensor in wanted.items():
        if not tensors[name].is_floating_point():
            raise LoadError(f"the weights at {where} are not of a model: {name} holds whole numbers")
        if tensors[name].shape != tensor.shape:
            raise LoadError(
                f"the weights at {where} do not fit its {CONFIG}: {name} has the shape "
                f"{list(tensors[name].shape)}, not {list(tensor.shape)}"
            )


def write(folder: Path, config: AutoencoderKLConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and one safetensors file, which diffusers reads too."""
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {"_class_name": "AutoencoderKL", **config.to_dict()}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """What a model's weights are, whichever file they came from: a sha256 in hex.

    Over the parameter names in sorted order: name, NUL, shape ("64,3,3,3"), NUL, values as little-endian float32.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}\0{','.join(map(str, values.shape))}\0".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
