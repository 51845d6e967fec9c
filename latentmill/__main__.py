"""The `latentmill` command. It finds its own packages first, because a user's modules may have the same common names.

Without this, a folder `jobs/` or a file `vae.py` on PYTHONPATH, or in the current folder with `python -m`, would be
imported instead.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# The same names are in jobs/worker_packages.py, which cannot be imported before this finder is installed.
PACKAGES = ("vae", "pipeline", "jobs")
ROOT = str(Path(__file__).resolve().parents[1])


class PackageFinder:
    """Finds the packages beside this one. All other modules are found as usual."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


# Here and not in `command`: processes that the command starts import this module, and do not call it.
sys.meta_path.insert(0, PackageFinder)


def command() -> None:
    """The entry point of the `latentmill` command."""
    from jobs.cli import command

    command()


if __name__ == "__main__":
    command()
