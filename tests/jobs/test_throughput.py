"""The throughput and the bottleneck that a job reports, compared with measurements from outside."""

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from jobs import run_recorder, throughput
from jobs.progress import ProgressMeter
from jobs.throughput import Throughput, WorkerTime
from pipeline import flow
from pipeline.cache.runs import read_runs
from pipeline.encoder import LatentEncoder, LaunchedBatch
from pipeline.images import decode
from pipeline.maintenance.status import estimate_seconds_left, read_status
from pipeline.readers.unit import read_samples
from pipeline.records import PreparedImage
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time in seconds as the only item of a list, which a test may change."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_throughput_is_measured_over_the_last_minute(clock: list[float]) -> None:
    meter = Throughput()
    assert meter.rate == 0
    for second in range(300):
        meter.note(10 * second if second < 200 else 2000 + 60 * (second - 200))
        clock[0] += 1
        if second == 20:
            assert meter.rate == pytest.approx(10)
    assert meter.rate == pytest.approx(60), "earlier images are not counted"
    clock[0] += 120
    meter.note(2000 + 60 * 99)
    assert meter.rate == 0, "a job that makes no progress has no throughput"


def test_the_progress_line_and_the_record_agree(clock: list[float]) -> None:
    meter = ProgressMeter("encoded", total=1000)
    meter.tick(0, "a worker to start")
    clock[0] += 500
    for second in range(11):
        meter.tick(20 * second, "")
        clock[0] += 1
    assert meter.facts == {
        "images": 200,
        "images_per_second": pytest.approx(20),
        "seconds_left": None,
        "share": 0.0,
        "waiting_for": "",
    }
    meter.task_done(100, 100, 0)  # a tenth of the bytes is done, and another tenth is in progress
    assert meter.facts["seconds_left"] == pytest.approx(800 / 20)
    assert "20.0/s" in meter.line
    assert meter.line.endswith("40 s left")


def test_images_under_way_count_before_a_task_has_ended() -> None:
    meter = ProgressMeter("encoded", total=1000, size_per_image=10.0)
    meter.tick(30, "")
    assert meter.share == 0.3
    meter.tick(300, "")
    assert meter.share == 1
    meter.task_done(500, 25, 0)  # images are larger than they were estimated
    assert ProgressMeter("encoded", total=1000).share == 0


def test_worker_time_counts_only_ready_workers(clock: list[float]) -> None:
    workers = WorkerTime(0)
    for ready in (0, 1, 3, 3):
        clock[0] += 2
        workers.note(ready, busy_seconds=0.0)
    assert workers.seconds == 0 + 0 + 2 * 1 + 2 * 3


def test_the_use_of_the_devices_is_that_of_the_last_minute(clock: list[float]) -> None:
    workers, busy = WorkerTime(0), 0.0
    workers.note(0, busy)
    assert workers.busy_share is None, "no worker was ready"
    for second in range(300):
        workers.note(2, busy)
        clock[0] += 1
        busy += 1.5 if second < 200 else 0.5
        if second in (100, 190):
            assert workers.busy_share == pytest.approx(0.75)
    assert workers.busy_share == pytest.approx(0.25)


@pytest.fixture
def job(micro_vae: Path, tmp_path: Path) -> list[object]:
    """Return an encode command for sixty images in six shards."""
    for number in range(6):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(10 * number, 10, height=64, width=64))
    options = ["--vae", micro_vae, "--resolution", 64, "--workers", 0, "--rows-per-part", 2]
    return ["encode", tmp_path / "s", "--to", tmp_path / "c", *options]


def slow_model(monkeypatch: pytest.MonkeyPatch, seconds: float, clock: list[float] | None = None) -> None:
    """Delay the model. seconds: per image. clock: is advanced by a tenth of a second per image."""
    run = LatentEncoder._run

    def run_slowly(self: LatentEncoder, model: Any, batch: Sequence[PreparedImage]) -> tuple[Tensor, list[Tensor]]:
        time.sleep(seconds * len(batch))
        latents = run(self, model, batch)
        if clock is not None:
            clock[0] += 0.1 * len(batch)
        return latents

    monkeypatch.setattr(LatentEncoder, "_run", run_slowly)


@pytest.mark.slow
def test_status_reports_the_throughput_of_a_running_job(
    latentmill: Command, job: list[object], tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of the test, the model encodes ten images per second, however busy the machine is."""
    monkeypatch.setattr(run_recorder, "HEARTBEAT_SECONDS", 0.1)
    slow_model(monkeypatch, 0.1, clock)
    cache, statuses, records, finished = Folder(str(tmp_path / "c")), [], [], threading.Event()

    def read_statuses() -> None:
        while not finished.wait(0.1):
            records.extend(read_runs(cache).values())
            statuses.append(read_status(cache, datetime.datetime.now(datetime.UTC)))

    thread = threading.Thread(target=read_statuses)
    thread.start()
    try:
        code, _, err = latentmill(*job, "--batch-size", 1)
    finally:
        finished.set()
        thread.join()
    assert code == 0, err
    running = [record for record in records if 20 <= record.get("images", 0) < 60]
    assert running
    for record in running:
        assert record["images_per_second"] == pytest.approx(10, rel=0.2)
        assert record["seconds_left"] == pytest.approx((60 - record["images"]) / 10, abs=1.5)
    rates = [status["images_per_second"] for status in statuses if status["images_per_second"]]
    assert rates[-1] == pytest.approx(10, rel=0.2)
    assert any(status["seconds_left"] for status in statuses)
    assert any(status["parts_of_units_under_way"] for status in statuses)


def test_two_running_jobs_share_the_remaining_time() -> None:
    runs = [{"images_per_second": 2.0, "seconds_left": 100}, {"images_per_second": 3.0, "seconds_left": 60}]
    assert estimate_seconds_left(runs) == 200 / 5
    assert estimate_seconds_left(runs[:1]) == 100
    assert estimate_seconds_left([{"images_per_second": 0.0, "seconds_left": None}]) is None


def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_samples

    def run_slowly(*args: Any, **more: Any) -> Iterator[Any]:
        for sample in read(*args, **more):
            time.sleep(0.1)
            yield sample

    monkeypatch.setattr(flow, "read_samples", run_slowly)


def slow_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    build = flow.EncodeSpec.build

    def run_slowly(*arguments: Any) -> np.ndarray:
        time.sleep(0.1)
        return decode.open_pixels(*arguments)

    def build_slow(*args: Any) -> flow.UnitWorker:
        encoder = build(*args)
        encoder.context = encoder.context.with_decoder(run_slowly)
        return encoder

    monkeypatch.setattr(flow.EncodeSpec, "build", build_slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "stage", "least", "most"),
    [
        (slow_reading, "reading", 0.0, 0.7),
        (slow_opening, "opening", 0.0, 0.7),
        (lambda monkeypatch: slow_model(monkeypatch, 0.05), "encoding", 0.7, 1.0),
    ],
    ids=["reading", "opening", "encoding"],
)
def test_a_run_reports_its_bottleneck_and_the_use_of_the_device(
    latentmill: Command,
    job: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    delay: Callable[[pytest.MonkeyPatch], None],
    stage: str,
    least: float,
    most: float,
) -> None:
    delay(monkeypatch)
    busy, launch = list[float](), LatentEncoder.launch

    def timed(self: LatentEncoder, batch: Sequence[PreparedImage]) -> LaunchedBatch:
        start = time.perf_counter()
        launched = launch(self, batch)
        busy.append(time.perf_counter() - start)
        return launched

    monkeypatch.setattr(LatentEncoder, "launch", timed)
    code, out, err = latentmill(*job)
    assert code == 0, err
    assert f"  bottleneck {stage} (" in out
    assert "the device was busy for " in out
    (path,) = (tmp_path / "c/_runs").glob("*.json")
    run = json.loads(path.read_text())
    assert run["bottleneck"] == stage
    assert least <= run["device_busy"] <= most
    assert run["seconds"]["encode"] >= sum(busy) - 0.01
