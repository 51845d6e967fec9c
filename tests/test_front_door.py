"""The command next to a user's modules with the names of ours, and with a Python that lacks modules."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import encoded, smooth

ROOT = Path(__file__).parents[1]
WRONG = "raise SystemExit('a module of the user')\n"
READ = """
import sys
from latentmill import Cache, __version__

cache = Cache.open(sys.argv[1], verify=True)
latents = [cache.model_latent(row) for file in cache.files() for row in cache.rows(file)]
print(__version__, len(latents), *latents[0].shape)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a user's folder: modules with our names, image files, and Parquet, whose footer a child process reads."""
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    (folder / "vae").mkdir()
    for name in ("pipeline.py", "jobs/__init__.py", "vae/__init__.py"):
        (folder / name).write_text(WRONG)
    (folder / "images").mkdir()
    (folder / "images/0.png").write_bytes(encoded(smooth(0), "PNG"))
    table = pa.table({"image": [encoded(smooth(number)) for number in (1, 2)]})
    pq.write_table(table, folder / "images/1.parquet")
    return folder


def run(command: Sequence[object], folder: Path, *path: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder. path: the content of PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=110
    )


def encode_argv(micro_vae: Path, *more: object) -> list[object]:
    return ["encode", "images", "--to", "c", "--vae", micro_vae, "--resolution", 64, "--json", *more]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.ray])])
def test_a_users_modules_do_not_break_the_command(project: Path, micro_vae: Path, workers: int) -> None:
    command = [sys.executable, "-m", "latentmill", *encode_argv(micro_vae, "--workers", workers)]
    job = run(command, project, project, ROOT)
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["stats"]["count"] == 3
    reader = run([sys.executable, "-c", READ, "c"], project, project, ROOT)
    assert reader.stdout.split() == ["0.1.0", "3", "4", "8", "8"], reader.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_users_modules_on_the_path_do_not_break_a_job_from_a_checkout(project: Path, micro_vae: Path) -> None:
    argv = encode_argv(micro_vae, "--workers", 1)[1:]
    argv[0], argv[2] = project / "images", project / "c"
    job = run([sys.executable, "-m", "jobs.encode", *argv], ROOT, project)
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["stats"]["count"] == 3


@pytest.mark.slow
@pytest.mark.ray
def test_a_users_modules_do_not_break_the_installed_package(project: Path, micro_vae: Path, tmp_path: Path) -> None:
    """Install the built wheel in a new environment that uses the libraries of this one."""
    sources, wheels, environment = tmp_path / "sources", tmp_path / "wheels", tmp_path / "environment"
    for name in ("latentmill", "vae", "pipeline", "jobs"):
        shutil.copytree(ROOT / name, sources / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, sources],
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = environment.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    location = run([python, "-c", "import latentmill; print(latentmill.__file__, latentmill.__version__)"], tmp_path)
    assert location.stdout.split() == [str(site / "latentmill/__init__.py"), "0.1.0"]
    for workers, command in ((0, [environment / "bin/latentmill"]), (1, [python, "-m", "latentmill"])):
        argv = encode_argv(micro_vae, "--workers", workers)
        argv[3] = f"c{workers}"
        job = run([*command, *argv], project, project)
        assert job.returncode == 0, job.stderr
        assert json.loads(job.stdout)["stats"]["count"] == 3
        reader = run([python, "-c", READ, argv[3]], project, project)
        assert reader.stdout.split() == ["0.1.0", "3", "4", "8", "8"], reader.stderr


@pytest.mark.parametrize("command", ["latentmill", "jobs.status", "jobs.encode"])
@pytest.mark.parametrize("missing", ["resource", "fcntl"])
def test_an_unsupported_platform_is_named_in_the_error(tmp_path: Path, command: str, missing: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    argv = ["status", "cache"] if command == "latentmill" else ["cache"]
    job = run([sys.executable, "-m", command, *argv], tmp_path, tmp_path, ROOT)
    message = f"latentmill: {sys.platform} is not supported; use Linux, macOS, or WSL on Windows\n"
    assert (job.returncode, job.stdout, job.stderr) == (2, "", message)
