"""A training in a process of its own: `python -m tests.latentmill.loading.trainer NAME ARGUMENT...`."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from latentmill import Cache, Loader
from latentmill.errors import LatentmillError
from latentmill.folder import CacheFolder

_list_sizes = CacheFolder.list_sizes


def train_on_two_ranks(url: str, meeting: str, other: str) -> None:
    """Print what a rank trains on. Rank 1 sees one file more, and in the end has another batch size."""
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=int(os.environ["RANK"]),
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    rank = distributed.get_rank()
    if rank == 0:
        CacheFolder.list_sizes = lambda self, below: dict(list(_list_sizes(self, below).items())[1:])  # type: ignore[method-assign, assignment]
    loader = Loader(Cache.open(url), 2, ends="pad")
    keys = [key for batch in loader for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]
    states = [None, None]
    distributed.all_gather_object(states, loader.state_dict())
    CacheFolder.list_sizes = _list_sizes  # type: ignore[method-assign]
    loader.refresh()
    message = describe_error(Cache.open(url), 2 + rank)
    missing = describe_error(Cache.open(other), 2)
    distributed.destroy_process_group()
    print(json.dumps({"keys": keys, "steps": len(loader), "states": states, "error": message, "missing": missing}))


def describe_error(cache: Cache, batch_size: int) -> str:
    try:
        Loader(cache, batch_size)
    except LatentmillError as error:
        return str(error)
    return ""


def train_until_killed(url: str, checkpoint: str) -> None:
    """Train slowly, with a checkpoint after each step: the rows that were trained on, and the state."""
    seen: list[str] = []

    def wait(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.05)
        return batch

    loader = Loader(Cache.open(url), 2, transform=wait)
    for batch in loader:
        seen += batch["key"]
        partial = Path(f"{checkpoint}.partial")
        partial.write_text(json.dumps([seen, loader.state_dict()]))
        partial.replace(checkpoint)


if __name__ == "__main__":
    {"ranks": train_on_two_ranks, "killed": train_until_killed}[sys.argv[1]](*sys.argv[2:])
