"""Jobs that die, freeze or overlap, and stores with faults, over real HTTP.

The jobs are separate processes. At chosen requests, a proxy in front of the store kills or stops a job, or injects a
fault.
"""

import contextlib
import fnmatch
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from bench import check_cache
from tests.conftest import img2dataset_members, write_tar
from tests.proxy import Proxy, Request
from tests.servers import names, objects, read, upload

ROOT = Path(__file__).parents[2]
SAMPLES = 30
Command = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three tars of ten samples, with one reject in each."""
    folder = tmp_path_factory.mktemp("faults") / "shards"
    for number in range(3):
        members = img2dataset_members(10 * number, 10)
        members[f"{10 * number + 7:09d}.jpg"] = b"no image"
        write_tar(folder / f"{number}.tar", members)
    assert check_cache.count_samples(folder) == SAMPLES
    return folder


@pytest.fixture
def reference_digest(latentmill: Command, folder: Path, micro_vae: Path, tmp_path: Path) -> str:
    """Return the digest of an undisturbed run on disk."""
    argv = ["encode", folder, "--to", tmp_path / "reference", *make_options(micro_vae)]
    assert latentmill(*argv)[0] == 0
    return str(json.loads((tmp_path / "reference/stats.json").read_text())["digest"])


def make_options(vae: Path) -> list[object]:
    return ["--vae", vae, "--resolution", 64, "--rows-per-part", 3, "--workers", 0, "--max-reject-rate", 1]


@pytest.fixture
def source(folder: Path, bucket: str) -> str:
    return upload(folder, f"{bucket}/shards")


@pytest.fixture
def start_job(
    source: str, bucket: str, micro_vae: Path, proxy: Proxy
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts an encode job, through the proxy, into the folder `c` of the bucket."""
    jobs: list[subprocess.Popen[str]] = []

    def run(*more: object) -> subprocess.Popen[str]:
        argv = [source, "--to", f"{bucket}/c", *make_options(micro_vae), "--json", *more]
        command = [sys.executable, "-m", "jobs.encode", *map(str, argv)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        jobs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()
        job.communicate()


def finish_job(job: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = job.communicate(timeout=120)
    return job.returncode, out + err


def read_digest(bucket: str) -> str:
    return str(json.loads(read(f"{bucket}/c/stats.json"))["digest"])


def assert_complete(bucket: str, reference_digest: str) -> None:
    """Check that each sample is in the cache once, files are as committed, and the digest is the expected one."""
    assert list(check_cache.find_problems(objects(f"{bucket}/c"), SAMPLES)) == []
    assert read_digest(bucket) == reference_digest


def is_put(request: Request, pattern: str) -> bool:
    """Return whether a request puts an object whose path matches a pattern."""
    return request.method == "PUT" and fnmatch.fnmatch(request.path, f"*/c/{pattern}")


def kill(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGKILL)
    job.wait()


class Moment:
    """The arrival of the COUNT-th PUT of a path. `reached` is set then."""

    def __init__(self, pattern: str, count: int = 1) -> None:
        self.pattern, self.remaining, self.reached = pattern, count, threading.Event()

    def is_now(self, request: Request) -> bool:
        if self.reached.is_set() or not is_put(request, self.pattern):
            return False
        self.remaining -= 1
        if not self.remaining:
            self.reached.set()
        return not self.remaining


def kill_at(moment: Moment, job: subprocess.Popen[str], proxy: Proxy, forwarded: bool) -> None:
    """Kill a job when a PUT arrives: before it reaches the store, or, if it is forwarded, right after it."""

    def kill_before(request: Request) -> str | None:
        if not forwarded and moment.is_now(request):
            kill(job)
            return "reset"
        return None

    proxy.rule = kill_before
    proxy.after = lambda request: kill(job) if forwarded and moment.is_now(request) else None
    assert finish_job(job)[0] == -signal.SIGKILL


@pytest.mark.fault(2, "a worker dies after a part")
def test_an_existing_part_is_not_written_again(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, reference_digest: str
) -> None:
    moment = Moment("data/*", count=4)
    jobs = [start_job()]
    proxy.after = lambda request: kill(jobs[0]) if moment.is_now(request) else None
    assert finish_job(jobs[0])[0] == -signal.SIGKILL
    existing_parts = {name for name in names(f"{bucket}/c") if name.startswith("data/")}
    assert 3 <= len(existing_parts) <= 5
    before = len(proxy.seen)
    code, out = finish_job(start_job())
    assert code == 0, out
    assert_complete(bucket, reference_digest)
    rewritten = {request.path for request in proxy.seen[before:] if is_put(request, "data/*")}
    assert not {name for name in existing_parts if any(path.endswith(name) for path in rewritten)}


@pytest.mark.parametrize(
    ("pattern", "forwarded"),
    [
        pytest.param("_rejects/*", False, marks=pytest.mark.fault(3, "a worker dies after its unit's last part")),
        pytest.param("_commits/*", False, marks=pytest.mark.fault(4, "a worker dies after writing rejects")),
        pytest.param("_commits/*", True, marks=pytest.mark.fault(5, "a driver dies; the same command goes on")),
    ],
)
def test_a_unit_is_resumed_without_writing_its_parts_again(
    start_job: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    bucket: str,
    reference_digest: str,
    pattern: str,
    forwarded: bool,
) -> None:
    kill_at(Moment(pattern), start_job(), proxy, forwarded)
    unit = next(request.path for request in reversed(proxy.seen) if is_put(request, pattern)).rsplit("/", 1)[1]
    count = len(proxy.seen)
    code, out = finish_job(start_job())
    assert code == 0, out
    assert_complete(bucket, reference_digest)
    stem = unit.rsplit(".", 1)[0]
    assert not [r for r in proxy.seen[count:] if is_put(r, f"data/{stem}*")], "its parts exist already"


@pytest.mark.fault(32, "a driver dies before, or after, it writes the commit log")
@pytest.mark.parametrize("forwarded", [False, True], ids=["before", "after"])
def test_the_commit_log_of_a_killed_driver_is_completed(
    start_job: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    bucket: str,
    reference_digest: str,
    forwarded: bool,
) -> None:
    kill_at(Moment("_log/*"), start_job(), proxy, forwarded)
    assert "stats.json" not in names(f"{bucket}/c")
    count = len(proxy.seen)
    code, out = finish_job(start_job())
    assert code == 0, out
    assert_complete(bucket, reference_digest)
    assert not [request for request in proxy.seen[count:] if is_put(request, "data/*")], "all units were done"
    logs = [name for name in names(f"{bucket}/c") if name.startswith("_log/")]
    assert len(logs) == 1, "the log has each commit once"


@pytest.mark.fault(9, "a worker freezes in a request, is replaced, and comes back")
def test_a_frozen_job_adopts_the_parts_of_its_replacement(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, reference_digest: str
) -> None:
    moment, released = Moment("data/*"), threading.Event()

    def freeze_job(request: Request) -> None:
        if moment.is_now(request):
            frozen.send_signal(signal.SIGSTOP)
            released.wait(100)

    proxy.rule = freeze_job
    frozen = start_job()
    assert moment.reached.wait(60)
    code, out = finish_job(start_job())
    assert code == 0, out
    written_parts = {
        name: data for name, data in objects(f"{bucket}/c").items() if name.startswith(("data/", "_empty/"))
    }
    released.set()
    frozen.send_signal(signal.SIGCONT)
    code, out = finish_job(frozen)
    assert code == 0, out
    assert_complete(bucket, reference_digest)
    assert {name: data for name, data in objects(f"{bucket}/c").items() if name in written_parts} == written_parts


@pytest.mark.fault(11, "two whole jobs on one cache")
def test_two_concurrent_jobs_make_one_cache(
    start_job: Callable[..., subprocess.Popen[str]], bucket: str, reference_digest: str
) -> None:
    jobs = [start_job(), start_job()]
    for job in jobs:
        code, out = finish_job(job)
        assert code == 0, out
    assert_complete(bucket, reference_digest)


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.fault(6, "a job is preempted (SIGTERM)")),
        pytest.param(signal.SIGINT, marks=pytest.mark.fault(6, "a job is interrupted (SIGINT)")),
    ],
)
def test_a_signal_during_a_request_leaves_complete_objects(
    start_job: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    bucket: str,
    reference_digest: str,
    sign: signal.Signals,
) -> None:
    moment = Moment("data/*", count=2)
    jobs = [start_job()]
    proxy.rule = lambda request: jobs[0].send_signal(sign) if moment.is_now(request) else None
    code, out = finish_job(jobs[0])
    assert code == 128 + sign, out
    for name, data in objects(f"{bucket}/c").items():
        if name.startswith("data/"):
            assert pq.read_table(io.BytesIO(data)).num_rows
    assert finish_job(start_job())[0] == 0
    assert_complete(bucket, reference_digest)


@pytest.mark.fault(21, "every PUT arrives a second time, after the end")
def test_a_late_duplicate_of_a_request_changes_nothing(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, account: str, bucket: str, reference_digest: str
) -> None:
    code, out = finish_job(start_job())
    assert code == 0, out
    before = objects(f"{bucket}/c")
    puts = [(path, headers, body) for path, headers, body in proxy.puts if "/c/data/" in path]
    assert len(puts) >= 9
    for path, headers, body in puts:
        with contextlib.closing(http.client.HTTPConnection(urlsplit(account).netloc, timeout=30)) as connection:
            connection.request("PUT", path, body, {k: v for k, v in headers.items() if k.lower() != "expect"})
            assert connection.getresponse().status == 412
    assert objects(f"{bucket}/c") == before
    assert_complete(bucket, reference_digest)


@pytest.mark.fault(21, "every PUT arrives twice, the second answer comes back")
def test_a_duplicated_request_makes_one_object(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, reference_digest: str
) -> None:
    proxy.rule = lambda request: "double" if request.method == "PUT" else None
    code, out = finish_job(start_job())
    assert code == 0, out
    assert_complete(bucket, reference_digest)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("short", marks=pytest.mark.fault(22, "the store's answer is cut in half")),
        pytest.param("stall", marks=pytest.mark.fault(22, "the store's answer stops half way")),
        pytest.param("reset", marks=pytest.mark.fault(22, "the store resets the connection")),
        pytest.param("flip", marks=pytest.mark.fault(23, "bits flip on the way")),
    ],
)
def test_a_damaged_transfer_is_retried(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, reference_digest: str, fault: str
) -> None:
    def rule(request: Request) -> str | None:
        is_shard = request.method == "GET" and request.path.split("?")[0].endswith(".tar")
        return fault if is_shard and request.number == 0 else None

    proxy.rule = rule
    code, out = finish_job(start_job())
    assert code == 0, out
    assert_complete(bucket, reference_digest)


@pytest.mark.fault(17, "bursts of 503, 500 and 429")
def test_bursts_of_errors_are_retried(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, reference_digest: str
) -> None:
    errors, end = (503, 500, 429), [0.0]

    def rule(request: Request) -> int | None:
        end[0] = end[0] or time.monotonic() + 4  # from the first part
        return errors[len(proxy.seen) % 3] if "/c/" in request.path and time.monotonic() < end[0] else None

    job = start_job()
    proxy.rule = lambda request: rule(request) if end[0] or is_put(request, "data/*") else None
    code, out = finish_job(job)
    assert code == 0, out
    assert_complete(bucket, reference_digest)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.fault(29, "a store that is away for more than a minute")
def test_a_job_waits_for_a_store_that_does_not_respond(
    start_job: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    bucket: str,
    reference_digest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each request is tried only once, so that every task fails many times during the outage."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    end = [0.0]

    def rule(request: Request) -> int | None:
        if is_put(request, "data/*") and not end[0]:
            end[0] = time.monotonic() + 75
        return 503 if end[0] and time.monotonic() < end[0] else None

    proxy.rule = rule
    job = start_job("--workers", 2)
    _, err = job.communicate(timeout=250)
    assert job.returncode == 0, err
    assert_complete(bucket, reference_digest)
    assert "the storage does not respond; no task is started until it does: cannot " in err
    assert re.search(r"the storage responds again after [12] min", err)


@pytest.mark.fault(19, "the account is refused midway (403)")
def test_a_refused_write_ends_the_job_and_is_named(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, reference_digest: str
) -> None:
    proxy.rule = lambda request: 403 if is_put(request, "data/*00002.parquet") else None
    code, out = finish_job(start_job())
    assert code == 1
    assert f"cannot write {bucket}/c/data/" in out
    assert "permission denied" in out
    proxy.rule = lambda request: None
    assert finish_job(start_job())[0] == 0
    assert_complete(bucket, reference_digest)


@pytest.mark.fault(24, "an input is replaced while the job runs")
def test_a_replaced_input_fails_its_unit(
    start_job: Callable[..., subprocess.Popen[str]], proxy: Proxy, source: str, bucket: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "other/0.tar", img2dataset_members(90, 10))
    replaced = threading.Event()

    def rule(request: Request) -> None:
        if request.method == "PUT" and "/c/_plan/" in request.path and not replaced.is_set():
            replaced.set()
            threading.Thread(target=upload, args=(tmp_path / "other", source)).start()
            time.sleep(2)

    proxy.rule = rule
    code, out = finish_job(start_job())
    assert code == 1
    assert f"{source}/0.tar has changed since it was planned" in out, out
    assert json.loads(read(f"{bucket}/c/stats.json"))["count"] == 18, "the other two units are done"


@pytest.mark.fault(25, "a foreign file in the cache")
def test_a_foreign_file_fails_its_unit_and_is_named(
    start_job: Callable[..., subprocess.Popen[str]], bucket: str
) -> None:
    assert finish_job(start_job())[0] == 0
    files = objects(f"{bucket}/c")
    part = next(name for name in files if name.startswith("data/0-"))
    import fsspec

    fs = fsspec.filesystem("s3")
    root = f"{bucket}/foreign".removeprefix("s3://")
    for name in ("cache.json", next(n for n in files if n.startswith("_plan/"))):
        fs.pipe_file(f"{root}/{name}", files[name])
    fs.pipe_file(f"{root}/{part}", b"this is no part")
    job = start_job("--to", f"{bucket}/foreign")
    code, out = finish_job(job)
    assert code == 1
    assert f"{part} is not a part of a latentmill cache" in out
    assert read(f"{bucket}/foreign/{part}") == b"this is no part", "nothing is ever overwritten"


@pytest.mark.fault(25, "a reader globs data/ all the while")
def test_a_reader_never_sees_a_partial_file(folder: Path, micro_vae: Path, tmp_path: Path) -> None:
    argv = [folder, "--to", tmp_path / "c", *make_options(micro_vae), "--rows-per-part", 1]
    command = [sys.executable, "-m", "jobs.encode", *map(str, argv)]
    job = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    reads = 0
    while job.poll() is None:
        for path in tmp_path.glob("c/data/*"):
            assert pq.read_table(path).num_rows == 1
            reads += 1
    job.communicate()
    assert job.returncode == 0
    assert reads > 30


SMALL_DISK = """
mount -t tmpfs -o size={size}k tmpfs "$0" || exit 99
"$@" 2> "$0.err"; echo $? > "$0.code"; ls -R "$0" > "$0.names"
mount -o remount,size=64m "$0"
"$@" 2> "$0.err2" && cp "$0/stats.json" "$0.stats"
"""


def run_on_small_disk(folder: Path, size: int, command: list[str]) -> int:
    """Run a command on a small filesystem, enlarge it, and run it again. Returns 99 if mounting is not allowed."""
    folder.mkdir()
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK.format(size=size), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*shell, *command], env=environment, capture_output=True).returncode


@pytest.mark.fault(16, "a disk (tmpfs of 128 KiB) fills up, and is made larger")
@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare")
def test_a_disk_that_fills_up_ends_the_job(
    folder: Path, micro_vae: Path, tmp_path: Path, reference_digest: str
) -> None:
    disk = tmp_path / "disk"
    argv = [sys.executable, "-m", "jobs.encode", *map(str, [folder, "--to", disk, *make_options(micro_vae)])]
    code = run_on_small_disk(disk, 128, argv)
    if code == 99:
        pytest.skip("no filesystem may be mounted here")
    assert code == 0
    assert Path(f"{disk}.code").read_text().strip() == "1"
    assert "no space left on device" in Path(f"{disk}.err").read_text()
    assert "parquet" in Path(f"{disk}.names").read_text(), "some parts were written"
    assert json.loads(Path(f"{disk}.stats").read_text())["digest"] == reference_digest


@pytest.mark.fault(16, "the disk is full")
def test_a_full_disk_ends_the_job_and_leaves_complete_files(
    latentmill: Command,
    folder: Path,
    micro_vae: Path,
    tmp_path: Path,
    reference_digest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = os.fsync, 0

    def fail_when_full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_when_full)
    argv = ["encode", folder, "--to", tmp_path / "c", *make_options(micro_vae)]
    code, out, err = latentmill(*argv)
    assert code == 1
    assert "no space left on device" in out + err
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "c/_tmp").iterdir()), "partial files are removed"
    assert latentmill(*argv)[0] == 0
    assert json.loads((tmp_path / "c/stats.json").read_text())["digest"] == reference_digest
