"""Measure how fast this machine reads, opens and encodes, and what that means for a job of many workers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.encoder import LatentEncoder
from pipeline.estimate.images import Opening
from pipeline.estimate.sampling import Drawn
from pipeline.flow import EncodeSpec
from pipeline.records import PreparedImage
from pipeline.weights import Vae


@dataclass(frozen=True, slots=True)
class Rates:
    """Images per second: of one stream that is read, of one core that opens, and of one device that encodes.

    A rate is None if nothing was measured. on_cores: whether the device is the cores that open the images.
    streams: units that a worker reads at once. device_share: of a device that a worker has, at most 1.
    """

    read: float | None
    open: float | None
    encode: float | None
    on_cores: bool
    streams: int
    device_share: float

    def per_worker(self, cores: int) -> dict[str, float]:
        """Return the images per second of each stage of one worker, of those that were measured."""
        rates = {"reading": self.read, "opening": self.open, "encoding": self.encode}
        factors: dict[str, float] = {"reading": self.streams, "opening": cores, "encoding": self.device_share}
        return {name: rate * factors[name] for name, rate in rates.items() if rate}

    def combine(self, cores: int) -> float | None:
        """Return the images per second of one worker. Stages run at once, unless opening and encoding share cores."""
        stages = self.per_worker(cores)
        if "encoding" not in stages:
            return None
        if self.on_cores and "opening" in stages:
            stages["encoding"] = 1 / (1 / stages.pop("opening") + 1 / stages["encoding"])
        return min(stages.values())

    def find_bound(self, cores: int) -> str:
        """Return the slowest stage; "" if it is unknown."""
        stages = self.per_worker(cores)
        return min(stages, key=lambda name: stages[name]) if "encoding" in stages else ""

    @property
    def cores_per_device(self) -> float | None:
        """The cores that open as many images as the device encodes."""
        return self.encode / self.open if self.encode and self.open else None


def measure_reading(drawn: Sequence[Sequence[Drawn]]) -> float | None:
    """Return the images per second of one stream."""
    items = [item for kind in drawn for item in kind]
    seconds = sum(item.seconds for item in items)
    return sum(len(item.samples) for item in items) / seconds if seconds else None


def measure_encoding(
    vae: Vae, spec: EncodeSpec, opening: Opening, buckets: Mapping[tuple[int, int], float], seconds: float
) -> float | None:
    """Return the images per second of the encoder on this machine's device; None without an image.

    buckets: how many images have each size. The commonest size is measured after one run to warm up, and others take
    time in proportion to their pixels.
    """
    sizes = sorted((bucket for bucket in buckets if bucket in opening.examples), key=lambda size: -buckets[size])
    if not sizes:
        return None
    bucket = sizes[0]
    encoder = LatentEncoder(
        vae, spec.compute, spec.dtype, spec.layout.store, spec.seed, spec.tile_above, spec.layout.has_flipped
    )
    images: list[PreparedImage] = [opening.examples[bucket]] * spec.compute.batch_size
    encoder.encode(images)
    start, end = time.perf_counter(), time.monotonic() + seconds
    runs = 0
    while not runs or time.monotonic() < end:
        encoder.encode(images)
        runs += 1
    per_image = (time.perf_counter() - start) / runs / len(images)
    pixels = sum(weight * height * width for (height, width), weight in buckets.items())
    mean = pixels / sum(buckets.values())
    return bucket[0] * bucket[1] / mean / per_image
