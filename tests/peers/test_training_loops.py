"""Loaders in the training loops of accelerate, Lightning and torchdata, where they are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.make_cache import CacheSpec, write_cache
from latentmill import Cache, Loader
from tests.servers import free_port

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
ROOT = Path(__file__).parents[2]
KEYS = [f"{number:09d}" for number in range(18)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write_cache(tmp_path / "c", CacheSpec(buckets={(64, 64): 18}, parts=6))
    return Cache.open(str(tmp_path / "c"))


ACCELERATE = """
import json, sys
from accelerate import Accelerator
from latentmill import Cache, Loader
from tests.servers import free_port

accelerator = Accelerator(cpu=True)
loader = accelerator.prepare(Loader(Cache.open(sys.argv[1]), 2))
assert isinstance(loader, Loader)
keys, epochs = [], []
for epoch in range(2):
    keys.append([])
    for batch in loader:
        keys[-1] += batch["key"]
        epochs.append(batch["epoch"])
accelerator.end_training()
print(json.dumps([accelerator.process_index, keys, epochs]))
"""


@pytest.mark.slow
def test_accelerate_leaves_the_loader_alone_and_its_ranks_share_an_epoch(cache: Cache) -> None:
    pytest.importorskip("accelerate")
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", ACCELERATE, cache.folder.url]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    results = []
    for rank in ranks:
        out, err = rank.communicate(timeout=100)
        assert rank.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    assert sorted(result[0] for result in results) == [0, 1]
    for epoch in range(2):
        keys = [key for result in results for key in result[1][epoch]]
        assert len(keys) == len(set(keys)) == 16
    assert all(result[2] == [0] * 4 + [1] * 4 for result in results)


@pytest.mark.slow
def test_lightning_saves_and_restores_the_place_within_an_epoch(cache: Cache, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]  # may not be installed
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[tuple[int, int, list[str]]] = []

        def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
            self.seen.append((batch["epoch"], batch["step"], batch["key"]))
            return self.layer(batch["latents"].mean().reshape(1, 1)).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def train(steps: int, checkpoint: Path | None) -> Model:
        model = Model()
        trainer = lightning.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, Loader(cache, 2), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return model

    whole = train(23, None).seen
    assert [place[:2] for place in whole] == [divmod(step, 9) for step in range(23)]
    assert sorted(key for _, _, keys in whole[9:18] for key in keys) == KEYS
    first = train(13, None).seen
    assert first + train(23, tmp_path / "last.ckpt").seen == whole
