"""The dashboard and the alert rules: their form, and whether they use the metrics that jobs/ray_metrics.py publishes.

tests/cluster/test_metrics.py compares their queries with what a real run exports.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from jobs.encode_options import EncodeOptions
from jobs.executor import TaskCounts
from jobs.progress import ProgressMeter
from pipeline.cache.part_info import UnitReport
from pipeline.records import Seconds
from tests.promql import Selector, parse

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "infra/grafana/dashboard.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "infra/grafana/alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]


def list_queries() -> Iterator[tuple[str, str]]:
    """Yield the name and the expression of each query of the dashboard and of each alert rule."""
    for panel in DASHBOARD["panels"]:
        yield from ((f"{panel['title']} {target['refId']}", target["expr"]) for target in panel["targets"])
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)


QUERIES = dict(list_queries())


class Recorder:
    """Records what is published, as a metric of Ray would. Ray refuses zeros for counters, and unknown tags."""

    values: ClassVar[dict[tuple[str, ...], list[float]]] = defaultdict(list)

    def __init__(self, name: str, description: str, *more: Any) -> None:
        assert description
        self.name, self.tag_keys = name, set(more[-1])
        self.defaults: dict[str, str] = {}

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.defaults = tags

    def record(self, value: float, tags: dict[str, str] | None = None) -> None:
        given = {**self.defaults, **(tags or {})}
        assert given.keys() == self.tag_keys
        self.values[(self.name, *(tags or {}).values())].append(value)

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        self.record(value, tags)

    set = observe = record


@dataclass
class Executor:
    workers: tuple[str, ...] = ("a", "b")
    starting: int = 1
    restarts: int = 0
    images: int = 0
    waiting_for: str = ""


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], list[float]]:
    """Return what is published of two seconds of a run."""
    from jobs import ray_metrics

    monkeypatch.setattr(Recorder, "values", defaultdict(list))
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, Recorder)
    metrics = ray_metrics.RayMetrics("encode", "s3://b/c", units_done=4)
    executor, meter = Executor(), ProgressMeter("encoded", 100)
    metrics.publish(meter, executor, TaskCounts(3, 2, 0))  # type: ignore[arg-type]
    rejects = {"not_an_image": 2, "rest_of_shard": 1}
    seconds = Seconds(read=1.5, encode=2.5)
    metrics.add_unit(UnitReport(unit="u", samples=20, rejects=rejects, bytes=30, seconds=seconds, elapsed=5.0), 700)
    meter.tick(17, "")
    executor.restarts = 1
    metrics.publish(meter, executor, TaskCounts(2, 2, 0), 0.5)  # type: ignore[arg-type]
    metrics.publish(meter, executor, TaskCounts(2, 2, 0), 0.5)  # type: ignore[arg-type]
    return Recorder.values


def test_counters_grow_by_what_is_new(published: dict[tuple[str, ...], list[float]]) -> None:
    counters = {
        ("latentmill_images",): [17],
        ("latentmill_worker_restarts",): [1],
        ("latentmill_samples",): [20],
        ("latentmill_rejects", "not_an_image"): [2],
        ("latentmill_rejects", "rest_of_shard"): [1],
        ("latentmill_damaged_shards",): [1],
        ("latentmill_read_bytes",): [700],
        ("latentmill_written_bytes",): [30],
        ("latentmill_stage_seconds", "read"): [1.5],
        ("latentmill_stage_seconds", "encode"): [2.5],
        ("latentmill_unit_seconds",): [5.0],
    }
    assert {name: published[name] for name in counters} == counters


def test_gauges_are_set_at_each_tick(published: dict[tuple[str, ...], list[float]]) -> None:
    gauges = {
        ("latentmill_units", "done"): [4, 5, 5],
        ("latentmill_units", "waiting"): [3, 2, 2],
        ("latentmill_units", "under_way"): [2, 2, 2],
        ("latentmill_units", "failed"): [0, 0, 0],
        ("latentmill_workers", "ready"): [2, 2, 2],
        ("latentmill_workers", "starting"): [1, 1, 1],
        ("latentmill_device_busy",): [0.5, 0.5],
    }
    assert {name: published[name] for name in gauges} == gauges


def test_every_metric_has_a_panel(published: dict[tuple[str, ...], list[float]]) -> None:
    """And no query uses another metric."""
    used = {selector.metric for expression in QUERIES.values() for selector in parse(expression).selectors}
    assert {re.sub("_(total|bucket)$", "", name) for name in used} == {f"ray_{name}" for name, *_ in published}


def test_panels_have_what_grafana_needs() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= DASHBOARD.keys()
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    variables = {f"${{{variable['name']}}}" for variable in DASHBOARD["templating"]["list"]}
    for panel in panels:
        assert panel["description"] and panel["datasource"]["uid"] in variables
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_legends_use_labels_that_the_expressions_keep() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = parse(target["expr"]).labels
            assert labels <= (grouped or {"cache", "verb"}), target


def test_the_alerts_explain_themselves() -> None:
    assert [rule["alert"] for rule in RULES] == [
        "LatentmillNoProgress",
        "LatentmillRejects",
        "LatentmillWorkersRestart",
    ]
    for rule in RULES:
        labels = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert labels and labels <= parse(rule["expr"]).labels
        assert rule["annotations"]["summary"] and rule["annotations"]["description"] and rule["labels"]["severity"]


def test_the_reject_limit_is_that_of_the_command() -> None:
    limit = EncodeOptions.__dataclass_fields__["max_reject_rate"].default
    (rule,) = (rule for rule in RULES if rule["alert"] == "LatentmillRejects")
    assert rule["expr"].endswith(f" > {limit}")


def test_names_in_an_expression_are_told_apart() -> None:
    parsed = parse('sum by (a, b) (rate(x_total{c=~"d|e",f!="g h"}[5m])) > 0.5 unless on (a) y')
    assert parsed.selectors == (Selector("x_total", (("c", "=~", "d|e"), ("f", "!=", "g h"))), Selector("y"))
    assert parsed.selectors[0].wanted == {"c": ["d", "e"]}
    assert parsed.labels == {"a", "b"}
    for wrong in ("sum(x", "x @ y", "x{a='b'}"):
        with pytest.raises(ValueError):
            parse(wrong)
