"""The command next to a user's modules with the names of ours, and with a Python that lacks modules."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import encoded, slow_param, smooth

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
WRONG = "raise SystemExit('a module of the user')\n"
READ = """
import sys
from latentmill import Cache, __version__

cache = Cache.open(sys.argv[1], verify=True)
latents = [cache.model_latent(row) for file in cache.files() for row in cache.rows(file)]
print(__version__, len(latents), *latents[0].shape)
"""
FIND = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"


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


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.ray)])
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


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package from a copy of its files, without the network. Returns the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    sources, wheels = folder / "sources", folder / "wheels"
    for name in ("latentmill", "vae", "pipeline", "jobs"):
        shutil.copytree(ROOT / name, sources / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, sources],
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.iterdir()
    return wheel


def create_environment(folder: Path) -> Path:
    """Create an empty virtual environment. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin/python"


@pytest.mark.slow
@pytest.mark.ray
def test_a_users_modules_do_not_break_the_installed_package(
    project: Path, micro_vae: Path, wheel: Path, tmp_path: Path
) -> None:
    """Install the built wheel in a new environment that uses the libraries of this one."""
    environment = tmp_path / "environment"
    python = create_environment(environment)
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
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


@pytest.fixture
def runtime_environment(tmp_path: Path, wheel: Path) -> Iterator[Path]:
    """Install the wheel and what it requires, in the versions of constraints.txt. Returns the environment's folder."""
    environment = tmp_path / "environment"
    install = [*PIP, "--python", create_environment(environment), "install", "--quiet"]
    for package in ("torch", wheel):  # torch first, as in the Makefile
        subprocess.run([*install, "--constraint", ROOT / "constraints.txt", package], check=True)
    yield environment
    shutil.rmtree(environment)  # pytest would keep its gigabyte


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_installed_package_needs_only_its_runtime_dependencies(
    project: Path, micro_vae: Path, runtime_environment: Path
) -> None:
    python, latentmill = runtime_environment / "bin/python", runtime_environment / "bin/latentmill"
    found = run([python, "-c", FIND, "ray", "pytest", "mypy", "diffusers", "moto", "skimage"], project)
    assert found.stdout.split() == ["ray"], found.stderr

    stats = []
    for workers in (0, 1):
        cache = f"c{workers}"
        argv = encode_argv(micro_vae, "--workers", workers)
        argv[3] = cache
        decode = ["decode", cache, "--to", f"previews{workers}", "--workers", 0, "--json"]
        for command in (argv, decode, ["verify", cache, "--json"], ["stats", cache, "--json"]):
            job = run([latentmill, *command], project)
            assert job.returncode == 0, (command, job.stderr)
        stats.append(json.loads(job.stdout))
        assert stats[-1]["count"] == 3
        assert (project / f"previews{workers}/sheets/00000.png").is_file()
    assert stats[0]["digest"] == stats[1]["digest"]


@pytest.mark.parametrize("command", ["latentmill", "jobs.status", "jobs.encode"])
@pytest.mark.parametrize("missing", ["resource", slow_param("fcntl")])
def test_an_unsupported_platform_is_named_in_the_error(tmp_path: Path, command: str, missing: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    argv = ["status", "cache"] if command == "latentmill" else ["cache"]
    job = run([sys.executable, "-m", command, *argv], tmp_path, tmp_path, ROOT)
    message = f"latentmill: {sys.platform} is not supported; use Linux, macOS, or WSL on Windows\n"
    assert (job.returncode, job.stdout, job.stderr) == (2, "", message)


@pytest.mark.slow
def test_a_users_modules_do_not_break_the_processes_of_an_export(project: Path, micro_vae: Path) -> None:
    command = [sys.executable, "-m", "latentmill"]
    assert run([*command, *encode_argv(micro_vae, "--workers", 0)], project, project, ROOT).returncode == 0
    argv = ["export", "c", "--format", "mds", "--to", "o", "--workers", 2, "--json"]
    job = run([*command, *argv], project, project, ROOT)
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["exported"] == 3
