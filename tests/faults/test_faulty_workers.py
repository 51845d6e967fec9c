"""Faulty workers on a local Ray: they hang, fail, or run out of memory. They are replaced, and no image is lost."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import img2dataset_members, write_tar
from tests.faulty_job import run_faulty_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.ray]

# A job with one faulty worker: the first that starts or encodes. `{fault}` is the name of its fault.
FAULTY_JOB = """
import os, time

def hang():
    time.sleep(3600)

def is_first():
    try:
        os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def fill_memory():
    blocks = []
    while True:
        blocks.append(os.urandom(1 << 20) * 64)
        time.sleep(0.02)

def cuda_error(batch):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def unknown_error(batch):
    time.sleep(0.01)
    raise ValueError("an error of an unknown kind")

def read_half():
    from fsspec.implementations.local import LocalFileOpener
    read = LocalFileOpener.read
    LocalFileOpener.read = lambda file, size=-1: read(file, size) if file.tell() < file.size // 2 else b""

class Faulty(EncodeSpec):
    def build(self, vae, stop):
        if {fault!r} == "start" and not is_first():
            raise MemoryError("no room for the model")
        if {fault!r} == "hang_at_start" and is_first():
            hang()
        encoder = EncodeSpec.build(self, vae, stop)
        latent_encoder = encoder.context.latent_encoder
        run_model = latent_encoder.launch

        if {fault!r} in ("cuda_error", "unknown_error") and is_first():
            latent_encoder.launch = {fault}
            return encoder
        if {fault!r} == "read_half" and is_first():
            read_half()
            return encoder

        def crawl():
            for _ in range(12):
                time.sleep(1)
                latent_encoder.runs += 1  # as the encoder does after each tile
            open({marker!r} + "-crawled", "x").close()

        def launch(batch):
            if {fault!r} in ("hang", "crawl", "fill_memory") and is_first():
                {fault}()
            elif {fault!r} in ("unknown_error", "start"):
                time.sleep(0.5)  # so that the other worker does not encode everything first
            return run_model(batch)

        latent_encoder.launch = launch
        return encoder
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of four tars of ten samples."""
    for number in range(4):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(10 * number, 10))
    return tmp_path / "s"


@pytest.fixture
def reference(
    latentmill: Callable[..., tuple[int, str, str]], source: Path, micro_vae: Path, tmp_path: Path
) -> dict[str, Any]:
    """Return the statistics of an undisturbed run."""
    assert latentmill("encode", *make_arguments(source, tmp_path / "reference", micro_vae), "--workers", 0)[0] == 0
    return read_statistics(tmp_path / "reference")


def make_arguments(source: Path, cache: Path, vae: Path) -> list[object]:
    return [source, "--to", cache, "--vae", vae, "--resolution", 64, "--batch-size", 8, "--cpus-per-worker", 1]


def read_statistics(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "stats.json").read_text()))


def encode(
    source: Path, cache: Path, vae: Path, fault: str, workers: int, stall_timeout: int = 15, **environment: str
) -> subprocess.CompletedProcess[str]:
    definition = FAULTY_JOB.format(fault=fault, marker=str(cache.with_name("once")))
    argv = [*make_arguments(source, cache, vae), "--workers", workers, "--stall-timeout", stall_timeout]
    return run_faulty_job(definition, argv, cache.parent, **environment)


def read_batch_sizes(cache: Path) -> set[int]:
    """Return the batch sizes with which units were encoded."""
    return {json.loads(path.read_text())["compute"]["batch_size"] for path in cache.glob("_commits/*")}


@pytest.mark.fault(13, "a worker hangs in the model")
def test_a_worker_that_hangs_while_it_encodes_is_replaced(
    source: Path, reference: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    job = encode(source, tmp_path / "c", micro_vae, "hang", workers=2)
    assert job.returncode == 0, job.stderr
    assert read_statistics(tmp_path / "c")["digest"] == reference["digest"]
    assert read_batch_sizes(tmp_path / "c") == {8}
    assert "retrying unit " in job.stderr
    assert "no progress for 15 s" in job.stderr


@pytest.mark.fault(13, "a worker hangs while it loads its model")
def test_a_worker_that_hangs_while_it_starts_is_replaced(
    source: Path, reference: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    job = encode(source, tmp_path / "c", micro_vae, "hang_at_start", workers=1)
    assert job.returncode == 0, job.stderr
    assert re.search(r"restarting worker-\d+( on \S+)?: no progress for 15 s", job.stderr), job.stderr
    assert read_statistics(tmp_path / "c")["digest"] == reference["digest"]


def test_a_slow_worker_is_not_replaced(
    source: Path, reference: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    job = encode(source, tmp_path / "c", micro_vae, "crawl", workers=1, stall_timeout=5)
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "once-crawled").exists()
    assert "retrying unit " not in job.stderr
    assert read_statistics(tmp_path / "c")["digest"] == reference["digest"]


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 32 tars of 8 samples."""
    folder = tmp_path_factory.mktemp("many") / "s"
    for number in range(32):
        write_tar(folder / f"{number:02}.tar", img2dataset_members(8 * number, 8))
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(
            "cuda_error",
            r"restarting worker-\d+ on \S+: RuntimeError: CUDA error: an illegal memory access",
            id="cuda_error",
            marks=pytest.mark.fault(26, "every call of one worker's model fails (a CUDA error)"),
        ),
        pytest.param(
            "unknown_error",
            r"restarting worker-\d+ on \S+: ValueError: an error of an unknown kind",
            id="unknown_error",
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
def test_one_faulty_worker_of_two_does_not_change_the_cache(
    latentmill: Callable[..., tuple[int, str, str]],
    many_shards: Path,
    micro_vae: Path,
    tmp_path: Path,
    fault: str,
    message: str,
) -> None:
    assert latentmill("encode", *make_arguments(many_shards, tmp_path / "reference", micro_vae), "--workers", 0)[0] == 0
    reference = read_statistics(tmp_path / "reference")
    job = encode(many_shards, tmp_path / "c", micro_vae, fault, workers=2)
    assert job.returncode == 0, job.stderr
    statistics = read_statistics(tmp_path / "c")
    assert (statistics["count"], statistics["rejected"], statistics["digest"]) == (256, {}, reference["digest"])
    assert re.search(message, job.stderr), job.stderr


@pytest.mark.fault(15, "a machine runs out of memory, and Ray ends the worker")
def test_batches_are_smaller_after_a_worker_ran_out_of_memory(
    source: Path, reference: dict[str, Any], micro_vae: Path, tmp_path: Path
) -> None:
    """The samples are the same. Their bits may differ by rounding, as between any two batch sizes.

    There is one worker, because a second one would often encode everything before the first is replaced.
    """
    memory = {line.split()[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    used = 1 - memory["MemAvailable:"] / memory["MemTotal:"]
    limits = {"RAY_memory_usage_threshold": f"{used + 0.15:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    job = encode(source, tmp_path / "c", micro_vae, "fill_memory", workers=1, **limits)
    assert job.returncode == 0, job.stderr
    statistics = read_statistics(tmp_path / "c")
    assert statistics["count"] == reference["count"] == 40
    assert statistics["mean"] == pytest.approx(reference["mean"], abs=1e-5)
    assert 4 in read_batch_sizes(tmp_path / "c"), f"the next worker has smaller batches\n{job.stderr}"
