"""Several loaders as one: each step takes the batch of one of them, drawn by weight."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from latentmill.errors import UsageError
from latentmill.loading.epoch_draws import CHOICE, LIMIT, Draws, check_epoch
from latentmill.loading.loader import Loader


class Mix:
    """Batches of several loaders. Each goes through its own epochs, at its own pace.

    An epoch of the mix has `steps` batches. Which loader gives the batch of a step depends on the seed, the epoch and
    the step alone, so it is the same on all ranks. A batch that is a dict has the number of its loader as `loader`.
    """

    def __init__(self, loaders: Sequence[tuple[Loader, float]], seed: int, steps: int | None) -> None:
        self._loaders = [loader for loader, _ in loaders]
        weights = np.array([weight for _, weight in loaders], np.float64)
        if not len(weights) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
            raise UsageError(f"the weights of a mix must be positive, not {weights.tolist()}")
        if len({id(loader) for loader in self._loaders}) < len(self._loaders):
            raise UsageError("a mix has the same loader twice: create one for each, or add the weights")
        if not 0 <= seed < LIMIT or (steps is not None and steps < 1):
            raise UsageError(f"a mix needs a seed of at least 0 and at least one step, not {seed} and {steps}")
        self._limits = np.cumsum(weights) / weights.sum()
        self._seed, self._steps = seed, steps or sum(map(len, self._loaders))
        self._epoch = self._step = 0

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return self._steps

    @property
    def epoch(self) -> int:
        """The current epoch of the mix."""
        return self._epoch

    @property
    def step(self) -> int:
        """The number of batches of the current epoch that were delivered."""
        return self._step

    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of the epoch, and then go to the next one."""
        running: dict[int, Iterator[Any]] = {}
        if self._step >= self._steps:
            self._epoch, self._step = self._epoch + 1, 0
        try:
            for number in self._choose()[self._step :]:
                batch = self._take(number, running)
                self._step += 1
                yield {**batch, "loader": number} if isinstance(batch, dict) else batch
            self._epoch, self._step = self._epoch + 1, 0
        finally:
            self.close()

    def _choose(self) -> list[int]:
        """Return the numbers of the loaders of all steps of the epoch."""
        draws = Draws(self._seed, self._epoch).raw(self._steps, CHOICE) / 2.0**64
        chosen = np.searchsorted(self._limits, draws, side="right")
        return list(np.minimum(chosen, np.flatnonzero(np.diff(self._limits, prepend=0.0))[-1]).tolist())

    def _take(self, number: int, running: dict[int, Iterator[Any]]) -> Any:
        """Return the next batch of a loader, of its next epoch if need be."""
        if number in running:
            for batch in running[number]:
                return batch
        running[number] = iter(self._loaders[number])
        return next(running[number])

    def close(self) -> None:
        """Stop the threads of the loaders."""
        for loader in self._loaders:
            loader.close()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch of the mix. The loaders go on where they are."""
        check_epoch(epoch)
        self.close()
        self._epoch, self._step = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch that was delivered, and those of the loaders: JSON."""
        done = self._step >= self._steps
        return {
            "seed": self._seed,
            "epoch": self._epoch + done,
            "steps": self._steps,
            "step": 0 if done else self._step,
            "loaders": [loader.state_dict() for loader in self._loaders],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a state. With another number of batches per epoch, the same share of the epoch is done.

        Raises what `Loader.load_state_dict` raises, and UsageError for the state of another mix.
        """
        try:
            seed, epoch, steps, step = (int(state[name]) for name in ("seed", "epoch", "steps", "step"))
            inners = list(state["loaders"])
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(f"this is not a state of a mix: {state!r}") from error
        if len(inners) != len(self._loaders) or not 0 <= epoch < LIMIT or not 0 <= step <= steps or not steps:
            raise UsageError(f"this is not a state of a mix of {len(self._loaders)} loaders: {state!r}")
        if seed != self._seed:
            raise UsageError(f"the state has seed={seed}, but the mix has {self._seed}")
        self.close()
        for loader, inner in zip(self._loaders, inners, strict=True):
            loader.load_state_dict(inner)
        self._epoch, self._step = epoch, step * self._steps // steps


def mix(loaders: Sequence[tuple[Loader, float]], seed: int = 0, steps: int | None = None) -> Mix:
    """Return several loaders as one: `mix([(a, 0.7), (b, 0.3)])`.

    loaders: each with its weight, its share of the batches. seed: of the draws. steps: batches of an epoch; None: the
    sum of the loaders' lengths. Raises UsageError for weights that are no shares.
    """
    return Mix(loaders, seed, steps)
