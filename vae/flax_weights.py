"""Convert weights between the layouts of PyTorch and Flax, and read and write Flax's msgpack files. Needs no JAX.

Weights in the layout of Flax are tensors by path, such as `encoder/down_blocks_0/resnets_0/conv1/kernel`. Kernels of
convolutions are [H, W, in, out] instead of [out, in, H, W], and matrices are [in, out] instead of [out, in].

A msgpack file (`diffusion_flax_model.msgpack`) has the tree of names as nested maps. An array is an extension of type 1
that holds, packed in turn, its shape, the name of its dtype, and its values in C order.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from vae.errors import LoadError
from vae.keys import rename_keys

FILE = "diffusion_flax_model.msgpack"

_ARRAY = 1  # the extension's type
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TO_FLAX = (  # the attention's names; rename_keys has the way back
    (re.compile(r"\.to_q\."), ".query."),
    (re.compile(r"\.to_k\."), ".key."),
    (re.compile(r"\.to_v\."), ".value."),
    (re.compile(r"\.to_out\.0\."), ".proj_attn."),
)
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_NUMBERED = re.compile(r"_(\d+)(?=\.)")


def to_flax(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict in the layout of Flax. Older names are accepted, as in files."""
    return {
        _flax_name(name, tensor.dim()): _transpose(tensor, (2, 3, 1, 0))
        for name, tensor in rename_keys(weights).items()
    }


def to_torch(weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return tensors in the layout of Flax under the names and in the layout of a state dict.

    path: their source, for messages. Raises LoadError for a name that no layer of Flax has, or that occurs twice.
    """
    converted: dict[str, Tensor] = {}
    refusal = f"the weights at {path} are not those of a Flax model"
    for name, tensor in weights.items():
        stem, _, kind = name.replace("/", ".").rpartition(".")
        old_name = _NUMBERED.sub(r".\1", f"{stem}.") + ("bias" if kind == "bias" else "weight")
        [(new_name, value)] = rename_keys({old_name: _transpose(tensor, (3, 2, 0, 1))}).items()
        if _flax_name(new_name, value.dim()) != name:
            raise LoadError(f"{refusal}: no layer of one has a tensor {name} of {tensor.dim()} dimensions")
        if new_name in converted:
            raise LoadError(f"{refusal}: {new_name} occurs twice")
        converted[new_name] = value
    return converted


def _flax_name(name: str, dimensions: int) -> str:
    """Return the path in Flax of a tensor of a state dict."""
    for pattern, replacement in _TO_FLAX:
        name = pattern.sub(replacement, name)
    stem, _, kind = _NUMBER.sub(r"_\1", name).rpartition(".")
    if kind == "weight":
        kind = "scale" if dimensions == 1 else "kernel"
    return f"{stem}.{kind}".replace(".", "/")


def _transpose(tensor: Tensor, axes: tuple[int, int, int, int]) -> Tensor:
    """Return a matrix transposed, a convolution's kernel with permuted axes, and any other tensor unchanged."""
    if tensor.dim() == 4:
        return tensor.permute(axes).contiguous()
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the leaves of a tree of mappings by path, such as `encoder/conv_in/bias`."""
    leaves = {}
    branches: list[tuple[str, Mapping[Any, Any]]] = [("", tree)]
    while branches:  # not recursive: a file may be nested deeply
        prefix, branch = branches.pop()
        for key, value in branch.items():
            if isinstance(value, Mapping):
                branches.append((f"{prefix}{key}/", value))
            else:
                leaves[f"{prefix}{key}"] = value
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of dicts with these leaves, the reverse of `flatten`. Keys are sorted, as in Flax's files."""
    tree: dict[str, Any] = {}
    for path in sorted(leaves, key=lambda path: path.split("/")):
        *parents, last = path.split("/")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = leaves[path]
    return tree


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a msgpack file, in the layout of Flax. Raises LoadError if it cannot be read."""
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_unpack_array, strict_map_key=True)
    except (ValueError, TypeError, KeyError, RuntimeError, msgpack.UnpackException) as error:
        raise LoadError(f"{path} cannot be read as Flax's msgpack; it may be truncated, download it again") from error
    leaves = flatten(tree) if isinstance(tree, dict) else {"its content": tree}
    for name, value in leaves.items():
        if not isinstance(value, Tensor):
            raise LoadError(f"{path} is not a file of Flax weights: {name} is no array")
    return leaves


def write(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors in the layout of Flax to a msgpack file, which Flax reads."""
    path.write_bytes(msgpack.packb(nest(weights), default=_pack_array))


def _unpack_array(code: int, data: bytes) -> Tensor:
    if code != _ARRAY:
        raise ValueError(f"an extension of type {code} is no array")
    shape, dtype, values = msgpack.unpackb(data, strict_map_key=False)
    return torch.frombuffer(bytearray(values), dtype=_DTYPES[dtype]).reshape(shape)


def _pack_array(tensor: Tensor) -> msgpack.ExtType:
    values = tensor.detach().cpu().contiguous()
    content = (tuple(values.shape), _DTYPE_NAMES[values.dtype], values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return msgpack.ExtType(_ARRAY, msgpack.packb(content))
