"""How the workers of a Ray come to import our packages, and not a user's modules of the same names."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = ("vae", "pipeline", "jobs")


def code_for_workers() -> dict[str, Any]:
    """What sends our packages along, so that workers run the driver's; not where a submitted working directory has."""
    root = Path(__file__).resolve().parents[1]
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
    if submitted is not None:
        sent = submitted.get("runtime_env", {}).get("working_dir")
        if not sent or root == Path.cwd():
            return {}
    return {"py_modules": [str(root / name) for name in OURS]}


@contextmanager
def among_our_packages(below: str | None = None) -> Iterator[str]:
    """A directory with nothing in it but links to our packages.

    Ray puts the driver's current directory first on its workers' path, where a user's `vae.py` or folder `jobs/` would
    be taken for ours. (A runtime_env with an empty working_dir does the same, but 2.5 s later: the workers that Ray
    starts ahead cannot be used then.)
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="latentmill-", dir=below) as directory:
        for name in OURS:
            Path(directory, name).symlink_to(root / name)
        yield directory
