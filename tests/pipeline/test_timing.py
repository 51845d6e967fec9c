"""Where the time of a unit goes: each second counts where it was spent, and the model's own time once."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from pipeline.flow import UnitWorker
from pipeline.images import decode
from pipeline.limits import Limits
from pipeline.records import PreparedImage, Seconds
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import unit_of

IMAGES = 8
SLOW = 0.1  # seconds an image


def slow_model(encoder: UnitWorker, seconds: float = SLOW) -> list[float]:
    """Have the model take so long for an image, and more. Returns how long it took each time."""
    latent_encoder, took = encoder.context.latent_encoder, list[float]()
    run = latent_encoder._run

    def slowly(model: Any, some: Sequence[PreparedImage], shard: str) -> Tensor:
        start = time.perf_counter()
        time.sleep(seconds * len(some))
        latents = run(model, some, shard)
        took.append(time.perf_counter() - start)
        return latents

    latent_encoder._run = slowly  # type: ignore[method-assign]
    return took


def spent_on(encoder: UnitWorker, folder: Path, units: int = 1) -> tuple[list[Seconds], float]:
    """Where the time of so many units at once went, and how long they took together."""
    shards = [img2dataset_members(IMAGES * number, IMAGES, height=64, width=64) for number in range(units)]
    work = [unit_of(write_tar(folder / f"s/{number}.tar", members)) for number, members in enumerate(shards)]
    start = time.perf_counter()
    with ThreadPoolExecutor(units) as pool:
        reports = list(pool.map(encoder.run, work))
    return [report.seconds for report in reports], time.perf_counter() - start


def test_two_units_on_one_model_count_its_time_once(worker: Callable[..., UnitWorker], tmp_path: Path) -> None:
    encoder = worker(tmp_path / "c", rows_per_part=100)
    took = slow_model(encoder)
    spent, wall = spent_on(encoder, tmp_path, units=2)
    assert len(took) == 2 * IMAGES
    assert sum(one.encode for one in spent) == pytest.approx(sum(took), rel=0.2)
    assert sum(one.encode for one in spent) <= wall
    assert sum(one.queue for one in spent) > 0.4 * sum(took), "each waits while the other has the model"


def test_waiting_for_images_to_be_opened_is_a_stage_of_its_own(
    worker: Callable[..., UnitWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(data: bytes, limits: Limits) -> np.ndarray:
        time.sleep(SLOW)
        return decode.open_pixels(data, limits)

    encoder = worker(tmp_path / "c", rows_per_part=100)
    encoder.context = replace(encoder.context, open_pixels=slowly)
    (spent,), wall = spent_on(encoder, tmp_path)
    assert spent.open == pytest.approx(IMAGES * SLOW, rel=0.5)
    assert 0.7 * IMAGES * SLOW < spent.starved <= wall
    assert spent.encode + spent.queue < spent.starved


def test_the_stages_of_a_units_thread_are_no_more_than_the_time_it_took(
    worker: Callable[..., UnitWorker], tmp_path: Path
) -> None:
    encoder = worker(tmp_path / "c")
    slow_model(encoder, 0.01)
    (spent,), wall = spent_on(encoder, tmp_path)
    own = spent.read + spent.starved + spent.queue + spent.encode + spent.write
    assert 0.5 * wall < own <= wall
