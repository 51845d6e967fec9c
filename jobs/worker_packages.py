"""Makes Ray's workers import this project's packages, and not a user's modules of the same names."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

# latentmill/own_packages.py has all but the first too: it must find the packages before it can import this module.
PACKAGES = ("latentmill", "vae", "pipeline", "jobs")
RECREATE_SECONDS = 10.0  # for Ray to create the working directory again


def make_runtime_env() -> dict[str, Any]:
    """Return the runtime environment that sends the packages to the workers, so that they run the driver's code.

    It is empty if the working directory of a submitted job already contains them.
    """
    root = Path(__file__).resolve().parents[1]
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
    if submitted is not None:
        has_working_dir = submitted.get("runtime_env", {}).get("working_dir")
        if not has_working_dir or root == Path.cwd():
            return {}
    return {"py_modules": [str(root / name) for name in PACKAGES]}


@contextmanager
def package_directory(parent: str | None = None) -> Iterator[str]:
    """Return a temporary directory that contains only links to the packages.

    Ray puts the driver's current directory first on its workers' path. A user's `vae.py` or folder `jobs/` there would
    be imported instead of this project's. (A runtime_env with an empty working_dir has the same effect, but costs 2.5 s
    more, because the workers that Ray starts ahead cannot be used then.)
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="latentmill-", dir=parent) as directory:
        for name in PACKAGES:
            Path(directory, name).symlink_to(root / name)
        yield directory


@contextmanager
def working_in(directory: str) -> Iterator[None]:
    """Change the current directory inside this block.

    The former directory may be missing for a moment at the end: Ray removes the working directory of a submitted job,
    and unpacks it again, if a second node on the same machine needs it as well. Raises UsageError if it stays missing.
    """
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        end = time.monotonic() + RECREATE_SECONDS
        while not os.path.isdir(before) and time.monotonic() < end:
            time.sleep(0.05)
        try:
            os.chdir(before)
        except OSError as error:
            raise UsageError(
                f"the current directory {before} is gone ({error.strerror}); start the job in a directory that is not "
                "removed while it runs"
            ) from error
