"""Read checkpoint files: safetensors, and PyTorch's pickled formats (`.bin`, `.ckpt`, `.pt`, `.pth`).

A child process converts a pickle to safetensors, with torch's reader for tensors and plain containers only
(`vae.unpickle`). A hostile pickle therefore never runs in this process, which may hold credentials.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vae.errors import LoadError

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
SUFFIXES = PICKLE_SUFFIXES | {".safetensors"}
UNPICKLE_TIMEOUT = 600  # seconds for one pickle, which has a few gigabytes at most


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Any]:
    """Open a checkpoint file. Its `keys()` are the tensors' names, and `get_tensor(key)` reads a tensor.

    A tensor is read when it is requested. Raises LoadError if the file cannot be read.
    """
    if path.suffix in PICKLE_SUFFIXES:
        with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
            converted = Path(folder) / "tensors.safetensors"
            _convert_pickle(path, converted)
            with open_checkpoint(converted) as file:
                yield file
        return
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} cannot be read as safetensors; it may be truncated, download it again") from error
    with file as open_file:
        yield open_file


def _convert_pickle(path: Path, converted: Path) -> None:
    """Write the tensors of the pickle `path` to the safetensors file `converted`, in a child process."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("unpickle.py")), str(path), str(converted)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=UNPICKLE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{path} could not be read within {UNPICKLE_TIMEOUT} s; save it as safetensors") from error
    if process.returncode:
        try:
            reason = json.loads(process.stdout)["error"]
        except (ValueError, KeyError, TypeError):
            reason = f"the process that read it ended with exit code {process.returncode}"
        raise LoadError(f"{path} cannot be read as a checkpoint: {reason}")
