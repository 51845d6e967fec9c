"""The main job on a local Ray, as a person starts it: in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import audit
from tests.conftest import img2dataset_members, write_tar
from tests.sick_job import run_sick_job

JOB = [sys.executable, "-m", "jobs.encode"]
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


def arguments(source: Path, cache: Path, vae: Path, *more: object) -> list[str]:
    return [*map(str, (source, "--to", cache, "--vae", vae, "--resolution", 64, "--rows-per-part", 10, *more))]


def start(argv: list[str], folder: Path) -> subprocess.Popen[str]:
    """The encode job, started in a folder of the user's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*JOB, *argv], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = job.communicate(timeout=300)
    return job.returncode, out, err


def digest(cache: Path) -> str:
    return str(json.loads((cache / "stats.json").read_text())["digest"])


def assert_whole(cache: Path, calm: str) -> None:
    """Every sample is in the cache once, its files are what was committed, and all is as in the calm run."""
    assert list(audit.find_problems(audit.read_files(cache), 480)) == []
    assert digest(cache) == calm


def descendants(pid: int) -> Iterator[int]:
    """All processes below one, from /proc."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def actors(driver: int) -> list[int]:
    """The actor processes of a driver's local Ray."""
    found = []
    for pid in descendants(driver):
        try:
            if b"ray::RayWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:  # it has ended meanwhile
            continue
    return found


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tars of 60 samples."""
    folder = tmp_path_factory.mktemp("ray") / "shards"
    for number in range(8):
        write_tar(folder / f"{number:05d}.tar", img2dataset_members(60 * number, 60))
    return folder


@pytest.fixture(scope="module")
def calm(source: Path, micro_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run without Ray that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    code, _, err = finish(start(arguments(source, folder / "c", micro_vae, "--workers", 0), folder))
    assert code == 0, err
    return digest(folder / "c")


def test_two_workers_give_the_same_cache_and_a_users_files_do_not_matter(
    source: Path, calm: str, micro_vae: Path, tmp_path: Path
) -> None:
    (tmp_path / "vae.py").write_text("raise SystemExit('the wrong vae')")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/__init__.py").write_text("raise SystemExit('the wrong jobs')")
    argv = [*arguments(source, Path("c"), micro_vae, "--workers", 2, "--json")]
    # a console script has its own folder first on the path, where `python -m` has the user's
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
    assert_whole(tmp_path / "c", calm)


@pytest.mark.fault(1, "a worker dies encoding")
@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_its_units_are_done(
    source: Path, calm: str, micro_vae: Path, tmp_path: Path
) -> None:
    job = start(arguments(source, tmp_path / "c", micro_vae, "--workers", 2, "--json"), tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("c/data/*"))) > 12, job)
    os.kill(actors(job.pid)[0], signal.SIGKILL)
    code, out, err = finish(job)
    assert code == 0, err
    assert_whole(tmp_path / "c", calm)
    assert json.loads(out)["stats"]["digest"] == calm, "Ray's account of the loss is not among the results"


@pytest.mark.fault(5, "the driver of a local Ray dies")
@pytest.mark.slow
def test_a_killed_driver_leaves_what_the_next_run_goes_on_from(
    source: Path, calm: str, micro_vae: Path, tmp_path: Path
) -> None:
    argv = arguments(source, tmp_path / "c", micro_vae, "--workers", 1, "--json")
    job = start(argv, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("c/data/*"))) > 12, job)
    job.kill()
    finish(job)
    standing = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("c/data/*")}
    assert len(standing) < 48

    code, out, err = finish(start(argv, tmp_path))
    assert code == 0, err
    assert_whole(tmp_path / "c", calm)
    assert json.loads(out)["run"]["counts"]["rows"] < 480
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("c/data/*") if path.name in standing}
    assert kept == standing


@pytest.mark.fault(6, "the driver of a local Ray is preempted")
@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_job_at_once_and_the_next_goes_on(
    source: Path, calm: str, micro_vae: Path, tmp_path: Path, sign: int, code: int
) -> None:
    argv = arguments(source, tmp_path / "c", micro_vae, "--workers", 2)
    job = start(argv, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("c/data/*"))) > 5, job)
    job.send_signal(sign)
    returned, out, err = finish(job)
    assert (returned, out) == (code, "")
    assert "run the same command to resume" in err
    assert finish(start(argv, tmp_path))[0] == 0
    assert_whole(tmp_path / "c", calm)


# A job that is told to end (SIGTERM) when it comes to a place: before Ray has started, or when all units are done.
STRUCK = """
import os, signal, sys, threading
import ray
from jobs import encode
from jobs.entry import run_as_script
from pipeline.cache import stats

module, name = {"ray.init": (ray, "init"), "stats.summarize": (stats, "summarize")}[sys.argv.pop(1)]
real = getattr(module, name)

def struck(*given, **named):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    made = real(*given, **named)
    threading.Event().wait(2)
    return made

setattr(module, name, struck)
run_as_script(encode.main)
"""


@pytest.mark.fault(6, "the driver is preempted while Ray starts, and at the very end")
@pytest.mark.slow
@pytest.mark.parametrize("place", ["ray.init", "stats.summarize"])
def test_a_signal_ends_the_job_before_and_after_its_units(
    source: Path, calm: str, micro_vae: Path, tmp_path: Path, place: str
) -> None:
    """`ray.init` has a handler of its own, which would end the job with 15."""
    argv = arguments(source, tmp_path / "c", micro_vae, "--workers", 2)
    (tmp_path / "struck.py").write_text(STRUCK)
    job = subprocess.run(
        [sys.executable, "struck.py", place, *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (job.returncode, job.stdout) == (143, ""), job.stderr
    assert "run the same command to resume" in job.stderr
    outcomes = [json.loads(path.read_text())["outcome"] for path in tmp_path.glob("c/_runs/*.json")]
    assert outcomes == ([] if place == "ray.init" else ["stopped"])
    assert finish(start(argv, tmp_path))[0] == 0
    assert_whole(tmp_path / "c", calm)


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_job_with_their_reason(source: Path, micro_vae: Path, tmp_path: Path) -> None:
    broken = "class Sick(EncodeSpec):\n    def build(self, vae, stop): raise MemoryError('no room for the model')\n"
    job = run_sick_job(broken, arguments(source, tmp_path / "c", micro_vae, "--workers", 1), tmp_path)
    err = job.stderr
    assert job.returncode == 1
    assert "workers cannot start: " in err and "no room for the model" in err
    assert err.count("restarting worker-") == 2
    assert "Traceback" not in err
