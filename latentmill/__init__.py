"""The front door: the `latentmill` command, which is also `python -m latentmill`."""

import importlib.metadata


def __getattr__(name: str) -> str:
    if name == "__version__":  # of what is installed
        return importlib.metadata.version("latentmill")
    raise AttributeError(f"module 'latentmill' has no attribute '{name}'")
