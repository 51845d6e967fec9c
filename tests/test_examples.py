"""The example that trains a model on a cache."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
Command = Callable[..., tuple[int, str, str]]
SMALL = ("--width", "64", "--depth", "1", "--patch", "2", "--batch-size", "2", "--sampling-steps", "2")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_example", ROOT / "examples/train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Path:
    options = ("--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill("encode", ROOT / "examples/photos", "--to", tmp_path / "latents", *options)[0] == 0
    return tmp_path / "latents"


def run(train: ModuleType, monkeypatch: pytest.MonkeyPatch, cache: Path, to: Path, *options: str) -> dict[str, Any]:
    """Run the example as a program. Returns its last checkpoint."""
    monkeypatch.setattr(sys, "argv", ["train.py", str(cache), "--to", str(to), *SMALL, *options])
    train.main()
    return dict(torch.load(to / "checkpoint.pt", weights_only=True))


def test_a_resumed_run_gives_the_weights_of_one_that_was_not_stopped(
    train: ModuleType, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--steps", "7", "--save-every", "2")
    expected = run(train, monkeypatch, cache, tmp_path / "whole", *options)
    with monkeypatch.context() as stopped:
        save, saved = train.save_checkpoint, list[int]()

        def save_twice(path: Path, state: dict[str, Any]) -> None:
            save(path, state)
            saved.append(state["step"])
            if len(saved) == 2:
                raise KeyboardInterrupt  # in the middle of an epoch of 3 steps

        stopped.setattr(train, "save_checkpoint", save_twice)
        with pytest.raises(KeyboardInterrupt):
            run(train, monkeypatch, cache, tmp_path / "run", *options)
    assert saved == [2, 4]
    state = run(train, monkeypatch, cache, tmp_path / "run", *options)
    assert (state["step"], state["loader"]) == (7, expected["loader"])
    assert all(torch.equal(state["model"][name], weight) for name, weight in expected["model"].items())
    assert len(state["captions"]) == 6
    image = Image.open(tmp_path / "run/samples.png")
    assert image.size == (6 * 64, 64)
    assert image.tobytes() == Image.open(tmp_path / "whole/samples.png").tobytes()


def test_samples_need_a_checkpoint(
    train: ModuleType, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"there is no checkpoint in .*run: train first"):
        run(train, monkeypatch, cache, tmp_path / "run", "--sample-only")
