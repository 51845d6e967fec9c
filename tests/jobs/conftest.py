"""For the tests of jobs: the encode command with a micro model, and caches of each format."""

from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
FORMATS = ("parquet", "webdataset")


def encode_in_formats(factory: pytest.TempPathFactory, source: Path, vae: Path, *options: object) -> dict[str, Path]:
    """Return a cache of each format, with parts of four rows, encoded in this process."""
    from jobs.encode import main

    caches = {}
    for form in FORMATS:
        caches[form] = factory.mktemp(form) / "c"
        argv = [source, "--to", caches[form], "--vae", vae, "--workers", 0, "--rows-per-part", 4, "--format", form]
        assert main([*map(str, argv), *map(str, options)]) == 0
    return caches


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Command:
    """Return `latentmill encode` at 64 px with the micro model, in this process. Without `--to`, the cache is `c`."""

    def run(*argv: object) -> tuple[int, str, str]:
        target = () if "--to" in argv else ("--to", tmp_path / "c")
        return latentmill("encode", *argv, *target, "--vae", micro_vae, "--resolution", 64, "--workers", 0)

    return run
