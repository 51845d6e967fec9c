"""A program that converts a pickled checkpoint to safetensors. `vae.checkpoint` runs it as a child process.

    python unpickle.py CHECKPOINT OUT

On failure, it prints one line of JSON, {"error": ...}, and its exit code is 1. It imports no other module of this
project, so that it can be run by its path.
"""

import json
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file

SAFE_SINCE = (2, 10)  # earlier versions of weights_only can be bypassed: CVE-2025-32434, CVE-2026-24747


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name: its own, or those of its `state_dict`.

    Raises ValueError if torch is too old to be safe or the file has no tensors, and torch's own errors.
    """
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < SAFE_SINCE:
        minimum = ".".join(map(str, SAFE_SINCE))
        raise ValueError(f"torch {torch.__version__} cannot read pickles safely; upgrade it to {minimum} or later")
    content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # the layout of PyTorch Lightning
    if not isinstance(content, Mapping):
        raise ValueError("it does not map names to tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError("it has no tensors")
    return tensors


def main() -> int:
    """Convert the file. Returns the exit code."""
    path, out = sys.argv[1:]
    try:
        tensors = read_tensors(path)
    except Exception as error:  # a corrupt or hostile file: torch's reader raises errors of many types
        reason = str(error)
        if "Unsupported" in reason or "weights_only" in reason:
            reason = "it has objects other than tensors, which could run code; save the tensors as safetensors"
        sys.stdout.write(json.dumps({"error": reason.splitlines()[0] if reason else type(error).__name__}))
        return 1
    # Two names may share storage, which safetensors refuses: each gets a copy.
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
