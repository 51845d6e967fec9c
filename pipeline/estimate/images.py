"""Open the samples that were drawn, and let each stand for the images that were not read."""

import io
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import Rejected
from pipeline.estimate.ratio import Count
from pipeline.estimate.sampling import FROM_FOOTER, Drawn
from pipeline.flow import EncodeSpec
from pipeline.images.formats import open_header
from pipeline.images.prepare import make_opener, prepare_sample
from pipeline.limits import Limits
from pipeline.records import Filtered, PreparedImage, Reject, Sample

LEAST = 4  # samples of an input that are opened even if there is no time
_Name = TypeVar("_Name", bound=Hashable)
SIDES = (256, 512, 768, 1024, 1536, 2048)  # bounds of the shorter side, in the histogram of sizes


@dataclass(frozen=True, slots=True)
class Opened:
    """A sample that was opened. weight: the number of images that it stands for, itself included.

    result: without pixels. size: width and height in pixels as stored; None if they are unknown.
    """

    result: PreparedImage | Reject | Filtered
    weight: float
    format: str
    size: tuple[int, int] | None
    columns: frozenset[str]


@dataclass(slots=True)
class Opening:
    """The opened samples by the input that they are from. seconds: that one core took for `count` of them.

    examples: an opened image of each bucket, with its pixels.
    """

    inputs: list[list[Opened]]
    examples: dict[tuple[int, int], PreparedImage]
    seconds: float = 0.0
    count: int = 0

    @property
    def all(self) -> list[Opened]:
        """The opened samples of all inputs."""
        return [item for items in self.inputs for item in items]


def open_all(drawn: Sequence[Sequence[Drawn]], counts: Sequence[Count], spec: EncodeSpec, seconds: float) -> Opening:
    """Open the samples of each kind of inputs. counts: the images of each kind.

    An image stands for more if its input has more images of which fewer were read. Samples for which there is no time
    are left out, evenly over the inputs; a few of each input are opened in any case.
    """
    opening, end = Opening([], {}), time.monotonic() + seconds
    left = sum(bool(item.samples) for items in drawn for item in items)
    for items, count in zip(drawn, counts, strict=True):
        sized = [(item, _count_images(item)) for item in items if item.samples]
        total = sum(images for _, images in sized)
        for item, images in sized:
            stop = time.monotonic() + (end - time.monotonic()) / left
            left -= 1
            results = list(_open_samples(item, spec, opening, stop))
            weight = count.images * images / total / len(results)
            opening.inputs.append([Opened(result, weight, *facts) for result, facts in results])
    return opening


def _count_images(item: Drawn) -> float:
    """Return about how many images an input has."""
    if item.unit.kind == "folder":
        return float(len(item.unit.paths))
    if item.unit.kind in FROM_FOOTER and item.image_bytes:  # its samples are of a range, or the first of one
        return len(item.samples) * item.unit.bytes / item.image_bytes
    return item.count().images


def _open_samples(
    item: Drawn, spec: EncodeSpec, opening: Opening, stop: float
) -> Iterator[tuple[PreparedImage | Reject | Filtered, tuple[Any, ...]]]:
    opener = make_opener(spec.transform, spec.limits)
    for number, sample in enumerate(item.samples):
        if number >= LEAST and time.monotonic() > stop:
            return
        start = time.perf_counter()
        result = prepare_sample(item.unit, sample, spec.limits, opener)
        opening.seconds, opening.count = opening.seconds + time.perf_counter() - start, opening.count + 1
        if isinstance(result, PreparedImage):
            opening.examples.setdefault(result.bucket, result)
            result = result.drop_pixels()
        yield result, _describe(sample, spec.limits)


def _describe(sample: Sample | Reject, limits: Limits) -> tuple[str, tuple[int, int] | None, frozenset[str]]:
    """Return the format, the size and the columns with a value of a sample."""
    if isinstance(sample, Reject):
        return "unknown", None, frozenset()
    columns = frozenset(name for name, value in sample.columns.items() if value is not None)
    try:
        image = open_header(io.BytesIO(sample.image), limits)
        return str(image.format or "unknown").lower(), image.size, columns
    except Rejected:
        return "unknown", None, columns


def count_by(pairs: Iterable[tuple[_Name, float]]) -> dict[_Name, float]:
    """Return the sum of the weights of each name, the largest first."""
    sums = Counter[_Name]()
    for name, weight in pairs:
        sums[name] += weight  # type: ignore[assignment]  # a Counter of floats
    return dict(sums.most_common())


def name_side(side: int) -> str:
    """Return the name of the class of a shorter side, in pixels."""
    lower = [bound for bound in SIDES if bound <= side]
    upper = [bound for bound in SIDES if bound > side]
    if not lower:
        return f"below {SIDES[0]}"
    return f"{lower[-1]}-{upper[0] - 1}" if upper else f"{SIDES[-1]} and more"
