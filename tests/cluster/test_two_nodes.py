"""A Ray cluster of two nodes with one CPU each: jobs that connect to it, and jobs that are submitted to it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from bench import check_cache
from tests.conftest import img2dataset_members, write_tar
from tests.faulty_job import run_faulty_job
from tests.servers import free_port, names, objects, read, upload

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    # Ray leaves the pipes of its processes to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def dashboard() -> int:
    return free_port()


@pytest.fixture
def cluster(dashboard: int, account: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Start a head and a second node. Both have the S3 account in their environment."""
    monkeypatch.setenv("PATH", f"{RAY.parent}{os.pathsep}{os.environ['PATH']}")  # a submitted job's `python`
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "0")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "2000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "4")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard, "object_store_memory": 200 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    add_node(nodes)
    yield nodes
    nodes.shutdown()


def add_node(cluster: Cluster, **options: Any) -> None:
    """Add a node with one CPU and a directory of its own for working directories.

    If nodes share that directory, the second one replaces a working directory that jobs of the first one use.
    """
    name = f"working_dirs_{uuid.uuid4().hex}"
    cluster.add_node(num_cpus=1, object_store_memory=200 << 20, runtime_env_dir_name=name, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of twelve tars of 60 samples."""
    folder = tmp_path_factory.mktemp("nodes") / "shards"
    for number in range(12):
        write_tar(folder / f"{number:05d}.tar", img2dataset_members(60 * number, 60))
    return folder


@pytest.fixture
def reference_digest(
    latentmill: Callable[..., tuple[int, str, str]], source: Path, micro_vae: Path, tmp_path: Path
) -> str:
    """Return the digest of an undisturbed run without Ray."""
    code, _, err = latentmill(
        "encode", source, "--to", tmp_path / "reference", *make_options(micro_vae), "--workers", 0
    )
    assert code == 0, err
    return str(json.loads((tmp_path / "reference/stats.json").read_text())["digest"])


def make_options(vae: object) -> list[str]:
    return ["--vae", str(vae), "--resolution", "64", "--rows-per-part", "10"]


def make_submission(dashboard: int, *argv: object) -> list[str]:
    """Return the submit command of the README with more arguments."""
    line = f"{RAY} job submit --address http://127.0.0.1:{dashboard} --working-dir . -- python -m jobs.encode"
    return [*shlex.split(line), *map(str, argv)]


def await_agent(dashboard: int, seconds: float = 60) -> None:
    """Return when jobs can be submitted: the agent of the head may start late."""
    client = JobSubmissionClient(f"http://127.0.0.1:{dashboard}")
    end = time.monotonic() + seconds
    while True:
        try:
            client.submit_job(entrypoint="true")
            return
        except RuntimeError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def start_process(argv: list[str], folder: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


def assert_complete(cache: Mapping[str, bytes], reference_digest: str) -> None:
    """Check that each sample is in the cache once, files are as committed, and the digest is the expected one."""
    assert list(check_cache.find_problems(cache, 720)) == []
    assert json.loads(cache["stats.json"])["digest"] == reference_digest


def list_parts(cache: str) -> list[str]:
    return [name for name in names(cache) if name.startswith("data/")]


def read_last_run(cache: str) -> dict[str, object]:
    newest = max(name for name in names(cache) if name.startswith("_runs/") and name.endswith(".json"))
    return dict(json.loads(read(f"{cache}/{newest}")))


@pytest.mark.fault(8, "a node dies")
def test_a_submitted_job_survives_the_loss_of_a_node(
    cluster: Cluster, dashboard: int, source: Path, reference_digest: str, micro_vae: Path, bucket: str
) -> None:
    vae, shards = upload(micro_vae, f"{bucket}/vae"), upload(source, f"{bucket}/shards")
    await_agent(dashboard)
    job = start_process(make_submission(dashboard, shards, "--to", f"{bucket}/c", *make_options(vae)))
    wait_for(lambda: len(list_parts(f"{bucket}/c")) > 15, job)
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    assert len(list_parts(f"{bucket}/c")) < 72, "the node must be killed before the job is done"
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert_complete(objects(f"{bucket}/c"), reference_digest)
    assert read_last_run(f"{bucket}/c")["outcome"] == "done"


@pytest.mark.fault(7, "ray job stop")
def test_a_stopped_job_is_resumed_by_the_same_submission(
    cluster: Cluster, dashboard: int, source: Path, reference_digest: str, micro_vae: Path, bucket: str
) -> None:
    vae, shards = upload(micro_vae, f"{bucket}/vae"), upload(source, f"{bucket}/shards")
    await_agent(dashboard)
    line = make_submission(dashboard, shards, "--to", f"{bucket}/c", *make_options(vae))
    line[line.index("--") : line.index("--")] = ["--submission-id", "nightly"]
    job = start_process(line)
    wait_for(lambda: len(list_parts(f"{bucket}/c")) > 10, job)
    address = ["--address", f"http://127.0.0.1:{dashboard}"]
    subprocess.run([RAY, "job", "stop", *address, "nightly"], check=True, capture_output=True)
    job.communicate(timeout=60)
    run = read_last_run(f"{bucket}/c")
    assert (run["outcome"], run["exit_code"]) == ("stopped", 143)
    line[line.index("nightly")] = "nightly-again"
    second_job = start_process(line)
    out, _ = second_job.communicate(timeout=300)
    assert second_job.returncode == 0, out
    assert_complete(objects(f"{bucket}/c"), reference_digest)


@pytest.mark.parametrize("submitted", [True, False], ids=["submitted", "connected"])
def test_a_users_modules_do_not_break_a_job_of_the_cluster(
    cluster: Cluster,
    dashboard: int,
    source: Path,
    reference_digest: str,
    micro_vae: Path,
    tmp_path: Path,
    submitted: bool,
) -> None:
    (tmp_path / "project/jobs").mkdir(parents=True)
    for name in ("pipeline.py", "vae.py", "jobs/__init__.py"):
        (tmp_path / "project" / name).write_text("raise SystemExit('a module of the user')\n")
    argv = ["latentmill", "encode", str(source), "--to", str(tmp_path / "c"), *make_options(micro_vae)]
    if submitted:
        await_agent(dashboard)
        entry = ["sh", "-c", f"PYTHONPATH=$PYTHONPATH:{ROOT} exec python -m {shlex.join(argv)}"]
        line = make_submission(dashboard)
        job = start_process([*line[: line.index("--") + 1], *entry], tmp_path / "project")
        out, _ = job.communicate(timeout=300)
    else:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'project'}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", *argv, "--address", cluster.address]
        completed = subprocess.run(
            command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True, timeout=300
        )
        job, out = completed, completed.stderr
    assert job.returncode == 0, out
    assert_complete(check_cache.read_files(tmp_path / "c"), reference_digest)


def test_workers_run_the_drivers_code_and_are_added_for_new_nodes(
    cluster: Cluster, source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path
) -> None:
    (node,) = cluster.worker_nodes
    cluster.remove_node(node)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from jobs.encode import *; run_as_script(main)"
    argv = [str(source), "--to", str(tmp_path / "c"), *make_options(micro_vae), "--address", cluster.address]
    with subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        wait_for(lambda: list(tmp_path.glob("c/data/*")), job)
        add_node(cluster)
        out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert_complete(check_cache.read_files(tmp_path / "c"), reference_digest)


def test_a_job_names_the_resources_that_it_waits_for(
    cluster: Cluster, source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    argv = [str(source), "--to", str(tmp_path / "c"), *make_options(micro_vae), "--address", cluster.address]
    job = start_process([sys.executable, "-m", "jobs.encode", *argv, "--device", "cuda"])
    assert job.stdout is not None
    line = next(line for line in job.stdout if "waiting for" in line)
    job.terminate()
    job.communicate(timeout=60)
    assert "1 worker to start (1 CPU and 1 GPU each; free in the cluster: 2 of 2 CPUs, 0 of 0 GPUs)" in line
    assert job.returncode == 143


def find_raylet(node: object) -> int:
    """Return the process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


@pytest.mark.fault(10, "a node is cut off (its raylet frozen), its worker goes on writing")
def test_a_node_that_is_cut_off_does_no_harm(
    cluster: Cluster, source: Path, reference_digest: str, micro_vae: Path, bucket: str
) -> None:
    """Other workers encode its units, too. The second writer of a part finds that of the first."""
    argv = [upload(source, f"{bucket}/shards"), "--to", f"{bucket}/c", *make_options(micro_vae)]
    job = start_process([sys.executable, "-m", "jobs.encode", *argv, "--address", cluster.address])
    wait_for(lambda: len(list_parts(f"{bucket}/c")) > 10, job)
    (node,) = cluster.worker_nodes
    os.kill(find_raylet(node), signal.SIGSTOP)
    try:
        out, _ = job.communicate(timeout=300)
    finally:
        os.kill(find_raylet(node), signal.SIGCONT)
    assert job.returncode == 0, out
    assert_complete(objects(f"{bucket}/c"), reference_digest)
    time.sleep(3)  # for parts that the worker that was cut off may still write
    assert len(list_parts(f"{bucket}/c")) == 72


@pytest.mark.fault(12, "the head dies")
def test_a_job_is_resumed_after_its_cluster_died(
    cluster: Cluster, source: Path, reference_digest: str, micro_vae: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    argv = [upload(source, f"{bucket}/shards"), "--to", f"{bucket}/c", *make_options(micro_vae)]
    job = start_process([sys.executable, "-m", "jobs.encode", *argv, "--address", cluster.address])
    wait_for(lambda: len(list_parts(f"{bucket}/c")) > 10, job)
    cluster.head_node.kill_gcs_server()
    out, _ = job.communicate(timeout=200)
    second_job = start_process([sys.executable, "-m", "jobs.encode", *argv, "--workers", "0"])
    second_out, _ = second_job.communicate(timeout=200)
    assert second_job.returncode == 0, second_out
    assert_complete(objects(f"{bucket}/c"), reference_digest)
    assert job.returncode != 0, out


# A job whose model always fails on nodes that have FAULTY in their environment.
FAULTY_JOB = """
import os, time

class Faulty(EncodeSpec):
    def build(self, vae, stop):
        encoder = EncodeSpec.build(self, vae, stop)
        run_model = encoder.context.latent_encoder.launch

        def launch(batch):
            if "FAULTY" in os.environ:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            time.sleep(0.05)  # so that other workers get tasks in the meantime
            return run_model(batch)

        encoder.context.latent_encoder.launch = launch
        return encoder
"""


@pytest.mark.fault(28, "every worker on one of two nodes fails in all it does")
def test_a_node_on_which_workers_fail_is_avoided(
    cluster: Cluster, source: Path, reference_digest: str, micro_vae: Path, tmp_path: Path
) -> None:
    (node,) = cluster.worker_nodes
    cluster.remove_node(node)
    add_node(cluster, env_vars={"FAULTY": "1"})
    cluster.wait_for_nodes()
    argv = [source, "--to", tmp_path / "c", *make_options(micro_vae), "--address", cluster.address, "--workers", 2]
    job = run_faulty_job(FAULTY_JOB, argv, tmp_path, timeout=280)
    assert job.returncode == 0, job.stderr
    assert_complete(check_cache.read_files(tmp_path / "c"), reference_digest)
    restarts = re.findall(r"restarting worker-\d+ on \S+: RuntimeError: CUDA error: uncorrectable ECC", job.stderr)
    assert 2 <= len(restarts) <= 4, job.stderr
    assert job.stderr.count("two workers in a row failed on ") == 1
