"""The metrics that a real run exports on the port of its node, and the queries of infra/grafana on them."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.cluster_utils import Cluster

from tests.conftest import img2dataset_members, write_tar
from tests.infra.test_grafana import QUERIES
from tests.promql import parse
from tests.ray_processes import find_actors
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
Labels = dict[str, str]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    # Ray leaves the pipes of its processes to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def cluster(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Start a node that exports its metrics on `port`, each second."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    head = {"num_cpus": 2, "metrics_export_port": port, "object_store_memory": 200 << 20}
    nodes = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    yield nodes
    nodes.shutdown()


class Scraper:
    """Reads the metrics of a node. samples: the last value of each metric and its labels, of all that were seen."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.samples: defaultdict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)

    def scrape(self) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                text = answer.read().decode()
        except urllib.error.URLError:  # the node's agent has not started
            return
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples[sample.name][frozenset(sample.labels.items())] = sample.value

    def total(self, name: str) -> float:
        return sum(self.samples[name].values())

    def values_of(self, name: str, label: str) -> set[str]:
        return {dict(labels).get(label, "") for labels in self.samples[name]}


def test_the_queries_use_what_a_run_exports(cluster: Cluster, port: int, micro_vae: Path, tmp_path: Path) -> None:
    """The run has a reject and a damaged shard, and one of its workers is killed."""
    for number in range(16):
        write_tar(tmp_path / f"s/{number:05d}.tar", img2dataset_members(60 * number, 60))
    (tmp_path / "s/00003.tar").write_bytes((tmp_path / "s/00003.tar").read_bytes()[:50_000])
    write_tar(tmp_path / "s/00016.tar", {"bad.jpg": b"no image"})
    options = ["--vae", micro_vae, "--resolution", 64, "--rows-per-part", 10, "--workers", 2]
    argv = [tmp_path / "s", "--to", tmp_path / "c", *options, "--address", cluster.address, "--json"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.encode", *map(str, argv)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    node, killed = Scraper(port), False
    while job.poll() is None:
        node.scrape()
        if not killed and len(list(tmp_path.glob("c/data/*"))) > 12:
            os.kill(find_actors(os.getpid())[0], signal.SIGKILL)
            killed = True
        time.sleep(0.25)
    out, err = job.communicate()
    assert job.returncode == 3, err
    time.sleep(3)
    node.scrape()

    for name, text in QUERIES.items():
        expression = parse(text)
        for selector in expression.selectors:
            assert selector.metric in node.samples, f"{name}: {selector.metric} is not exported"
            for labels in node.samples[selector.metric]:
                assert expression.labels <= dict(labels).keys(), f"{name}: {selector.metric}"
            for label, wanted in selector.wanted.items():
                values = node.values_of(selector.metric, label)
                assert values and set(wanted) <= values, f"{name}: {selector.metric} has {label} {values}"

    counts = json.loads(out)["run"]["counts"]
    assert node.values_of("ray_latentmill_units", "cache") == {str(tmp_path / "c")}
    assert node.total("ray_latentmill_worker_restarts_total") >= 1
    assert node.total("ray_latentmill_damaged_shards_total") == 1
    assert node.total("ray_latentmill_samples_total") == counts["samples"]
    assert node.total("ray_latentmill_written_bytes_total") == counts["bytes"]
    assert node.values_of("ray_latentmill_rejects_total", "reason") == {"not_an_image", "rest_of_shard"}
    assert_gauges_vanish(port)


def assert_gauges_vanish(port: int, seconds: float = 30) -> None:
    """Check that a run that has ended is not taken for one that makes no progress."""
    end = time.monotonic() + seconds
    while True:
        after = Scraper(port)
        after.scrape()
        assert "ray_latentmill_images_total" in after.samples, "the counters stay"
        if "ray_latentmill_units" not in after.samples:
            return
        assert time.monotonic() < end
        time.sleep(1)
