"""A fixture for the tests of jobs: the encode command with a micro model."""

from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Command:
    """Return `latentmill encode` at 64 px with the micro model, in this process. Without `--to`, the cache is `c`."""

    def run(*argv: object) -> tuple[int, str, str]:
        target = () if "--to" in argv else ("--to", tmp_path / "c")
        return latentmill("encode", *argv, *target, "--vae", micro_vae, "--resolution", 64, "--workers", 0)

    return run
