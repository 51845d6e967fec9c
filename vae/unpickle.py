"""A program: the tensors of a pickled checkpoint, written as safetensors. `vae.tensors` runs it as a child.

    python unpickle.py CHECKPOINT OUT

Ends with 1 and one line of JSON, {"error": ...}, where it cannot. It imports nothing of ours.
"""

import json
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

SAFE_SINCE = (2, 10)  # before it, weights_only could be got round: CVE-2025-32434, CVE-2026-24747


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name: its own or those of its `state_dict`. Raises ValueError and torch's own."""
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < SAFE_SINCE:
        raise ValueError(f"torch {torch.__version__} cannot read pickles safely; {SAFE_SINCE[0]}.{SAFE_SINCE[1]} can")
    content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # PyTorch Lightning's checkpoints
    if not isinstance(content, Mapping):
        raise ValueError("it does not hold tensors by name")
    found = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise ValueError("it holds no tensors")
    return found


def main() -> int:
    path, out = sys.argv[1:]
    try:
        found = tensors_of(path)
    except Exception as error:  # a damaged or hostile file: torch's reader has errors of many kinds
        said = str(error)
        if "Unsupported" in said or "weights_only" in said:
            said = "it holds more than tensors, which could run code when read; save the tensors as safetensors"
        sys.stdout.write(json.dumps({"error": said.splitlines()[0] if said else type(error).__name__}))
        return 1
    save_file({name: value.detach().clone().contiguous() for name, value in found.items()}, out)  # names may share one
    return 0


if __name__ == "__main__":
    sys.exit(main())
