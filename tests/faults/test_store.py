"""Workers that die, freeze and meet each other at the worst moments, and stores that lie, over real HTTP.

The jobs are processes of their own; a proxy before the store kills, stops and deceives them just when it is meant to.
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

from bench import audit
from tests.conftest import img2dataset_members, write_tar
from tests.proxy import Proxy, Request
from tests.servers import names, objects, read, upload

ROOT = Path(__file__).parents[2]
SAMPLES = 30
Command = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of ten samples, a reject in each."""
    folder = tmp_path_factory.mktemp("faults") / "shards"
    for number in range(3):
        members = img2dataset_members(10 * number, 10)
        members[f"{10 * number + 7:09d}.jpg"] = b"no image"
        write_tar(folder / f"{number}.tar", members)
    assert audit.count_samples(folder) == SAMPLES
    return folder


@pytest.fixture
def calm(latentmill: Command, folder: Path, micro_vae: Path, tmp_path: Path) -> str:
    """The digest of a run on disk that nothing disturbed."""
    argv = ["encode", folder, "--to", tmp_path / "calm", *options(micro_vae)]
    assert latentmill(*argv)[0] == 0
    return str(json.loads((tmp_path / "calm/stats.json").read_text())["digest"])


def options(vae: Path) -> list[object]:
    return ["--vae", vae, "--resolution", 64, "--rows-per-part", 3, "--workers", 0, "--max-reject-rate", 1]


@pytest.fixture
def source(folder: Path, bucket: str) -> str:
    return upload(folder, f"{bucket}/shards")


@pytest.fixture
def start(source: str, bucket: str, micro_vae: Path, proxy: Proxy) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts an encode job, through the proxy, into the bucket's folder `c`."""
    jobs: list[subprocess.Popen[str]] = []

    def run(*more: object) -> subprocess.Popen[str]:
        argv = [source, "--to", f"{bucket}/c", *options(micro_vae), "--json", *more]
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


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = job.communicate(timeout=120)
    return job.returncode, out + err


def digest(bucket: str) -> str:
    return str(json.loads(read(f"{bucket}/c/stats.json"))["digest"])


def assert_whole(bucket: str, calm: str) -> None:
    """Every sample is in the cache once, its files are what was committed, and all is as in the calm run."""
    assert list(audit.find_problems(objects(f"{bucket}/c"), SAMPLES)) == []
    assert digest(bucket) == calm


def put(request: Request, where: str) -> bool:
    """Whether a request puts an object whose path is like this."""
    return request.method == "PUT" and fnmatch.fnmatch(request.path, f"*/c/{where}")


def kill(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGKILL)
    job.wait()


class Moment:
    """The first request of a kind: `come` is set with it."""

    def __init__(self, where: str, count: int = 1) -> None:
        self.where, self.left, self.come = where, count, threading.Event()

    def is_now(self, request: Request) -> bool:
        if self.come.is_set() or not put(request, self.where):
            return False
        self.left -= 1
        if not self.left:
            self.come.set()
        return not self.left


@pytest.mark.fault(2, "a worker dies after a part")
def test_a_part_that_stands_is_never_made_again(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str
) -> None:
    moment = Moment("data/*", count=4)
    jobs = [start()]
    proxy.after = lambda request: kill(jobs[0]) if moment.is_now(request) else None
    assert finish(jobs[0])[0] == -signal.SIGKILL
    standing = {name for name in names(f"{bucket}/c") if name.startswith("data/")}
    assert 3 <= len(standing) <= 5
    before = len(proxy.seen)
    code, out = finish(start())
    assert code == 0, out
    assert_whole(bucket, calm)
    again = {request.path for request in proxy.seen[before:] if put(request, "data/*")}
    assert not {name for name in standing if any(path.endswith(name) for path in again)}


@pytest.mark.parametrize(
    ("where", "forwarded"),
    [
        pytest.param("_rejects/*", False, marks=pytest.mark.fault(3, "a worker dies after its unit's last part")),
        pytest.param("_commits/*", False, marks=pytest.mark.fault(4, "a worker dies after writing rejects")),
        pytest.param("_commits/*", True, marks=pytest.mark.fault(5, "a driver dies; the same command goes on")),
    ],
)
def test_a_unit_is_taken_up_where_it_was_left(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str, where: str, forwarded: bool
) -> None:
    moment, jobs = Moment(where), [start()]

    def before(request: Request) -> str | None:
        if not forwarded and moment.is_now(request):
            kill(jobs[0])
            return "reset"
        return None

    proxy.rule = before
    proxy.after = lambda request: kill(jobs[0]) if forwarded and moment.is_now(request) else None
    assert finish(jobs[0])[0] == -signal.SIGKILL
    unit = next(request.path for request in reversed(proxy.seen) if put(request, where)).rsplit("/", 1)[1]
    count = len(proxy.seen)
    code, out = finish(start())
    assert code == 0, out
    assert_whole(bucket, calm)
    stem = unit.rsplit(".", 1)[0]
    assert not [r for r in proxy.seen[count:] if put(r, f"data/{stem}*")], "its parts stood already"


@pytest.mark.fault(9, "a worker freezes in a request, is replaced, and comes back")
def test_who_comes_back_finds_the_winners_work(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str
) -> None:
    moment, released = Moment("data/*"), threading.Event()

    def hold(request: Request) -> None:
        if moment.is_now(request):
            frozen.send_signal(signal.SIGSTOP)
            released.wait(100)

    proxy.rule = hold
    frozen = start()
    assert moment.come.wait(60)
    code, out = finish(start())
    assert code == 0, out
    won = {name: data for name, data in objects(f"{bucket}/c").items() if name.startswith(("data/", "_empty/"))}
    released.set()
    frozen.send_signal(signal.SIGCONT)
    code, out = finish(frozen)
    assert code == 0, out
    assert_whole(bucket, calm)
    assert {name: data for name, data in objects(f"{bucket}/c").items() if name in won} == won


@pytest.mark.fault(11, "two whole jobs on one cache")
def test_two_jobs_make_one_cache(start: Callable[..., subprocess.Popen[str]], bucket: str, calm: str) -> None:
    jobs = [start(), start()]
    for job in jobs:
        code, out = finish(job)
        assert code == 0, out
    assert_whole(bucket, calm)


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.fault(6, "a job is preempted (SIGTERM)")),
        pytest.param(signal.SIGINT, marks=pytest.mark.fault(6, "a job is interrupted (SIGINT)")),
    ],
)
def test_a_signal_in_a_request_leaves_whole_objects(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str, sign: signal.Signals
) -> None:
    moment = Moment("data/*", count=2)
    jobs = [start()]
    proxy.rule = lambda request: jobs[0].send_signal(sign) if moment.is_now(request) else None
    code, out = finish(jobs[0])
    assert code == 128 + sign, out
    for name, data in objects(f"{bucket}/c").items():
        if name.startswith("data/"):
            assert pq.read_table(io.BytesIO(data)).num_rows
    assert finish(start())[0] == 0
    assert_whole(bucket, calm)


@pytest.mark.fault(21, "every PUT arrives a second time, after the end")
def test_a_late_duplicate_changes_nothing(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, account: str, bucket: str, calm: str
) -> None:
    code, out = finish(start())
    assert code == 0, out
    before = objects(f"{bucket}/c")
    late = [(path, headers, body) for path, headers, body in proxy.puts if "/c/data/" in path]
    assert len(late) >= 9
    for path, headers, body in late:
        with contextlib.closing(http.client.HTTPConnection(urlsplit(account).netloc, timeout=30)) as connection:
            connection.request("PUT", path, body, {k: v for k, v in headers.items() if k.lower() != "expect"})
            assert connection.getresponse().status == 412
    assert objects(f"{bucket}/c") == before
    assert_whole(bucket, calm)


@pytest.mark.fault(21, "every PUT arrives twice, the second answer comes back")
def test_a_doubled_request_is_one_object(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str
) -> None:
    proxy.rule = lambda request: "double" if request.method == "PUT" else None
    code, out = finish(start())
    assert code == 0, out
    assert_whole(bucket, calm)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("short", marks=pytest.mark.fault(22, "the store's answer is cut in half")),
        pytest.param("stall", marks=pytest.mark.fault(22, "the store's answer stops half way")),
        pytest.param("reset", marks=pytest.mark.fault(22, "the store resets the connection")),
        pytest.param("flip", marks=pytest.mark.fault(23, "bits flip on the way")),
    ],
)
def test_bytes_that_do_not_arrive_are_asked_for_again(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str, fault: str
) -> None:
    def rule(request: Request) -> str | None:
        is_shard = request.method == "GET" and request.path.split("?")[0].endswith(".tar")
        return fault if is_shard and request.number == 0 else None

    proxy.rule = rule
    code, out = finish(start())
    assert code == 0, out
    assert_whole(bucket, calm)


@pytest.mark.fault(17, "bursts of 503, 500 and 429")
def test_bursts_of_errors_are_waited_for(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str
) -> None:
    errors, end = (503, 500, 429), [0.0]

    def rule(request: Request) -> int | None:
        end[0] = end[0] or time.monotonic() + 4  # from the first part on
        return errors[len(proxy.seen) % 3] if "/c/" in request.path and time.monotonic() < end[0] else None

    job = start()
    proxy.rule = lambda request: rule(request) if end[0] or put(request, "data/*") else None
    code, out = finish(job)
    assert code == 0, out
    assert_whole(bucket, calm)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.fault(29, "a store that is away for more than a minute")
def test_a_store_that_is_away_for_a_while_is_waited_for(
    start: Callable[..., subprocess.Popen[str]],
    proxy: Proxy,
    bucket: str,
    calm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests are tried once here, so that every task fails many times within this time."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    end = [0.0]

    def rule(request: Request) -> int | None:
        if put(request, "data/*") and not end[0]:
            end[0] = time.monotonic() + 75
        return 503 if end[0] and time.monotonic() < end[0] else None

    proxy.rule = rule
    job = start("--workers", 2)
    _, err = job.communicate(timeout=250)
    assert job.returncode == 0, err
    assert_whole(bucket, calm)
    assert "the storage does not respond; no task is started until it does: cannot " in err
    assert re.search(r"the storage responds again after [12] min", err)


@pytest.mark.fault(19, "the account is refused midway (403)")
def test_a_refusal_midway_ends_the_job_and_names_it(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str
) -> None:
    proxy.rule = lambda request: 403 if put(request, "data/*00002.parquet") else None
    code, out = finish(start())
    assert code == 1
    assert f"cannot write {bucket}/c/data/" in out
    assert "permission denied" in out
    proxy.rule = lambda request: None
    assert finish(start())[0] == 0
    assert_whole(bucket, calm)


@pytest.mark.fault(24, "an input is replaced while the job runs")
def test_another_input_is_not_mixed_in(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, source: str, bucket: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "other/0.tar", img2dataset_members(90, 10))
    replaced = threading.Event()

    def rule(request: Request) -> None:
        if request.method == "PUT" and "/c/_plan/" in request.path and not replaced.is_set():
            replaced.set()
            threading.Thread(target=upload, args=(tmp_path / "other", source)).start()
            time.sleep(2)

    proxy.rule = rule
    code, out = finish(start())
    assert code == 1
    assert f"{source}/0.tar has changed since it was planned" in out, out
    assert json.loads(read(f"{bucket}/c/stats.json"))["count"] == 18, "the other two are done"


@pytest.mark.fault(25, "a foreign file in the cache")
def test_a_foreign_file_fails_its_unit_by_name(
    start: Callable[..., subprocess.Popen[str]], proxy: Proxy, bucket: str, calm: str
) -> None:
    assert finish(start())[0] == 0
    mine = objects(f"{bucket}/c")
    part = next(name for name in mine if name.startswith("data/0-"))
    import fsspec

    fs = fsspec.filesystem("s3")
    root = f"{bucket}/foreign".removeprefix("s3://")
    for name in ("cache.json", next(n for n in mine if n.startswith("_plan/"))):
        fs.pipe_file(f"{root}/{name}", mine[name])
    fs.pipe_file(f"{root}/{part}", b"this is no part")
    job = start("--to", f"{bucket}/foreign")
    code, out = finish(job)
    assert code == 1
    assert f"{part} is not a part of a latentmill cache" in out
    assert read(f"{bucket}/foreign/{part}") == b"this is no part", "nothing is ever overwritten"


@pytest.mark.fault(25, "a reader globs data/ all the while")
def test_a_reader_never_sees_half_a_file(folder: Path, micro_vae: Path, tmp_path: Path) -> None:
    argv = [folder, "--to", tmp_path / "c", *options(micro_vae), "--rows-per-part", 1]
    command = [sys.executable, "-m", "jobs.encode", *map(str, argv)]
    job = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    looks = 0
    while job.poll() is None:
        for path in tmp_path.glob("c/data/*"):
            assert pq.read_table(path).num_rows == 1
            looks += 1
    job.communicate()
    assert job.returncode == 0
    assert looks > 30


SMALL_DISK = """
mount -t tmpfs -o size={size}k tmpfs "$0" || exit 99
"$@" 2> "$0.err"; echo $? > "$0.code"; ls -R "$0" > "$0.names"
mount -o remount,size=64m "$0"
"$@" 2> "$0.err2" && cp "$0/stats.json" "$0.stats"
"""


def on_a_small_disk(folder: Path, size: int, command: list[str]) -> int:
    """Run a command on a small filesystem of its own, and again when that is larger; 99 where none is allowed."""
    folder.mkdir()
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK.format(size=size), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*shell, *command], env=environment, capture_output=True).returncode


@pytest.mark.fault(16, "a disk (tmpfs of 96 KiB) fills up, and is made larger")
@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare")
def test_a_disk_that_fills_up_ends_the_job(folder: Path, micro_vae: Path, tmp_path: Path, calm: str) -> None:
    disk = tmp_path / "disk"
    argv = [sys.executable, "-m", "jobs.encode", *map(str, [folder, "--to", disk, *options(micro_vae)])]
    code = on_a_small_disk(disk, 128, argv)
    if code == 99:
        pytest.skip("no filesystem may be mounted here")
    assert code == 0
    assert Path(f"{disk}.code").read_text().strip() == "1"
    assert "no space left on device" in Path(f"{disk}.err").read_text()
    assert "parquet" in Path(f"{disk}.names").read_text(), "some parts were written"
    assert json.loads(Path(f"{disk}.stats").read_text())["digest"] == calm


@pytest.mark.fault(16, "the disk is full")
def test_a_full_disk_ends_the_job_and_leaves_whole_files(
    latentmill: Command, folder: Path, micro_vae: Path, tmp_path: Path, calm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    argv = ["encode", folder, "--to", tmp_path / "c", *options(micro_vae)]
    code, out, err = latentmill(*argv)
    assert code == 1
    assert "no space left on device" in out + err
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "c/_tmp").iterdir()), "what could not be written is removed"
    assert latentmill(*argv)[0] == 0
    assert json.loads((tmp_path / "c/stats.json").read_text())["digest"] == calm
