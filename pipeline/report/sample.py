"""A seeded sample of the rows of a cache, and what is measured on each row. Latents are not kept."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentmill.loading.index import Index, read_index
from latentmill.loading.layout import LatentLayout
from latentmill.loading.row_groups import GEOMETRY, GroupReader, RowGroup
from pipeline.cache.reader import Cache

SAMPLE_BYTES = 512 << 20  # of row groups that are read at most, unless all rows are asked for
GRID = 4  # positions of a signature's side
BINS = 64  # of a histogram
SPREAD = 5.0  # expected standard deviations on either side of the mean that a histogram covers
CAPTION_NAMES = ("txt", "caption", "text", "prompt")
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """N rows of a cache of M, and what is measured on them.

    file, index: of each row, its file and its number in the file. keys, shards: the sample's. mean, std: of each
    channel [N, C]. roughness: the mean difference of neighbouring values by their deviation [N]; of noise, about 1.1.
    flatness: the deviation within the latent, relative to the expected one [N]. signature: [N, C * 16], means over a
    4 x 4 grid in expected deviations. hashes: of the bytes of each latent. finite: whether all values are. clipped: the
    largest share of a channel's values that equal its extremes, beyond one each [N]. captions: None if there is no such
    column. sizes: original height and width [N, 2]. scale: resized side by original side [N]. counts: of the histograms
    [C, BINS]. edges: of the bins [C, BINS + 1].
    """

    total: int
    file: Sequence[str]
    index: Sequence[int]
    keys: Sequence[str]
    shards: Sequence[str]
    mean: Floats
    std: Floats
    roughness: Floats
    flatness: Floats
    signature: Floats
    hashes: Sequence[bytes]
    finite: NDArray[np.bool_]
    clipped: Floats
    captions: Sequence[str | None] | None
    sizes: NDArray[np.int64]
    scale: Floats
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.keys)


def read_sample(cache: Cache, means: Sequence[float], stds: Sequence[float], rows: int, seed: int = 0) -> Sample | None:
    """Read a sample of the rows of a cache, by whole row groups. None if the cache has no rows.

    means, stds: those that are expected of each channel. rows: their number; 0 for all rows.
    """
    index = read_index(cache)
    chosen = choose_groups(index, rows, seed)
    if not chosen:
        return None
    caption = find_caption_column(cache)
    reader = GroupReader(cache, index, [caption] if caption else [])
    collector = _Collector(LatentLayout.from_info(cache.info), np.array(means), np.array(stds), caption)
    firsts = np.searchsorted(index.file, index.file)  # the first group of each group's file
    for group, wanted in chosen.items():
        first = int(index.starts[group] - index.starts[firsts[group]])
        collector.add(reader.read(group), index.files[index.file[group]], first, wanted)
    return collector.finish(index.row_count)


def choose_groups(index: Index, rows: int, seed: int) -> dict[int, NDArray[np.int64]]:
    """Return the row groups to read and the rows to take of each, so that each unit has rows if there are enough.

    Groups are drawn until they have the rows, or take `SAMPLE_BYTES`. Each gives an equal share of the rows.
    """
    generator, total = np.random.default_rng(seed), index.row_count
    if not rows or total <= rows:
        return {group: np.arange(count) for group, count in enumerate(index.rows.tolist())}
    sizes = index.stop - index.start
    order = generator.permutation(len(index.rows))
    drawn = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), SAMPLE_BYTES, "right")))][:rows]
    share = -(-rows // len(drawn))
    return {
        int(group): np.sort(generator.choice(index.rows[group], min(share, int(index.rows[group])), replace=False))
        for group in sorted(drawn.tolist())
    }


def find_caption_column(cache: Cache) -> str | None:
    """Return the name of the column with captions, if there is one."""
    names = [*(column.name for column in cache.info.schema), *cache.overlays.schema.names]
    return next((name for name in CAPTION_NAMES if name in names), None)


class _Collector:
    """Measures rows, group by group."""

    def __init__(self, layout: LatentLayout, means: np.ndarray, stds: np.ndarray, caption: str | None) -> None:
        self.layout, self.means, self.stds, self.caption = layout, means, stds, caption
        self.edges = np.linspace(means - SPREAD * stds, means + SPREAD * stds, BINS + 1).T
        self.counts = np.zeros((len(means), BINS), np.int64)
        self.lists: dict[str, list[object]] = {
            name: [] for name in ("file", "index", "key", "shard", "caption", "hash")
        }
        self.arrays: dict[str, list[np.ndarray]] = {}

    def add(self, group: RowGroup, file: str, first: int, wanted: NDArray[np.int64]) -> None:
        """Measure these rows of a group. first: the number in the file of the group's first row."""
        shape, size = self.layout.shape(group.bucket), self.layout.array_bytes(group.bucket)
        geometry = group.geometry[wanted]
        for row in wanted.tolist():
            start = int(group.offsets[0, row])
            data = group.data[start : start + size]
            self._measure(to_floats(data, self.layout.dtype).reshape(shape)[: len(self.means)])
            self.lists["hash"].append(hashlib.blake2b(data, digest_size=16).digest())
            self.lists["file"].append(file)
            self.lists["index"].append(first + row)
            for name in ("key", "shard"):
                self.lists[name].append(group.columns[name][row])
            self.lists["caption"].append(group.columns[self.caption][row] if self.caption else None)
        columns = {name: geometry[:, number].astype(np.float32) for number, name in enumerate(GEOMETRY)}
        original = np.minimum(columns["original_height"], columns["original_width"])
        resized = np.minimum(columns["resized_height"], columns["resized_width"])
        self._append(sizes=geometry[:, :2], scale=(resized / original).astype(np.float32))

    def _append(self, **values: np.ndarray) -> None:
        for name, value in values.items():
            self.arrays.setdefault(name, []).append(value)

    def _measure(self, latent: Floats) -> None:
        finite = bool(np.isfinite(latent).all())
        latent = np.nan_to_num(latent, posinf=0.0, neginf=0.0)
        inner = drop_border(latent)
        std = latent.std(axis=(1, 2))
        steps = abs(np.diff(latent, axis=2)).mean(axis=(1, 2)) if latent.shape[2] > 1 else std
        extremes = [(channel == channel.max()).sum() + (channel == channel.min()).sum() - 2 for channel in latent]
        self._append(
            mean=latent.mean(axis=(1, 2))[None],
            std=std[None],
            roughness=np.array([np.median(steps / np.maximum(std, 1e-6))], np.float32),
            flatness=np.array([np.median(inner.std(axis=(1, 2)) / self.stds)], np.float32),
            signature=((shrink(latent) - self.means[:, None]) / self.stds[:, None]).reshape(1, -1).astype(np.float32),
            finite=np.array([finite]),
            clipped=np.array([max(extremes) / latent[0].size], np.float32),
        )
        for channel, values in enumerate(latent):
            self.counts[channel] += np.histogram(values, self.edges[channel])[0]

    def finish(self, total: int) -> Sample:
        """Return the sample. total: the rows of the cache."""
        joined = {name: np.concatenate(values) for name, values in self.arrays.items()}
        lists = self.lists
        return Sample(
            total=total,
            file=lists["file"],  # type: ignore[arg-type]
            index=lists["index"],  # type: ignore[arg-type]
            keys=lists["key"],  # type: ignore[arg-type]
            shards=lists["shard"],  # type: ignore[arg-type]
            hashes=lists["hash"],  # type: ignore[arg-type]
            captions=lists["caption"] if self.caption else None,  # type: ignore[arg-type]
            counts=self.counts,
            edges=self.edges,
            **joined,
        )


def to_floats(data: memoryview, dtype: str) -> Floats:
    """Return the values of a latent as float32, flat. dtype: the stored one."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(np.float32)


def drop_border(latent: Floats) -> Floats:
    """Return a latent without up to three positions at each border, where the padding of the convolutions shows."""
    trim = min(3, min(latent.shape[1:]) // 4)
    return latent[:, trim : latent.shape[1] - trim, trim : latent.shape[2] - trim]


def shrink(latent: Floats) -> Floats:
    """Return the means of a latent [C, h, w] over a grid of 4 x 4: [C, 16]. A short side has fewer different cells."""
    rows, columns = (np.array_split(np.arange(side), min(GRID, side)) for side in latent.shape[1:])
    cells = [
        latent[:, row[0] : row[-1] + 1, column[0] : column[-1] + 1].mean(axis=(1, 2))
        for row in rows
        for column in columns
    ]
    grid = np.stack(cells, axis=1)
    return np.resize(grid, (len(latent), GRID * GRID)) if grid.shape[1] != GRID * GRID else grid
