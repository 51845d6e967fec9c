"""The `latentmill` command. It finds its own packages first: their names are common, and a user's may have them, too.

Without this, a folder `jobs/` or a file `vae.py` on PYTHONPATH, or in the current folder with `python -m`, would be
imported in place of ours.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OURS = ("vae", "pipeline", "jobs")
ROOT = str(Path(__file__).resolve().parents[1])


class Ours:
    """Finds our packages beside this one; everything else is found as ever."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in OURS else None


def command() -> None:
    """The entry point of the `latentmill` command."""
    sys.meta_path.insert(0, Ours)
    from jobs.cli import command

    command()


if __name__ == "__main__":
    command()
