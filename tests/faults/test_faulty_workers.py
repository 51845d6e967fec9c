"""Workers on a local Ray that hang in the model, or eat their machine's memory: replaced, and all is done."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import img2dataset_members, write_tar
from tests.sick_job import run_sick_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.ray]

# A job whose first worker does something once, when it starts or when it encodes, and never comes back from it.
SICK = """
import os, time

def hang():
    time.sleep(3600)

def first():
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def eat():
    held = []
    while True:
        held.append(os.urandom(1 << 20) * 64)
        time.sleep(0.02)

def no_cuda(batch, shard=""):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def no_idea(batch, shard=""):
    time.sleep(0.01)
    raise ValueError("nobody knows this error")

def read_half():
    from fsspec.implementations.local import LocalFileOpener
    read = LocalFileOpener.read
    LocalFileOpener.read = lambda file, size=-1: read(file, size) if file.tell() < file.size // 2 else b""

class Sick(EncodeSpec):
    def build(self, vae, stop):
        if {what!r} == "start" and not first():
            raise MemoryError("no room for the model")
        if {what!r} == "hang_at_start" and first():
            hang()
        encoder = EncodeSpec.build(self, vae, stop)
        latent_encoder = encoder.context.latent_encoder
        healthy = latent_encoder.encode

        if {what!r} in ("no_cuda", "no_idea") and first():
            latent_encoder.encode = {what}
            return encoder
        if {what!r} == "read_half" and first():
            read_half()
            return encoder

        def crawl():
            for _ in range(12):
                time.sleep(1)
                latent_encoder.runs += 1  # as after each tile
            open({marker!r} + "-crawled", "x").close()

        def encode(batch, shard=""):
            if {what!r} in ("hang", "crawl", "eat") and first():
                {what}()
            elif {what!r} in ("no_idea", "start"):
                time.sleep(0.5)  # so that the healthy worker has not done all before
            return healthy(batch, shard)

        latent_encoder.encode = encode
        return encoder
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four tars of ten samples."""
    for number in range(4):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(10 * number, 10))
    return tmp_path / "s"


@pytest.fixture
def calm(
    latentmill: Callable[..., tuple[int, str, str]], source: Path, micro_vae: Path, tmp_path: Path
) -> dict[str, Any]:
    """The statistics of a run that nothing disturbed."""
    assert latentmill("encode", *arguments(source, tmp_path / "calm", micro_vae), "--workers", 0)[0] == 0
    return statistics(tmp_path / "calm")


def arguments(source: Path, cache: Path, vae: Path) -> list[object]:
    return [source, "--to", cache, "--vae", vae, "--resolution", 64, "--slice-size", 8, "--cpus-per-worker", 1]


def statistics(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "stats.json").read_text()))


def encode(
    source: Path, cache: Path, vae: Path, what: str, workers: int, stall_timeout: int = 15, **environment: str
) -> subprocess.CompletedProcess[str]:
    definition = SICK.format(what=what, marker=str(cache.with_name("once")))
    argv = [*arguments(source, cache, vae), "--workers", workers, "--stall-timeout", stall_timeout]
    return run_sick_job(definition, argv, cache.parent, **environment)


def slices(cache: Path) -> set[int]:
    """The slice sizes that units were done with."""
    return {json.loads(path.read_text())["compute"]["slice_size"] for path in cache.glob("_commits/*")}


@pytest.mark.fault(13, "a worker hangs in the model")
def test_a_worker_that_stands_still_is_replaced(
    source: Path, calm: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    done = encode(source, tmp_path / "c", micro_vae, "hang", workers=2)
    assert done.returncode == 0, done.stderr
    assert statistics(tmp_path / "c")["digest"] == calm["digest"]
    assert slices(tmp_path / "c") == {8}
    assert "retrying unit " in done.stderr
    assert "no progress for 15 s" in done.stderr


@pytest.mark.fault(13, "a worker hangs while it loads its model")
def test_a_worker_that_hangs_while_it_starts_is_replaced(
    source: Path, calm: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    done = encode(source, tmp_path / "c", micro_vae, "hang_at_start", workers=1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"restarting worker-\d+( on \S+)?: no progress for 15 s", done.stderr), done.stderr
    assert statistics(tmp_path / "c")["digest"] == calm["digest"]


def test_a_worker_that_is_slow_is_not(source: Path, calm: dict[str, Any], micro_vae: Path, tmp_path: Path) -> None:
    done = encode(source, tmp_path / "c", micro_vae, "crawl", workers=1, stall_timeout=5)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "once-crawled").exists()
    assert "retrying unit " not in done.stderr
    assert statistics(tmp_path / "c")["digest"] == calm["digest"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 tars of 8 samples."""
    folder = tmp_path_factory.mktemp("many") / "s"
    for number in range(32):
        write_tar(folder / f"{number:02}.tar", img2dataset_members(8 * number, 8))
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        pytest.param(
            "no_cuda",
            r"restarting worker-\d+ on \S+: RuntimeError: CUDA error: an illegal memory access",
            id="no_cuda",
            marks=pytest.mark.fault(26, "every call of one worker's model fails (a CUDA error)"),
        ),
        pytest.param(
            "no_idea",
            r"restarting worker-\d+ on \S+: ValueError: nobody knows this error",
            id="no_idea",
            marks=pytest.mark.fault(26, "every call of one worker's model fails (an unknown error)"),
        ),
        pytest.param(
            "read_half",
            r"retrying unit ",
            id="read_half",
            marks=pytest.mark.fault(27, "one worker reads every file short"),
        ),
        pytest.param(
            "start",
            r"restarting worker-\d+( on \S+)?: MemoryError: no room for the model",
            id="start",
            marks=pytest.mark.fault(30, "workers cannot start in one of two places"),
        ),
    ],
)
def test_one_sick_worker_of_two_costs_nothing(
    latentmill: Callable[..., tuple[int, str, str]],
    many: Path,
    micro_vae: Path,
    tmp_path: Path,
    what: str,
    message: str,
) -> None:
    assert latentmill("encode", *arguments(many, tmp_path / "calm", micro_vae), "--workers", 0)[0] == 0
    calm = statistics(tmp_path / "calm")
    done = encode(many, tmp_path / "c", micro_vae, what, workers=2)
    assert done.returncode == 0, done.stderr
    found = statistics(tmp_path / "c")
    assert (found["count"], found["rejected"], found["digest"]) == (256, {}, calm["digest"])
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.fault(15, "a machine runs out of memory, and Ray ends the worker")
def test_after_a_worker_without_memory_slices_are_smaller(
    source: Path, calm: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    """The same samples; their bits may differ by rounding, as they do between any two sizes of slices.

    One worker, so that the next one has something left to do: a second one would often have done it all by then.
    """
    memory = {line.split()[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    used = 1 - memory["MemAvailable:"] / memory["MemTotal:"]
    limits = {"RAY_memory_usage_threshold": f"{used + 0.15:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    done = encode(source, tmp_path / "c", micro_vae, "eat", workers=1, **limits)
    assert done.returncode == 0, done.stderr
    found = statistics(tmp_path / "c")
    assert found["count"] == calm["count"] == 40
    assert found["mean"] == pytest.approx(calm["mean"], abs=1e-5)
    assert 4 in slices(tmp_path / "c"), f"the worker that came next had smaller slices\n{done.stderr}"
