"""The hash of a VAE's weights, which a cache has in its identity: of a directory, a file, a module or a state dict.

It does not depend on the layout of the file: docs/cache-format.md has the rule (`weights`). These can be read here:

- a directory of diffusers with safetensors (one file, several with an index, or a variant such as `.fp16.`), or the
  directory of a pipeline that has one in `vae/`
- a safetensors file with the names of diffusers or of latent-diffusion, also a whole checkpoint with the VAE under
  `first_stage_model.` or `vae.`
- a torch module, also compiled or wrapped, or its state dict: load pickles and files of Flax, and give the module
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from latentmill.cache_info import CacheInfo
from latentmill.errors import IdentityError, UsageError
from latentmill.weight_names import is_attention, rename_names

MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # FLUX.2's `bn.` are statistics, no parameters
_PREFIXES = ("first_stage_model.", "vae.", "")  # of a VAE in a file, the preferred one first
_MARK = "encoder.conv_in.weight"  # a tensor that every layout has under this name
_STEM = "diffusion_pytorch_model"
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".ema", ".non_ema")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def check_vae(url: str, info: CacheInfo, vae: Any) -> None:
    """Raise IdentityError unless a cache was made by this VAE. url: of the cache.

    vae: the sha256 of weights, a local directory or safetensors file, a torch module, a state dict, or the name that
    the cache has for its VAE (`vae.reference`). Raises UsageError if there are no weights of a VAE in it.
    """
    made = f"the cache {url} was made by the VAE {info.vae.reference}, whose weights have the sha256"
    wanted = info.identity.weights
    if isinstance(vae, str) and not os.path.exists(vae) and not re.fullmatch("[0-9a-f]{64}", vae):
        if vae != info.vae.reference:
            raise IdentityError(f"{made} {wanted}, not by {vae} (which is no local file or directory either)")
        return
    found = vae if isinstance(vae, str) and not os.path.exists(vae) else hash_weights(vae)
    if found != wanted:
        name = (
            f"{vae}, whose weights have" if isinstance(vae, str | os.PathLike) else "the given one, whose weights have"
        )
        name = "weights with" if found is vae else name
        raise IdentityError(f"{made} {wanted}, not by {name} {found}; the same weights in half precision have another")


def hash_weights(vae: Any) -> str:
    """Return the sha256 of a VAE's weights in hex, as in a cache's identity.

    vae: a directory or safetensors file, a torch module, or a mapping of names to tensors or arrays. Raises UsageError.
    """
    if isinstance(vae, str | os.PathLike):
        path = os.fspath(vae)
        return digest_weights(
            select_parameters(_read_directory(path) if os.path.isdir(path) else read_safetensors(path), path)
        )
    weights = vae if isinstance(vae, Mapping) else vae.state_dict()
    return digest_weights(select_parameters(weights, f"this {type(vae).__name__}"))


def digest_weights(weights: Mapping[str, Any]) -> str:
    """Return the sha256 over parameters. weights: torch tensors or numpy arrays by their diffusers names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = _to_float32(weights[name])
        digest.update(f"{name}\0{','.join(map(str, values.shape))}\0".encode())
        digest.update(values.data if values.size else b"")
    return digest.hexdigest()


def _to_float32(values: Any) -> np.ndarray:
    """Return a tensor or an array as a contiguous little-endian float32 array."""
    if not isinstance(values, np.ndarray):
        values = values.detach().cpu().float().numpy()
    if values.dtype == np.uint16:  # bfloat16, as `read_safetensors` has it
        values = (values.astype("<u4") << 16).view("<f4")
    return np.asarray(values, "<f4", order="C")


def select_parameters(weights: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of the VAE among tensors of any layout, by their diffusers names.

    where: for the error. Raises UsageError if there is no VAE.
    """
    names = {name.replace("_orig_mod.", ""): name for name in weights}  # torch.compile adds it
    found = {name.removesuffix(_MARK) for name in names if name.endswith(_MARK)}
    found = {prefix for prefix in found if f"{prefix}decoder.conv_in.weight" in names}
    if not found:
        raise UsageError(f"{where} has no weights of an AutoencoderKL: there is no {_MARK}")
    prefix = next((prefix for prefix in _PREFIXES if prefix in found), min(found))
    own = [name.removeprefix(prefix) for name in names if name.startswith(tuple(prefix + module for module in MODULES))]
    selected = {}
    for old, name in rename_names(own).items():
        values = weights[names[prefix + old]]
        selected[name] = values[:, :, 0, 0] if is_attention(name) and values.ndim == 4 else values
    return selected


def _read_directory(path: str) -> dict[str, np.ndarray]:
    """Return the tensors of the first file of weights that a directory of diffusers has, or its `vae/`."""
    for folder in (os.path.join(path, "vae"), path):
        for variant in _VARIANTS:
            file = os.path.join(folder, f"{_STEM}{variant}.safetensors")
            index = os.path.join(folder, f"{_STEM}.safetensors.index{variant}.json")
            if os.path.isfile(file):
                return read_safetensors(file)
            if os.path.isfile(index):
                return {name: values for part in _read_parts(index) for name, values in read_safetensors(part).items()}
    raise UsageError(f"{path} has no {_STEM}.safetensors: load the model and give the module, or name its file")


def _read_parts(index: str) -> list[str]:
    """Return the files that an index of weights lists."""
    try:
        with open(index, encoding="utf-8") as file:
            parts = sorted(set(json.load(file)["weight_map"].values()))
        return [os.path.join(os.path.dirname(index), os.path.basename(part)) for part in parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} cannot be read as an index of weights") from error


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Return the floating-point tensors of a safetensors file as arrays, in pages of the file that are read when used.

    bfloat16 is uint16. Raises UsageError if the file is none.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        return dict(_iterate_tensors(header, data[8 + length :]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{path} cannot be read as safetensors; of another format, load the model and give the module"
        raise UsageError(text) from error


def _iterate_tensors(header: Mapping[str, Any], data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        start, stop = entry["data_offsets"]
        yield name, np.frombuffer(data[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
