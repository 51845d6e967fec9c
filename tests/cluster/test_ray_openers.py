"""Remote openers as actors of a local Ray: the same images, the loss of an actor, and a whole job."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from jobs.ray_openers import RayOpener, RayOpeners
from pipeline.errors import FilteredOut, Rejected
from pipeline.images.prepare import OpenedImage, make_opener
from pipeline.images.transform import Transform
from pipeline.limits import DEFAULT_LIMITS
from tests.conftest import encoded, img2dataset_members, smooth, write_tar
from tests.ray_processes import list_descendants

ROOT = Path(__file__).parents[2]
TRANSFORM = Transform(resolution=64, min_size=20, crop="random", flip="random")

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def opener() -> Iterator[RayOpener]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        (opener,) = RayOpeners(1).start(TRANSFORM, DEFAULT_LIMITS)
        opener.wait_until_ready()
        yield opener
    finally:
        ray.shutdown()


def find_process(name: bytes, parent: int) -> int | None:
    """Return the id of the descendant process with this in its command line."""
    for pid in list_descendants(parent):
        try:
            if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:  # it has ended
            continue
    return None


def test_a_block_is_opened_as_in_a_thread(opener: RayOpener) -> None:
    open_here = make_opener(TRANSFORM, DEFAULT_LIMITS)
    block = [(encoded(smooth(number, 40, 60 + number)), "s", str(number)) for number in range(8)]
    *opened, small, broken = opener.open_images([*block, (encoded(smooth(9, 19, 30)), "s", "k"), (b"no", "s", "k")])
    for file, actual in zip(block, opened, strict=True):
        expected = open_here(*file)
        assert isinstance(actual, OpenedImage)
        assert expected is not None
        assert torch.equal(actual.pixels, expected.pixels)
        assert actual.fit == expected.fit
    assert isinstance(small, FilteredOut)
    assert small.filter == "min_size"
    assert isinstance(broken, Rejected)
    assert (broken.reason, broken.detail) == ("not_an_image", "the bytes are not a supported image format")


def test_a_lost_actor_is_reported_and_started_again(opener: RayOpener) -> None:
    pid = find_process(b"ray::OpenerActor", os.getpid())
    assert pid is not None
    threading.Timer(0.5, os.kill, [pid, signal.SIGKILL]).start()
    file = (encoded(smooth(1)), "s", "k")
    with pytest.raises(ConnectionError):
        while True:
            opener.open_images([file] * 16)
    for _ in range(100):
        try:
            opener.wait_until_ready()
            break
        except ConnectionError:  # it is still being lost
            time.sleep(0.1)
    assert len(opener.open_images([file])) == 1


def test_a_job_with_a_remote_opener_gives_the_same_cache(micro_vae: Path, tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s/{number:05d}.tar", img2dataset_members(50 * number, 50))
    digests = []
    for name, options in (("a", ["--workers", "0"]), ("b", ["--workers", "1", "--remote-openers", "1"])):
        argv = ["s", "--to", name, "--vae", str(micro_vae), "--resolution", "64", *options]
        job = subprocess.run(
            [sys.executable, "-m", "jobs.encode", *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert job.returncode == 0, job.stderr
        digests += [line.split()[-1] for line in job.stdout.splitlines() if line.split()[0] == "digest"]
    assert len(digests) == 2
    assert digests[0] == digests[1]
