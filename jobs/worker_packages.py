"""How the workers of a Ray come to import our packages, and not a user's modules of the same names."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

PACKAGES = ("latentmill", "vae", "pipeline", "jobs")
RECREATED_WITHIN = 10.0  # seconds for a directory that Ray replaces to be there again


def make_runtime_env() -> dict[str, Any]:
    """What sends our packages along, so that workers run the driver's; not where a submitted working directory has."""
    root = Path(__file__).resolve().parents[1]
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
    if submitted is not None:
        sent = submitted.get("runtime_env", {}).get("working_dir")
        if not sent or root == Path.cwd():
            return {}
    return {"py_modules": [str(root / name) for name in PACKAGES]}


@contextmanager
def package_directory(below: str | None = None) -> Iterator[str]:
    """A directory with nothing in it but links to our packages.

    Ray puts the driver's current directory first on its workers' path, where a user's `vae.py` or folder `jobs/` would
    be taken for ours. (A runtime_env with an empty working_dir does the same, but 2.5 s later: the workers that Ray
    starts ahead cannot be used then.)
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="latentmill-", dir=below) as directory:
        for name in PACKAGES:
            Path(directory, name).symlink_to(root / name)
        yield directory


@contextmanager
def working_in(directory: str) -> Iterator[None]:
    """Change the current directory for a while.

    The directory before it may be gone for a moment at the end: Ray removes the working directory of a submitted job
    and unpacks it again if a second node on the same machine needs it, too. Raises UsageError if it stays away.
    """
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        end = time.monotonic() + RECREATED_WITHIN
        while not os.path.isdir(before) and time.monotonic() < end:
            time.sleep(0.05)
        try:
            os.chdir(before)
        except OSError as error:
            raise UsageError(
                f"the current directory {before} is gone ({error.strerror}); start the job in one that stays"
            ) from error
