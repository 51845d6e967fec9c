"""The images that were encoded, read again from the sources (read -> open -> transform), beside their rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.errors import LatentmillError, SourceError, StorageError
from pipeline.images.prepare import make_opener, prepare_sample
from pipeline.images.transform import Transform
from pipeline.prefetch import map_in_order
from pipeline.readers.tar_group import select_shards
from pipeline.readers.unit import ReadSpec, read_samples
from pipeline.records import PreparedImage, Sample, Unit

IMAGES_AHEAD = 8  # that are opened at once, or wait for the model


class OriginalsSpec(ReadSpec, Protocol):
    """The settings of a job that decide how an original is read and opened."""

    @property
    def transform(self) -> Transform: ...


@dataclass(frozen=True, slots=True, eq=False)
class RowToDecode:
    """A row of a cache. cell: the name of its cell on a contact sheet; "" if it is on none."""

    unit: Unit
    values: Mapping[str, Any]
    cell: str = ""

    @property
    def identity(self) -> tuple[str, str]:
        """Shard and key."""
        return self.values["shard"], self.values["key"]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A row with its original, RGB uint8 [H, W, 3]; None if that cannot be read."""

    row: RowToDecode
    original: np.ndarray | None


def pair_with_originals(
    rows: Sequence[RowToDecode],
    spec: OriginalsSpec,
    pool: ThreadPoolExecutor,
    notes: list[str],
    on_sample: Callable[[], None],
) -> Iterator[Pair]:
    """Yield each row with its original: unit by unit, in the order of the source, and then those without an original.

    pool: opens the images. notes: receives why originals are missing. on_sample: called for each sample that is read.
    """
    for unit in {row.unit.name: row.unit for row in rows}.values():
        missing = {row.identity: row for row in rows if row.unit.name == unit.name}
        wanted = find_samples(unit, dict(missing), spec, notes, on_sample)
        for row, original in open_originals(wanted, spec, pool):
            yield Pair(missing.pop(row.identity), original)
        yield from (Pair(row, None) for row in missing.values())


def find_samples(
    unit: Unit,
    missing: dict[tuple[str, str], RowToDecode],
    spec: OriginalsSpec,
    notes: list[str],
    on_sample: Callable[[], None],
) -> Iterator[tuple[RowToDecode, Sample]]:
    """Yield the rows of a unit whose sample is read, in the order of the source. It ends if the source is damaged."""
    try:
        for sample in read_samples(select_shards(unit, {shard for shard, _ in missing}), spec):
            on_sample()
            row = missing.pop((sample.shard or unit.path, sample.key), None)
            if row is not None and isinstance(sample, Sample):
                yield row, sample
            if not missing:
                return
    except LatentmillError as error:
        is_elsewhere = isinstance(error, StorageError | SourceError)
        advice = f"; give their location with --source {unit.source_name}=PATH" if is_elsewhere else ""
        notes.append(f"{error}{advice}")


def open_originals(
    wanted: Iterator[tuple[RowToDecode, Sample]], spec: OriginalsSpec, pool: ThreadPoolExecutor
) -> Iterator[tuple[RowToDecode, np.ndarray | None]]:
    """Yield the rows with their opened images, in the same order; None for an image that is rejected now."""
    opener = make_opener(spec.transform, spec.limits)

    def open_original(item: tuple[RowToDecode, Sample]) -> tuple[RowToDecode, np.ndarray | None]:
        row, sample = item
        image = prepare_sample(row.unit, sample, spec.limits, opener)
        size = row.values["height"], row.values["width"]
        is_same = isinstance(image, PreparedImage) and image.bucket == size
        return row, image.pixels.numpy() if is_same and isinstance(image, PreparedImage) else None

    yield from map_in_order(pool, open_original, wanted, IMAGES_AHEAD)
