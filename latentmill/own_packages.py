"""Find this project's packages first, because a user's modules may have the same common names.

Without this, a folder `jobs/` or a file `vae.py` on PYTHONPATH, or in the current folder with `python -m`, would be
imported instead.
"""

import pickle
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# The same names are in jobs/worker_packages.py, which cannot be imported before this finder is installed.
PACKAGES = ("vae", "pipeline", "jobs")
ROOT = str(Path(__file__).resolve().parents[1])


class PackageFinder:
    """Finds the packages beside this one. All other modules are found as usual."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


def find_own_packages() -> None:
    """Import this project's packages from now on, in this process."""
    if PackageFinder not in sys.meta_path:
        sys.meta_path.insert(0, PackageFinder)


def call_pickled(call: bytes, *more: Any) -> None:
    """Call a function in a new process. call: the function and its first arguments, pickled; more: further arguments.

    Their modules are imported here, so that they are this project's.
    """
    find_own_packages()
    function, *arguments = pickle.loads(call)
    function(*arguments, *more)
