"""Files of tensors: safetensors, and PyTorch's own (`.bin`, `.ckpt`, `.pt`, `.pth`), which are pickles.

A pickle is read by a process of its own, by torch's reader that admits tensors and plain containers only; what comes
back is a safetensors file. So nothing that a pickle could do reaches the process that has the credentials.
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

PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth"})
SUFFIXES = PICKLED | {".safetensors"}
UNPICKLING = 600  # seconds a pickle may take: it is a few gigabytes at most


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Any]:
    """A file of tensors: `keys()`, and `get_tensor(key)` for each of them; nothing is read before it is asked for.

    Raises LoadError where it cannot be read.
    """
    if path.suffix in PICKLED:
        with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
            converted = Path(folder) / "tensors.safetensors"
            _unpickle(path, converted)
            with open_checkpoint(converted) as file:
                yield file
        return
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} cannot be read as safetensors") from error
    with file as open_file:
        yield open_file


def _unpickle(path: Path, converted: Path) -> None:
    """Have the tensors of a pickle written as safetensors by a process of its own."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("unpickle.py")), str(path), str(converted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=UNPICKLING)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{path} could not be read within {UNPICKLING} s") from error
    if done.returncode:
        try:
            said = json.loads(done.stdout)["error"]
        except (ValueError, KeyError, TypeError):
            said = f"the process that read it ended with {done.returncode}"
        raise LoadError(f"{path} cannot be read as a file of tensors: {said}")
