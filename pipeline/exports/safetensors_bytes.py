"""Tensors as the bytes of a safetensors file. The same tensors give the same bytes.

The library writes the metadata in another order in each process, so a file could not be compared with an earlier one.
"""

import json
from collections.abc import Mapping

import torch

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def to_safetensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file: 8 bytes with the length of the header, the header as JSON, and the values.

    tensors: on the CPU, in the order in which they are stored. The header is padded to a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start, values = 0, []
    for name, tensor in tensors.items():
        data = tensor_bytes(tensor)
        end = start + len(data)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
        values.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *values])


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor in C order, little endian."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
