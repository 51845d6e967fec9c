"""How fast a job says it is, and what it says held it up, against what can be counted from outside."""

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from jobs import run_recorder, throughput
from jobs.progress import ProgressMeter
from jobs.throughput import Throughput, WorkerTime
from pipeline import flow
from pipeline.encoder import EncodedBatch, LatentEncoder
from pipeline.images import decode
from pipeline.limits import Limits
from pipeline.maintenance.status import estimate_seconds_left, read_status
from pipeline.records import PreparedImage
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, as the one item of a list."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_pace_is_of_the_last_minute(clock: list[float]) -> None:
    one = Throughput()
    assert one.rate == 0
    for second in range(300):
        one.note(10 * second if second < 200 else 2000 + 60 * (second - 200))
        clock[0] += 1
        if second == 20:
            assert one.rate == pytest.approx(10)
    assert one.rate == pytest.approx(60), "what was before does not count any more"
    clock[0] += 120
    one.note(2000 + 60 * 99)
    assert one.rate == 0, "and a job that stands still says so"


def test_a_meter_says_the_same_in_its_line_and_in_the_record(clock: list[float]) -> None:
    meter = ProgressMeter("encoded", total=1000)
    meter.tick(0, "a worker to start")
    clock[0] += 500
    for second in range(11):
        meter.tick(20 * second, "")
        clock[0] += 1
    assert meter.facts == {"images": 200, "images_per_second": pytest.approx(20), "seconds_left": None}
    meter.task_done(100, 100, 0)  # a tenth of the bytes, and as much again is under way
    assert meter.facts["seconds_left"] == pytest.approx(800 / 20)
    assert "20.0/s" in meter.line
    assert meter.line.endswith("40 s left")


def test_the_time_of_workers_is_summed_over_those_that_are_ready(clock: list[float]) -> None:
    workers = WorkerTime(0)
    for ready in (0, 1, 3, 3):
        clock[0] += 2
        workers.note(ready)
    assert workers.seconds == 0 + 0 + 2 * 1 + 2 * 3


@pytest.fixture
def job(shards: Path, micro_vae: Path, tmp_path: Path) -> list[object]:
    """Sixty images in six shards."""
    for number in range(6):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(10 * number, 10, height=64, width=64))
    options = ["--vae", micro_vae, "--resolution", 64, "--workers", 0, "--rows-per-part", 2]
    return ["encode", tmp_path / "s", "--to", tmp_path / "c", *options]


def slow_model(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have the model take so long for an image."""
    run = LatentEncoder._run

    def slowly(self: LatentEncoder, model: Any, some: Sequence[PreparedImage], shard: str) -> Tensor:
        time.sleep(seconds * len(some))
        return run(self, model, some, shard)

    monkeypatch.setattr(LatentEncoder, "_run", slowly)


def rows(cache: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in cache.glob("data/*"))


def test_status_of_a_living_run_tells_the_pace_at_which_rows_appear(
    latentmill: Command, job: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.2)
    slow_model(monkeypatch, 0.1)
    cache, seen, over = tmp_path / "c", list[tuple[float, int, dict[str, Any]]](), threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            if list(cache.glob("_runs/*.json")):
                told = read_status(Folder(str(cache)), datetime.datetime.now(datetime.UTC))
                seen.append((time.monotonic(), rows(cache), told))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        code, _, err = latentmill(*job)
        ended = time.monotonic()
    finally:
        over.set()
        looking.join()
    assert code == 0, err
    counted = [(at, done, told) for at, done, told in seen if 20 <= done < 60 and told["state"] == "running"]
    assert len(counted) > 5
    begun = next((at, done) for at, done, _ in seen if done)
    for at, done, told in counted[3:]:
        measured = (done - begun[1]) / (at - begun[0])
        assert told["images_per_second"] == pytest.approx(measured, rel=0.5), (done, told)
        if told["seconds_left"] is not None:
            assert told["seconds_left"] == pytest.approx(ended - at, rel=0.5, abs=3), (done, told)
    assert any(told["seconds_left"] for _, _, told in counted)
    assert any(told["parts_of_units_under_way"] for _, _, told in counted)


def test_two_living_runs_share_what_is_left() -> None:
    runs = [{"images_per_second": 2.0, "seconds_left": 100}, {"images_per_second": 3.0, "seconds_left": 60}]
    assert estimate_seconds_left(runs) == 200 / 5
    assert estimate_seconds_left(runs[:1]) == 100
    assert estimate_seconds_left([{"images_per_second": 0.0, "seconds_left": None}]) is None


def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    read = flow.read_samples

    def slowly(*given: Any) -> Iterator[Any]:
        for sample in read(*given):
            time.sleep(0.1)
            yield sample

    monkeypatch.setattr(flow, "read_samples", slowly)


def slow_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    build = flow.EncodeSpec.build

    def slowly(data: bytes, limits: Limits) -> np.ndarray:
        time.sleep(0.1)
        return decode.open_pixels(data, limits)

    def built(*given: Any) -> flow.UnitWorker:
        encoder = build(*given)
        encoder.context = replace(encoder.context, open_pixels=slowly)
        return encoder

    monkeypatch.setattr(flow.EncodeSpec, "build", built)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hold_up", "what", "least", "most"),
    [
        (slow_reading, "reading", 0.0, 0.7),
        (slow_opening, "opening", 0.0, 0.7),
        (lambda monkeypatch: slow_model(monkeypatch, 0.05), "encoding", 0.7, 1.0),
    ],
    ids=["reading", "opening", "encoding"],
)
def test_a_run_says_what_bounded_it_and_how_busy_the_device_was(
    latentmill: Command,
    job: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hold_up: Callable[[pytest.MonkeyPatch], None],
    what: str,
    least: float,
    most: float,
) -> None:
    hold_up(monkeypatch)
    busy, encode = list[float](), LatentEncoder.encode

    def timed(self: LatentEncoder, batch: Sequence[PreparedImage], shard: str = "") -> EncodedBatch:
        encoded = encode(self, batch, shard)
        busy.append(encoded.seconds)
        return encoded

    monkeypatch.setattr(LatentEncoder, "encode", timed)
    code, out, err = latentmill(*job)
    assert code == 0, err
    assert f"  bottleneck {what} (" in out
    assert "the device was busy for " in out
    (path,) = (tmp_path / "c/_runs").glob("*.json")
    run = json.loads(path.read_text())
    assert run["bottleneck"] == what
    assert least <= run["device_busy"] <= most
    assert run["seconds"]["encode"] == pytest.approx(sum(busy), abs=0.02)
