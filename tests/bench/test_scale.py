"""The simulated store, the simulated workers and the rule for times of `bench.scale`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.scale import Figures, Row
from bench.scale_filesystem import Requests, install, price, uninstall
from bench.scale_runs import Measured, run
from bench.scale_scenarios import Scenarios, predict_wall
from bench.scale_store import CACHES, ObjectStore, Template, list_shards
from pipeline.storage.connection import get_filesystem
from pipeline.storage.folder import Folder

UNITS = 200


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[Requests]:
    """Return the requests to an empty store, to which `s3://` URLs lead."""
    store = ObjectStore(tmp_path / "store.sqlite")
    counted = Requests(store)
    install(counted)
    yield counted
    uninstall()
    store.close()


def take_counts(requests: Requests) -> dict[str, int]:
    """Return the counts so far, and reset them."""
    counts = dict(requests.counts)
    requests.counts.clear()
    return counts


def test_a_refused_create_is_a_request_and_changes_nothing(requests: Requests) -> None:
    folder = Folder(f"s3://{CACHES}/cache")
    assert (folder.create("data/a", b"1"), folder.create("data/a", b"22"), folder.read("data/a")) == (True, False, b"1")
    assert folder.create("data/c", memoryview(b"333")) and folder.read("data/c") == b"333"
    assert folder.read_if_exists("data/b") is None
    assert take_counts(requests) == {"PUT data": 3, "GET data": 3}
    folder.replace("stats.json", b"{}")
    assert folder.read("stats.json") == b"{}"
    assert folder.supports_conditional_create()
    assert take_counts(requests) == {"PUT cache": 1, "GET cache": 1, "PUT _tmp": 2, "DELETE _tmp": 1}


@pytest.mark.parametrize(("names", "pages"), [(999, 1), (1000, 1), (1001, 2), (2500, 3)])
def test_a_list_is_a_request_per_thousand_names(requests: Requests, names: int, pages: int) -> None:
    requests.store.add_by_rule((f"cache/_commits/{number:04d}.json", 1) for number in range(names))
    requests.store.add_by_rule([("cache/_commitsx/0.json", 1), ("cache/cache.json", 1)])
    assert len(Folder(f"s3://{CACHES}/cache").list_files("_commits")) == names
    assert take_counts(requests) == {"LIST _commits": pages}


def test_a_folder_is_one_name_of_a_list(requests: Requests) -> None:
    requests.store.add_by_rule((f"cache/data/{number:04d}", 1) for number in range(3000))
    requests.store.put("cache/stats.json", b"{}")
    assert Folder(f"s3://{CACHES}/cache").list_entries("") == (["stats.json"], ["data"])
    assert take_counts(requests) == {"LIST cache": 1}


def test_ranges_are_those_of_the_content(requests: Requests) -> None:
    requests.store.put("cache/a", b"0123456789")
    fs, path = get_filesystem(f"s3://{CACHES}/cache/a", {})
    assert [fs.cat_file(path, start=2, end=5), fs.cat_file(path, start=-3), fs.cat_file(path, start=8)] == [
        b"234",
        b"789",
        b"89",
    ]


@pytest.mark.parametrize(
    ("prefix", "after", "numbers"),
    [
        ("", "", range(3)),
        ("shards/", "shards/00000000.tar", range(1, 4)),
        ("shards/0000001", "", range(10, 13)),
        ("shards/00000042.tar", "", [42]),
        ("shards/00000042.parquet", "", []),
        ("shards/00000999", "", []),
        ("other/", "", []),
    ],
)
def test_the_shards_exist_by_a_rule(prefix: str, after: str, numbers: range) -> None:
    keys = [key for key, _, _ in list_shards("shards-100", prefix, after, limit=3)]
    assert keys == [f"shards/{number:08d}.tar" for number in list(numbers)[:3]]


def test_the_price_is_that_of_each_kind_of_request() -> None:
    assert price({"PUT data": 1000, "LIST source (one name)": 1000}) == pytest.approx(0.01)
    assert price({"GET _log": 1000, "HEAD source": 1000, "DELETE _tmp": 5}) == pytest.approx(0.0008)


def test_a_predicted_time_counts_the_requests_that_are_under_way_at_once() -> None:
    small = Measured(requests={"LIST data": 10, "GET data": 40}, busy={"LIST data": 1.0, "GET data": 1.0})
    planned = Measured(wall=5.0, requests={"LIST data": 100, "GET data": 100, "PUT data": 1})
    assert predict_wall(planned, 0.1, small) == pytest.approx(5.0 + 100 * 0.1 + 100 * 0.1 / 4 + 0.1)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    """Return a folder with the template of a unit that a real worker encoded."""
    scenarios = Scenarios(tmp_path_factory.mktemp("scale"))
    assert run(scenarios.plan("all", "shards", 2, "real")).code == 0
    return scenarios


def test_simulated_workers_leave_behind_what_real_ones_do(scenarios: Scenarios) -> None:
    template = Template.load(Path(scenarios.plan("all", "shards", 2, "real").template))
    store = ObjectStore(scenarios.folder / "real.sqlite")
    commits = {key.removeprefix("cache/"): json.loads(body) for key, body in store.find("_commits/")}
    store.close()
    assert len(commits) == 2
    for key, real in commits.items():
        unit = real["unit"]
        assert key in {name.removeprefix("cache/") for name, _ in template.make_objects("cache", unit)}
        made = json.loads(template.make_body(key))
        for content in (real, made):
            del content["sha256"], content["seconds"], content["parts"][0]["sha256"]
        assert made == real


@pytest.mark.slow
def test_the_four_commands_run_on_two_hundred_units(scenarios: Scenarios) -> None:
    def run_one(scenario: str) -> Measured:
        return run(scenarios.plan(scenario, "shards", UNITS, "job", workers=10))

    fresh, resume, again, status = map(run_one, ("fresh", "resume", "again", "status"))
    assert [each.code for each in (fresh, resume, again, status)] == [0, 0, 0, 0]
    assert (fresh.tasks, resume.tasks, again.tasks) == (UNITS * 9 // 10, UNITS // 10, 0)
    assert not [name for name in again.requests if name.startswith("PUT") and name.endswith(("_commits", "data"))]
    assert status.requests["LIST _commits"] >= 1
    store = ObjectStore(scenarios.folder / "job.sqlite")
    stats = json.loads(next(body for key, body in store.find("stats.json")))
    store.close()
    assert (stats["count"], stats["rejected"]) == (3 * UNITS, {"not_an_image": UNITS})


def test_a_paced_run_is_measured_and_stopped(scenarios: Scenarios, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.scale_runs.SETTLED", 0.2)
    plan = scenarios.plan("all", "shards", 1000, "paced", workers=10, seconds=0.2, window=1.0)
    measured = run(plan)
    assert measured.code == 143
    assert 15 <= measured.tasks <= 75  # 10 workers, 5 tasks a second each
    assert 0 < measured.share < 1


def test_a_missed_target_is_shown() -> None:
    row = Row("shards", "again", 1_000_000, Measured(cpu=61.0, peak=1499.0, requests={"LIST data": 1000}), {})
    figures = Figures([row], {}, (), {}, 0, 0.0, 0.0)
    assert [target.value < target.limit for target in figures.targets] == [False, True, True]
