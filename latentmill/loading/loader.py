"""The loader: batches of a cache for training, made ahead by one thread."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch

from latentmill.cache_files import OpenCache
from latentmill.errors import UsageError
from latentmill.loading.background import Background
from latentmill.loading.feed import Options, open_feed, read_batches, start_first_epoch
from latentmill.loading.resume import is_within_epoch, resume_epoch, start_epoch
from latentmill.loading.tensors import move_tensors, pin_tensors


class Loader:
    """Batches of a cache, for each rank the same number.

    Each `for batch in loader` runs one epoch; the next loop runs the next epoch.

    cache: from `Cache.open`. batch_size: rows of a batch on each rank. epoch, step: where to begin.
    shuffle: False: in the order of the cache. seed: of the order and all draws, equal on all ranks. ends: "drop": only
    full batches; a different set of rows is left out each epoch (`left_out`). "pad": each row once; batches are
    filled with rows for which `valid` is False.
    window: rows that are mixed with one another; None: as many as have 512 MiB of latents. About 1.5 times as many are
    in memory. files: those to read, of `loader.files`; None: all.
    columns: that a batch has beside the captions. caption_column: None for `txt`, if the cache has it.
    sample: of a cache of moments, "mode" (the default), "posterior" (a draw) or "moments". scale: True: model latents.
    "dataset": (z - mean) / std of the cache. False: raw latents. dtype: None: as stored. flip: "random": the latent of
    the image or of its mirror image. conditioning: the convention of the sizes (`latentmill.time_ids`).
    device: that the tensors of a batch are moved to. pin_memory: leave them in pinned memory instead. prefetch: batches
    that are made ahead. transform: is called with each batch by the thread; its result is what the loop gets.
    rank, world: None: of torch.distributed if it is initialized, otherwise of the variables RANK and WORLD_SIZE.
    With torch.distributed, all ranks must create the loader, and read the files that rank 0 sees.
    checksums: verify the CRC of Parquet pages.
    Raises UsageError for arguments that do not fit the cache or each other.
    """

    def __init__(
        self,
        cache: OpenCache,
        batch_size: int,
        *,
        epoch: int = 0,
        step: int = 0,
        prefetch: int = 4,
        device: torch.device | str | int | None = None,
        pin_memory: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if prefetch < 1:
            raise UsageError(f"prefetch must be at least 1, not {prefetch}")
        self._feed = open_feed(cache, batch_size, **options)
        self._next_index = self._feed.index
        self._plan, self._step = start_first_epoch(self._feed, epoch, step), step
        self._prefetch = prefetch
        self._device = None if device is None else torch.device(device)
        self._is_pinned = pin_memory or (self._device is not None and self._device.type == "cuda")
        self._reading: Background[Any] | None = None

    def __len__(self) -> int:
        """The number of batches of the current epoch on each rank, those before a resume included."""
        return self._plan.steps

    @property
    def epoch(self) -> int:
        """The current epoch. It advances when a loop ends."""
        return self._plan.epoch

    @property
    def step(self) -> int:
        """The number of batches of the current epoch that were delivered."""
        return self._step

    @property
    def window(self) -> int:
        """Rows that are mixed with one another."""
        return self._feed.settings.window

    @property
    def rank(self) -> int:
        """The rank that the batches are for."""
        return self._feed.rank

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self._feed.settings.world

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the cache that the current epoch reads."""
        return self._feed.index.files

    @property
    def left_out(self) -> dict[tuple[int, int], int]:
        """The number of rows that are in no batch of this epoch, by bucket (height, width), if there are any."""
        return self._plan.order.left_out

    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of the epoch, and then go to the next one. A loop that was left goes on where it stopped.

        Raises what reading raises, at the batch that cannot be read: StorageError, CacheError, and errors of transform.
        """
        self.close()
        if self._step >= len(self):
            self._go_to(self.epoch + 1)
        batches = read_batches(self._feed, self._plan, self._step)
        reading = Background(pin_tensors(batches) if self._is_pinned else batches, self._prefetch)
        self._reading = reading
        try:
            for batch in reading:
                self._step += 1
                yield move_tensors(batch, self._device)
            self._go_to(self.epoch + 1)
        finally:
            reading.close()

    def close(self) -> None:
        """Stop the thread. A new loop starts it again, at the next batch."""
        if self._reading is not None:
            self._reading.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch that was delivered: less than 1 kB of JSON, equal on all ranks."""
        return self._plan.state_at(self._step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a state. With another batch size, window or number of ranks, the rest of the epoch is new.

        Raises IdentityError if the cache has other files than in the middle of the state's epoch. At the start of an
        epoch, other files are allowed. Raises UsageError if the seed, shuffle or ends differ.
        """
        feed = self._feed
        if not is_within_epoch(state, feed.index):
            feed = replace(feed, index=self._next_index)
        plan, step = resume_epoch(feed.index, feed.settings, state)
        self.close()
        self._feed, self._plan, self._step = feed, plan, step

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self._go_to(epoch)

    def refresh(self) -> None:
        """Read the files that the cache has now, from the next epoch on; at the start of an epoch, from this one on.

        All ranks must call this. A state of the epoch before needs the files before: `files`.
        """
        self._next_index = self._feed.read_index_again()
        if self._step == 0:
            self._go_to(self.epoch)

    def _go_to(self, epoch: int) -> None:
        self.close()
        self._feed = replace(self._feed, index=self._next_index)
        self._plan, self._step = start_epoch(self._feed.index, self._feed.settings, epoch), 0
