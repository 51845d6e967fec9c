"""The encode job on a local Ray, started as a separate process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import check_cache
from tests.conftest import img2dataset_members, write_tar
from tests.faulty_job import run_faulty_job
from tests.ray_processes import find_actors

JOB = [sys.executable, "-m", "jobs.encode"]
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


def make_arguments(source: Path, cache: Path, vae: Path, *more: object) -> list[str]:
    return [*map(str, (source, "--to", cache, "--vae", vae, "--resolution", 64, "--rows-per-part", 10, *more))]


def start_job(argv: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start an encode job in a folder of the user."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*JOB, *argv], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish_job(job: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = job.communicate(timeout=300)
    return job.returncode, out, err


def read_digest(cache: Path) -> str:
    return str(json.loads((cache / "stats.json").read_text())["digest"])


def assert_complete(cache: Path, reference_digest: str) -> None:
    """Check that each sample is in the cache once, files are as committed, and the digest is the expected one."""
    assert list(check_cache.find_problems(check_cache.read_files(cache), 480)) == []
    assert read_digest(cache) == reference_digest


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of eight tars of 60 samples."""
    folder = tmp_path_factory.mktemp("ray") / "shards"
    for number in range(8):
        write_tar(folder / f"{number:05d}.tar", img2dataset_members(60 * number, 60))
    return folder


@pytest.fixture(scope="module")
def reference_digest(source: Path, micro_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of an undisturbed run without Ray."""
    folder = tmp_path_factory.mktemp("reference")
    code, _, err = finish_job(start_job(make_arguments(source, folder / "c", micro_vae, "--workers", 0), folder))
    assert code == 0, err
    return read_digest(folder / "c")


@pytest.mark.slow
def test_two_workers_give_the_same_cache_beside_a_users_modules(
    source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path
) -> None:
    (tmp_path / "vae.py").write_text("raise SystemExit('the wrong vae')")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/__init__.py").write_text("raise SystemExit('the wrong jobs')")
    argv = [*make_arguments(source, Path("c"), micro_vae, "--workers", 2, "--json")]
    # a console script has its own folder first on the path, `python -m` has that of the user
    script = "import sys; sys.path.pop(0); from jobs.encode import *; run_as_script(main)"
    job = subprocess.run(
        [sys.executable, "-c", script, *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["stats"]["count"] == 480
    assert_complete(tmp_path / "c", reference_digest)


@pytest.mark.fault(1, "a worker dies encoding")
@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_its_units_are_done(
    source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path
) -> None:
    job = start_job(make_arguments(source, tmp_path / "c", micro_vae, "--workers", 2, "--json"), tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("c/data/*"))) > 12, job)
    os.kill(find_actors(job.pid)[0], signal.SIGKILL)
    code, out, err = finish_job(job)
    assert code == 0, err
    assert_complete(tmp_path / "c", reference_digest)
    assert json.loads(out)["stats"]["digest"] == reference_digest, "standard output has no messages of Ray"


@pytest.mark.fault(5, "the driver of a local Ray dies")
@pytest.mark.slow
def test_the_next_run_resumes_after_a_killed_driver(
    source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path
) -> None:
    argv = make_arguments(source, tmp_path / "c", micro_vae, "--workers", 1, "--json")
    job = start_job(argv, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("c/data/*"))) > 12, job)
    job.kill()
    finish_job(job)
    existing_parts = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("c/data/*")}
    assert len(existing_parts) < 48

    code, out, err = finish_job(start_job(argv, tmp_path))
    assert code == 0, err
    assert_complete(tmp_path / "c", reference_digest)
    assert json.loads(out)["run"]["counts"]["rows"] < 480
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("c/data/*") if path.name in existing_parts}
    assert kept == existing_parts


@pytest.mark.fault(6, "the driver of a local Ray is preempted")
@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_and_the_next_run_resumes(
    source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path, sign: int, code: int
) -> None:
    argv = make_arguments(source, tmp_path / "c", micro_vae, "--workers", 2)
    job = start_job(argv, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("c/data/*"))) > 5, job)
    job.send_signal(sign)
    returned, out, err = finish_job(job)
    assert (returned, out) == (code, "")
    assert "run the same command to resume" in err
    assert finish_job(start_job(argv, tmp_path))[0] == 0
    assert_complete(tmp_path / "c", reference_digest)


# A job that gets SIGTERM in one of two phases: before Ray has started, or when all units are done.
SIGNALLED_JOB = """
import os, signal, sys, threading
import ray
from jobs import encode
from jobs.entry import run_as_script
from pipeline.cache import stats

module, name = {"ray.init": (ray, "init"), "stats.summarize": (stats, "summarize")}[sys.argv.pop(1)]
real = getattr(module, name)

def send_signal(*args, **kwargs):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    result = real(*args, **kwargs)
    threading.Event().wait(2)
    return result

setattr(module, name, send_signal)
run_as_script(encode.main)
"""


@pytest.mark.fault(6, "the driver is preempted while Ray starts, and at the very end")
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["ray.init", "stats.summarize"])
def test_a_signal_ends_the_job_before_and_after_its_units(
    source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path, phase: str
) -> None:
    """`ray.init` installs its own handler, with which the job would exit with 15."""
    argv = make_arguments(source, tmp_path / "c", micro_vae, "--workers", 2)
    (tmp_path / "signalled.py").write_text(SIGNALLED_JOB)
    job = subprocess.run(
        [sys.executable, "signalled.py", phase, *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (job.returncode, job.stdout) == (143, ""), job.stderr
    assert "run the same command to resume" in job.stderr
    outcomes = [json.loads(path.read_text())["outcome"] for path in tmp_path.glob("c/_runs/*.json")]
    assert outcomes == ([] if phase == "ray.init" else ["stopped"])
    assert finish_job(start_job(argv, tmp_path))[0] == 0
    assert_complete(tmp_path / "c", reference_digest)


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_job_with_the_reason(source: Path, micro_vae: Path, tmp_path: Path) -> None:
    broken = "class Faulty(EncodeSpec):\n    def build(self, vae, stop): raise MemoryError('no room for the model')\n"
    job = run_faulty_job(broken, make_arguments(source, tmp_path / "c", micro_vae, "--workers", 1), tmp_path)
    err = job.stderr
    assert job.returncode == 1
    assert "workers cannot start: " in err and "no room for the model" in err
    assert err.count("restarting worker-") == 2
    assert "Traceback" not in err
