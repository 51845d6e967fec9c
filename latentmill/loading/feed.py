"""What loaders and streams share: a cache that is ready to be read, and the reading of its batches in order."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from latentmill.cache_files import OpenCache
from latentmill.errors import UsageError
from latentmill.loading.batch import make_batch
from latentmill.loading.batch_settings import BatchRules, BatchSettings, Sample, check_settings
from latentmill.loading.index import Index
from latentmill.loading.order import EpochOrder, GroupRead, OrderSettings
from latentmill.loading.ranks import find_rank, read_shared_index
from latentmill.loading.resume import EpochPlan, start_epoch
from latentmill.loading.row_groups import GroupReader, RowGroup
from latentmill.loading.windows import LANES
from latentmill.micro_conditioning import Convention

WINDOW_BYTES = 512 << 20  # of latents
READ_AHEAD = 64 << 20  # bytes of groups, two of the largest, that are read before a batch needs them
READERS = 4  # requests at a time
_log = logging.getLogger("latentmill")


class Options(TypedDict, total=False):
    """The options that `Loader` and `Stream` have in common; `Loader` describes them."""

    shuffle: bool
    seed: int
    ends: Literal["drop", "pad"]
    window: int | None
    files: Sequence[str] | None
    columns: Sequence[str]
    caption_column: str | None
    sample: Sample | None
    scale: bool | Literal["dataset"]
    dtype: torch.dtype | None
    flip: Literal["none", "random"]
    conditioning: Convention
    transform: Callable[[dict[str, Any]], Any] | None
    rank: int | None
    world: int | None
    checksums: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Feed:
    """A cache that is ready to be read by a rank. Can be pickled if the transform can.

    is_shared: whether the ranks are those of this process's group, and not arguments.
    """

    cache: OpenCache
    index: Index
    rules: BatchRules
    settings: OrderSettings
    rank: int
    is_shared: bool
    transform: Callable[[dict[str, Any]], Any] | None
    checksums: bool

    def read_index_again(self) -> Index:
        """Return the index of the files that the cache has now. All ranks must call this."""
        return read_shared_index(self.cache, None, self.is_shared, asdict(self.settings))


def open_feed(
    cache: OpenCache,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    ends: Literal["drop", "pad"] = "drop",
    window: int | None = None,
    files: Sequence[str] | None = None,
    transform: Callable[[dict[str, Any]], Any] | None = None,
    rank: int | None = None,
    world: int | None = None,
    checksums: bool = True,
    columns: Sequence[str] = (),
    **batch: Any,
) -> Feed:
    """Return a feed; the arguments are `Options`. Raises UsageError for those that do not fit the cache."""
    if unknown := batch.keys() - {field.name for field in fields(BatchSettings)}:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; latentmill.Loader has the options")
    rules = check_settings(cache, BatchSettings(columns=tuple(columns), **batch))
    if window is not None and window < 1:
        raise UsageError(f"window must be at least 1, not {window}")
    if files is not None and len(set(files)) < len(files):
        raise UsageError("files has the same file twice, so its rows would be doubled")
    is_shared = rank is None
    rank, world = find_rank(rank, world)
    settings = OrderSettings(
        batch_size=batch_size, window=window or 1, seed=seed, shuffle=shuffle, ends=ends, world=world
    )
    index = read_shared_index(cache, files, is_shared, asdict(settings))
    if window is None:
        window = WINDOW_BYTES // int(index.row_bytes.max(initial=1))
    window = max(1, window // LANES // batch_size) * batch_size * LANES
    return Feed(
        cache=cache,
        index=index,
        rules=rules,
        settings=replace(settings, window=window),
        rank=rank,
        is_shared=is_shared,
        transform=transform,
        checksums=checksums,
    )


def start_first_epoch(feed: Feed, epoch: int, step: int) -> EpochPlan:
    """Return the plan of the epoch that a loader begins with. Rank 0 logs the rows that it leaves out.

    Raises UsageError if the epoch has no step, or no such step.
    """
    plan, settings = start_epoch(feed.index, feed.settings, epoch), feed.settings
    names = {size: f"{rows} of {size[0]}x{size[1]}" for size, rows in plan.order.left_out.items()}
    if not plan.steps:
        raise UsageError(
            f"the cache {feed.cache.folder.url} has no batch for each rank, with batch_size={settings.batch_size} and "
            f"{settings.world} ranks: it has {', '.join(names.values()) or 'no'} rows; use ends='pad' or a smaller "
            "batch"
        )
    if not 0 <= step <= plan.steps:
        raise UsageError(f"an epoch has {plan.steps} steps, so it cannot begin at step {step}")
    if names and feed.rank == 0:
        _log_left_out(feed, names)
    return plan


def _log_left_out(feed: Feed, names: Mapping[tuple[int, int], str]) -> None:
    """Log the rows that epochs leave out. names: how many, by the size of their bucket."""
    index, batch_size = feed.index, feed.settings.batch_size
    counts = np.bincount(index.bucket, index.rows, len(index.buckets))
    small = {size for size, rows in zip(index.buckets, counts, strict=True) if rows < batch_size}
    if never := [name for size, name in names.items() if size in small]:
        remedy = "use ends='pad', a smaller batch, or fewer buckets"
        _log.warning("these sizes have fewer rows than a batch, so no epoch has them: %s; %s", ", ".join(never), remedy)
    if others := [name for size, name in names.items() if size not in small]:
        _log.info("each epoch leaves out a different set of rows: %s", ", ".join(others))


def read_batches(feed: Feed, plan: EpochPlan, step: int, worker: int = 0) -> Generator[Any, None, None]:
    """Yield the batches of a worker of this rank, transformed, from a step of the epoch on.

    Row groups are read just before the first batch that needs them, 64 MiB of them ahead, and dropped after the last.
    """
    order, first = plan.order, step - plan.first_step
    with ThreadPoolExecutor(READERS, thread_name_prefix="latentmill-groups") as pool:
        groups = _GroupStore(feed, order.reads(feed.rank, worker, first), pool)
        try:
            for number, _, rows, valid in order.batches(feed.rank, worker, first):
                groups.move_to(number)
                batch = make_batch(
                    feed.rules,
                    feed.index,
                    groups.get(_find_groups(order, rows)),
                    rows,
                    valid,
                    seed=feed.settings.seed,
                    epoch=plan.epoch,
                    step=plan.first_step + number,
                )
                yield batch if feed.transform is None else feed.transform(batch)
        finally:
            groups.close()


def _find_groups(order: EpochOrder, rows: Any) -> list[int]:
    """Return the groups of these rows."""
    return list(np.unique(order.index.find_groups(rows)).tolist())


class _GroupStore:
    """The row groups in memory, and those that are being read, by their number."""

    def __init__(self, feed: Feed, reads: Iterable[GroupRead], pool: ThreadPoolExecutor) -> None:
        self._reader = GroupReader(feed.cache, feed.index, feed.rules.columns, feed.checksums)
        self._bytes = feed.index.stop - feed.index.start
        self._reads, self._pool = deque(reads), pool
        self._groups = dict[int, Future[RowGroup]]()
        self._spans = dict[int, GroupRead]()  # the steps for which each of them is held

    def move_to(self, step: int) -> None:
        """Drop the groups that no batch from this step on needs, and begin to read those that are needed next."""
        for group in [group for group, span in self._spans.items() if span.last < step]:
            del self._groups[group], self._spans[group]
        ahead = sum(int(self._bytes[group]) for group, span in self._spans.items() if span.first > step)
        while self._reads:
            group, first, last = self._reads[0]
            size = int(self._bytes[group]) if first > step else 0
            if ahead and size and ahead + size > READ_AHEAD:
                break
            ahead += size
            self._reads.popleft()
            if group not in self._groups:
                self._groups[group] = self._pool.submit(self._reader.read, group)
                self._spans[group] = GroupRead(group, first, last)
            self._spans[group] = self._spans[group]._replace(last=max(last, self._spans[group].last))

    def get(self, groups: Collection[int]) -> Mapping[int, RowGroup]:
        """Return groups when they are read."""
        return {group: self._groups[group].result() for group in groups}

    def close(self) -> None:
        """Begin no more reads."""
        for future in self._groups.values():
            future.cancel()
