"""Encode jobs with faulty workers: a script replaces the specification from which a worker is built."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
from jobs import encode, encode_spec
from jobs.entry import run_as_script
from pipeline.flow import EncodeSpec

{definition}

encode_spec.EncodeSpec = Faulty
run_as_script(encode.main)
"""


def run_faulty_job(
    definition: str, argv: Sequence[object], folder: Path, timeout: float = 290, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `jobs.encode` in a folder, with workers of the class `Faulty`.

    definition: Python that defines `Faulty`, a subclass of EncodeSpec.
    environment: further variables of the job.
    """
    script = folder / "faulty.py"
    script.write_text(SCRIPT.format(definition=definition))
    return subprocess.run(
        [sys.executable, str(script), *map(str, argv)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
