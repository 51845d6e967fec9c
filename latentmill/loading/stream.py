"""Batches of a cache for the worker processes of torch's DataLoader."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from latentmill.cache_files import OpenCache
from latentmill.errors import UsageError
from latentmill.loading.epoch_draws import Int64s
from latentmill.loading.feed import Options, open_feed, read_batches, start_first_epoch
from latentmill.loading.resume import EpochPlan, resume_epoch, start_epoch

MAX_WORKERS = 1024
_STATE_BYTES = 16 << 10


class _Place:
    """Where the next iteration begins: memory that this process shares with its workers, also if they persist.

    It has a state as JSON; the epoch with which each worker goes on after it finished one; and the number of workers of
    the last iteration. Only the process that made it sets the state, and each worker only its epoch.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._text = torch.zeros(_STATE_BYTES, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        self._numbers = torch.zeros(MAX_WORKERS + 1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.set_state(state)

    @property
    def _epochs(self) -> Int64s:
        """By worker, a view."""
        return np.asarray(self._numbers.numpy()[1:])

    @property
    def workers(self) -> int:
        """The number of workers of the last iteration; 0 if this process itself read."""
        return int(self._numbers[0])

    def read_state(self) -> Any:
        """Return the state that was set last."""
        return json.loads(self._text.numpy().tobytes().rstrip(b"\0"))

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at a state."""
        text = json.dumps(state).encode()
        if len(text) > _STATE_BYTES:
            raise UsageError(f"the state has {len(text)} bytes, more than {_STATE_BYTES}")
        self._text.copy_(torch.frombuffer(bytearray(text.ljust(_STATE_BYTES, b"\0")), dtype=torch.uint8))
        self._epochs[:] = state["epoch"]

    def find_epoch(self, workers: int) -> int:
        """Return the epoch of the next iteration: all workers have finished those before."""
        return int(self._epochs[: max(1, workers)].min())

    def begin(self, workers: int) -> None:
        """Note the number of workers."""
        if workers > MAX_WORKERS:
            raise UsageError(f"a stream can have {MAX_WORKERS} workers, not {workers}")
        self._numbers[0] = workers

    def finish(self, worker: int, epoch: int) -> None:
        """Note that a worker has given all its batches of an epoch."""
        self._epochs[worker] = epoch + 1


class Stream(IterableDataset[Any]):
    """Whole batches for `DataLoader(stream, batch_size=None, num_workers=W)`, planned as those of `Loader` are.

    Use it for slow transforms, such as tokenizers, which the workers run; otherwise `Loader` is faster. The options are
    those of `Loader`; the window is that of each worker. Epochs advance when a loop over the DataLoader ends. The
    workers read ahead, so a stream does not know which batches were delivered: `state_after(batch)` is the state. After
    a loop that was left early, the next one begins where that one began, or where `load_state_dict` says.
    """

    def __init__(
        self, cache: OpenCache, batch_size: int, *, epoch: int = 0, step: int = 0, **options: Unpack[Options]
    ) -> None:
        super().__init__()
        self._feed = open_feed(cache, batch_size, **options)
        self._place = _Place(start_first_epoch(self._feed, epoch, step).state_at(step))
        self._known: tuple[int, Any, tuple[EpochPlan, int]] | None = None

    def __len__(self) -> int:
        """The number of batches of the epoch on each rank, those before a resume included."""
        return self._find_plan(self._place.workers, self.epoch)[0].steps

    @property
    def epoch(self) -> int:
        """The epoch of the next loop. Within a loop, use `batch["epoch"]`."""
        return self._place.find_epoch(self._place.workers)

    @property
    def window(self) -> int:
        """Rows that are mixed with one another, in each worker."""
        return self._feed.settings.window

    @property
    def left_out(self) -> dict[tuple[int, int], int]:
        """The number of rows that are in no batch of the epoch, by bucket (height, width), if there are any."""
        return self._find_plan(self._place.workers, self.epoch)[0].order.left_out

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of this worker until the end of the epoch."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 0)
        self._place.begin(workers)
        plan, step = self._find_plan(workers, self._place.find_epoch(workers))
        # torch takes a batch of each worker in turn and begins with worker 0, also in the middle of an epoch
        turn = (worker + step - plan.first_step) % max(1, workers)
        yield from read_batches(self._feed, plan, step, turn)
        self._place.finish(worker, plan.epoch)

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state after a batch of the running loop: JSON, equal on all ranks.

        Call it before the next loop begins. A transform must keep `epoch` and `step`.
        """
        if not isinstance(batch, Mapping) or not {"epoch", "step"} <= set(batch):
            raise UsageError("state_after needs a batch with 'epoch' and 'step'; the transform must keep them")
        return self._find_plan(self._place.workers, int(batch["epoch"]))[0].state_at(int(batch["step"]) + 1)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next loop after a state, of a stream or a loader. Raises what `Loader.load_state_dict` raises."""
        plan, step = resume_epoch(self._feed.index, self._feed.settings, state)
        self._place.set_state(plan.state_at(step))

    def set_epoch(self, epoch: int) -> None:
        """Begin the next loop at the start of an epoch."""
        self._place.set_state(start_epoch(self._feed.index, self._feed.settings, epoch).state_at(0))

    def _find_plan(self, workers: int, epoch: int) -> tuple[EpochPlan, int]:
        """Return the plan of an epoch with this number of workers, and its first step."""
        state = self._place.read_state()
        if self._known is None or self._known[:2] != (workers, [epoch, state]):
            index, settings = self._feed.index, replace(self._feed.settings, workers=workers)
            if epoch == state["epoch"]:
                found = resume_epoch(index, settings, state)
            else:
                found = start_epoch(index, settings, epoch), 0
            self._known = workers, [epoch, state], found
        return self._known[2]
