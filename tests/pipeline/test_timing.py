"""The time per stage of a unit: each second counts where it was spent, and the time of the model counts once."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from pipeline import flow
from pipeline.flow import UnitWorker
from pipeline.images import decode
from pipeline.records import PreparedImage, Seconds
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import unit_of

IMAGES = 8
SLOW = 0.1  # seconds per image


def slow_down_model(encoder: UnitWorker, seconds: float = SLOW) -> list[float]:
    """Make the model take at least this long per image. Return the durations of its calls."""
    latent_encoder, durations = encoder.context.latent_encoder, list[float]()
    run = latent_encoder._run

    def run_slowly(model: Any, images: Sequence[PreparedImage]) -> tuple[Tensor, list[Tensor]]:
        start = time.perf_counter()
        time.sleep(seconds * len(images))
        latents = run(model, images)
        durations.append(time.perf_counter() - start)
        return latents

    latent_encoder._run = run_slowly  # type: ignore[method-assign]
    return durations


def measure_units(encoder: UnitWorker, folder: Path, units: int = 1) -> tuple[list[Seconds], float]:
    """Encode this many units at once. Return the times per stage of each unit, and the total time."""
    shards = [img2dataset_members(IMAGES * number, IMAGES, height=64, width=64) for number in range(units)]
    work = [unit_of(write_tar(folder / f"s/{number}.tar", members)) for number, members in enumerate(shards)]
    start = time.perf_counter()
    with ThreadPoolExecutor(units) as pool:
        reports = list(pool.map(encoder.run, work))
    return [report.seconds for report in reports], time.perf_counter() - start


def test_two_units_on_one_model_count_its_time_once(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    encoder = worker(tmp_path / "c", rows_per_part=100)
    durations = slow_down_model(encoder)
    times, wall = measure_units(encoder, tmp_path, units=2)
    assert len(durations) == 2 * IMAGES
    assert sum(durations) <= sum(stages.encode for stages in times) <= wall
    assert all(stages.idle_opening + stages.idle_reading + stages.idle_writing < stages.encode for stages in times)


def test_waiting_for_images_to_be_opened_is_a_separate_stage(
    worker: Callable[..., UnitWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_slowly(*arguments: Any) -> np.ndarray:
        time.sleep(SLOW)
        return decode.open_pixels(*arguments)

    encoder = worker(tmp_path / "c", rows_per_part=100)
    encoder.context = encoder.context.with_decoder(open_slowly)
    (stages,), wall = measure_units(encoder, tmp_path)
    assert IMAGES * SLOW <= stages.open <= wall
    assert 0.7 * IMAGES * SLOW < stages.idle_opening <= wall
    assert stages.encode + stages.idle_reading + stages.idle_writing < stages.idle_opening


def test_waiting_for_samples_to_be_read_is_a_separate_stage(
    worker: Callable[..., UnitWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = flow.read_samples

    def read_slowly(*args: Any, **settings: Any) -> Iterator[Any]:
        for sample in read(*args, **settings):
            time.sleep(SLOW)
            yield sample

    monkeypatch.setattr(flow, "read_samples", read_slowly)
    (stages,), wall = measure_units(worker(tmp_path / "c", rows_per_part=100), tmp_path)
    assert 0.7 * IMAGES * SLOW < stages.read <= wall
    assert 0.7 * IMAGES * SLOW < stages.idle_reading <= wall


def test_the_time_of_the_device_is_no_more_than_the_total_time(
    worker: Callable[..., UnitWorker], tmp_path: Path
) -> None:
    encoder = worker(tmp_path / "c")
    slow_down_model(encoder, 0.01)
    (stages,), wall = measure_units(encoder, tmp_path)
    device = stages.encode + stages.idle_opening + stages.idle_reading + stages.idle_writing
    assert IMAGES * 0.01 <= device <= wall
