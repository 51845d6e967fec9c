"""A secret of the environment is written to no file, message or argument."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import SECRET, objects, upload

ROOT = Path(__file__).parents[2]


def read_arguments_of_all_processes() -> bytes:
    arguments = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments += path.read_bytes() + b"\n"
        except OSError:  # the process has ended
            continue
    return arguments


@pytest.mark.slow
@pytest.mark.ray
def test_a_secret_is_not_in_files_output_or_arguments(
    shards: Path, micro_vae: Path, bucket: str, tmp_path: Path
) -> None:
    """The processes of the local Ray inherit the environment."""
    source = upload(shards, f"{bucket}/shards")
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET, "MINE": SECRET, "PYTHONPATH": str(ROOT)}
    argv = [source, "--to", f"{bucket}/c", "--vae", micro_vae, "--resolution", 64, "--workers", 2]
    argv += ["--storage-option", "key=testing", "--storage-option", "secret=env:MINE"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.encode", *map(str, argv)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = b""
    while job.poll() is None:
        seen += read_arguments_of_all_processes()
        time.sleep(0.5)
    out, _ = job.communicate()
    assert job.returncode == 0, out
    assert b"jobs.encode" in seen
    assert SECRET.encode() not in seen
    assert SECRET not in out
    assert not [name for name, data in objects(f"{bucket}/c").items() if SECRET.encode() in data]
