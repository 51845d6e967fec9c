"""Choose the form of the encoder and the batch size on a kind of GPU, by a short benchmark.

Bits depend on both, so all workers of a cache on one kind of GPU have to use the same. The first worker on a kind of
GPU measures, and publishes its choice in the cache by one conditional create (`_compute/<GPU>.json`). Workers that
measured at the same time, and all later ones, take the published choice.

A form may only be chosen if its latents agree with those of torch's own kernels in float32.
"""

import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from latentmill.error_text import describe_error
from latentmill.typed_json import FieldError, parse_fields
from pipeline.canonical_json import indented_json, parse_json_object, with_checksum
from pipeline.encoder import (
    MAX_ERROR,
    ComputeConfig,
    build_model,
    configure_allocator,
    encode_checked_images,
    encode_pixels,
    is_device_error,
    is_out_of_memory,
    measure_error,
)
from pipeline.errors import CacheError, VaeError
from pipeline.records import AttentionKernel, Form
from pipeline.storage.folder import Folder
from pipeline.weights import Vae

FOLDER = "_compute"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MEASURED_SIZES = 4  # of them, the largest that are possible
MAX_VALUES = 2**31 - 1  # of one activation: torch splits the convolutions of larger ones
SECONDS = 25.0  # after which no further measurement is started
SECONDS_PER_SIZE = 0.8
NEAR = 0.98  # of the highest throughput: a smaller batch with that much is preferred
# In the order in which they are tried. The first that works is measured with every batch size.
VARIANTS: tuple[tuple[Form, AttentionKernel], ...] = (
    ("fused", "sdpa"),
    ("fused", "per-image"),
    ("plain", "sdpa"),
    ("compiled", "sdpa"),
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may be chosen: a single value if the user has set it."""

    forms: tuple[Form, ...]
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The throughput of a form. error: of the latents, relative to those of torch's own kernels in float32."""

    form: Form
    attention: AttentionKernel
    batch_size: int
    images_per_second: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A form, or a batch size of it, that was not measured, or must not be used."""

    form: Form
    attention: AttentionKernel
    batch_size: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The choice for a kind of GPU, and what was measured there for images of `height` x `width` pixels."""

    device: str
    precision: str
    height: int
    width: int
    form: Form
    attention: AttentionKernel
    batch_size: int
    images_per_second: float
    measured: tuple[Measurement, ...]
    left_out: tuple[LeftOut, ...]


class Trial(Protocol):
    """A model whose form is tried."""

    def encode_checked_images(self) -> Tensor:
        """Return the latents of the self-check's images, in float64 on the CPU."""
        ...

    def measure(self, height: int, width: int, batch_size: int) -> float:
        """Return images per second."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


OpenTrial = Callable[[ComputeConfig], Trial]


def choose_compute(
    cache: Folder,
    vae: Vae,
    compute: ComputeConfig,
    candidates: Candidates,
    shapes: Sequence[tuple[int, int]],
    tile_above: int | None,
) -> ComputeConfig:
    """Return the settings for this worker's GPU: the published choice, or a new one, which is published.

    compute: its batch size is an upper bound. shapes: height and width of the images.
    Raises CacheError if the published choice is damaged, and VaeError if no form works.
    """
    configure_allocator()
    device = torch.cuda.get_device_name()
    choice = read_choice(cache, device)
    if choice is None:
        measured = choose(
            lambda settings: GpuTrial(vae, settings, tile_above),
            compute,
            limit_batch_sizes(candidates, vae.config.block_out_channels[0], shapes, tile_above),
            shapes,
            tile_above,
            device,
        )
        choice = publish_choice(cache, measured)
    return apply_choice(choice, compute, candidates)


def read_choice(cache: Folder, device: str) -> Choice | None:
    """Return the published choice for a kind of GPU, or None. Raises CacheError if it is damaged."""
    name = name_file(device)
    data = cache.read_if_exists(name)
    return None if data is None else parse_choice(data, cache.url_of(name))


def parse_choice(data: bytes, where: str) -> Choice:
    """Return the choice in a file of a cache. Raises CacheError, which names the file, if it is damaged."""
    content = parse_json_object(data, where)
    try:
        if content.get("sha256") != with_checksum(content)["sha256"]:
            raise FieldError("its content does not have its own sha256")
        return parse_fields(Choice, content)
    except FieldError as error:
        raise CacheError(f"{where} is damaged: {error}; remove it, and the next run measures again") from error


def publish_choice(cache: Folder, choice: Choice) -> Choice:
    """Publish a choice, unless another worker was faster. Return the published one."""
    name = name_file(choice.device)
    cache.create(name, indented_json(with_checksum(asdict(choice))))
    published = read_choice(cache, choice.device)
    if published is None:
        raise CacheError(f"{cache.url_of(name)} was created and is gone again")
    return published


def name_file(device: str) -> str:
    """Return the name of a kind of GPU's file in the cache."""
    return f"{FOLDER}/{re.sub('[^A-Za-z0-9._-]+', '-', device)}.json"


def describe_choices(cache: Folder) -> list[str]:
    """Return a line for each kind of GPU of a cache, and one for each form that was left out there.

    A damaged file has a line as well.
    """
    lines = []
    for name in cache.list_files(FOLDER):
        try:
            choice = parse_choice(cache.read(f"{FOLDER}/{name}"), cache.url_of(f"{FOLDER}/{name}"))
        except CacheError as error:  # no worker of this run used it
            lines.append(str(error))
            continue
        settings = f"{choice.form} (attention {choice.attention}), batches of {choice.batch_size}"
        rate = f"{choice.images_per_second:.1f} images/s at {choice.height}x{choice.width} pixels"
        lines.append(f"encoder on {choice.device}: {settings}; it had {rate}")
        lines += [
            f"encoder on {choice.device}: {left.form} (attention {left.attention}) was left out: {left.reason}"
            for left in choice.left_out
            if left.batch_size is None
        ]
    return lines


def apply_choice(choice: Choice, compute: ComputeConfig, candidates: Candidates) -> ComputeConfig:
    """Return the chosen settings. What the user has set remains."""
    form, attention, size = choice.form, choice.attention, choice.batch_size
    if form not in candidates.forms:
        form, attention = candidates.forms[0], "sdpa"
    if len(candidates.batch_sizes) == 1:
        (size,) = candidates.batch_sizes
    return replace(compute, form=form, attention=attention, batch_size=min(size, compute.batch_size))


def limit_batch_sizes(
    candidates: Candidates, channels: int, shapes: Sequence[tuple[int, int]], tile_above: int | None
) -> Candidates:
    """Return the candidates with the batch sizes to measure. channels: of the first level."""
    if len(candidates.batch_sizes) == 1:
        return candidates
    height, width = find_largest(shapes, tile_above)
    possible = [size for size in candidates.batch_sizes if size * channels * height * width <= MAX_VALUES]
    return replace(candidates, batch_sizes=tuple(possible[-MEASURED_SIZES:]) or candidates.batch_sizes[:1])


def find_largest(shapes: Sequence[tuple[int, int]], tile_above: int | None) -> tuple[int, int]:
    """Return the largest height and width that the encoder runs at once."""
    height, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    return (min(height, tile_above), min(width, tile_above)) if tile_above else (height, width)


def choose(
    open_trial: OpenTrial,
    compute: ComputeConfig,
    candidates: Candidates,
    shapes: Sequence[tuple[int, int]],
    tile_above: int | None,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Measure the candidates, and return the fastest that is correct. Raises VaeError if none is.

    The first form that works is measured with every batch size, and the others with the best one.
    """
    benchmark = _Benchmark(open_trial, compute, find_largest(shapes, tile_above), clock)
    sizes = candidates.batch_sizes
    for form, attention in VARIANTS:
        if form not in candidates.forms:
            continue
        if form == "compiled" and len(shapes) > 1 and benchmark.measured:
            benchmark.leave_out(form, attention, f"it would be compiled for each of {len(shapes)} shapes")
            continue
        benchmark.run(form, attention, sizes)
        if benchmark.measured:
            sizes = (benchmark.best.batch_size,)
    if not benchmark.measured:
        reasons = "; ".join(f"{left.form} ({left.attention}): {left.reason}" for left in benchmark.left_out)
        raise VaeError(f"no form of the encoder works on {device}: {reasons}; use another device")
    best, (height, width) = benchmark.best, benchmark.shape
    return Choice(
        device=device,
        precision=compute.precision,
        height=height,
        width=width,
        form=best.form,
        attention=best.attention,
        batch_size=best.batch_size,
        images_per_second=best.images_per_second,
        measured=tuple(benchmark.measured),
        left_out=tuple(benchmark.left_out),
    )


class _Benchmark:
    """The measurements so far. No measurement is started after SECONDS, except for the first form that works."""

    def __init__(
        self, open_trial: OpenTrial, compute: ComputeConfig, shape: tuple[int, int], clock: Callable[[], float]
    ) -> None:
        self.open_trial, self.compute, self.shape = open_trial, compute, shape
        self.measured: list[Measurement] = []
        self.left_out: list[LeftOut] = []
        self._clock, self._end = clock, clock() + SECONDS
        exact = open_trial(replace(compute, precision="fp32", form="plain", attention="sdpa"))
        self._exact = exact.encode_checked_images()
        exact.close()

    @property
    def best(self) -> Measurement:
        """The smallest batch of the fastest form that has nearly the highest throughput."""
        fastest = max(self.measured, key=lambda result: result.images_per_second)
        return min(
            (
                result
                for result in self.measured
                if (result.form, result.attention) == (fastest.form, fastest.attention)
                and result.images_per_second >= NEAR * fastest.images_per_second
            ),
            key=lambda result: result.batch_size,
        )

    @property
    def is_over(self) -> bool:
        return bool(self.measured) and self._clock() >= self._end

    def leave_out(self, form: Form, attention: AttentionKernel, reason: str, batch_size: int | None = None) -> None:
        self.left_out.append(LeftOut(form=form, attention=attention, batch_size=batch_size, reason=reason))

    def run(self, form: Form, attention: AttentionKernel, sizes: Sequence[int]) -> None:
        """Check a form, and measure it with these batch sizes, in ascending order."""
        if self.is_over:
            self.leave_out(form, attention, f"the {SECONDS:g} seconds of the benchmark were over")
            return
        trial: Trial | None = None
        try:
            trial = self.open_trial(replace(self.compute, form=form, attention=attention))
            error = measure_error(trial.encode_checked_images(), self._exact)
            if error is None and form != "plain":
                self.leave_out(form, attention, "its latents are not finite")
            elif error is not None and error > MAX_ERROR:
                text = f"its latents are off by {error:.1%} of their size (at most {MAX_ERROR:.0%} is normal)"
                self.leave_out(form, attention, text)
            else:
                self._measure(trial, form, attention, sizes, error or 0.0)
        except Exception as error:  # a form may fail in any way: Triton, torch.compile, a library
            if is_device_error(error):
                text = f"the form {form} fails on this GPU ({describe_error(error):.200}); use --encoder-form plain"
                raise VaeError(text) from error
            self.leave_out(form, attention, f"{describe_error(error):.200}")
        finally:
            if trial is not None:
                trial.close()

    def _measure(
        self, trial: Trial, form: Form, attention: AttentionKernel, sizes: Sequence[int], error: float
    ) -> None:
        for size in sizes:
            if self.is_over:
                self.leave_out(form, attention, f"the {SECONDS:g} seconds of the benchmark were over", size)
                return
            try:
                rate = trial.measure(*self.shape, size)
            except (RuntimeError, MemoryError) as failure:
                if not is_out_of_memory(failure):
                    raise
                self.leave_out(form, attention, "out of memory", size)
                return
            self.measured.append(
                Measurement(form=form, attention=attention, batch_size=size, images_per_second=rate, error=error)
            )


class GpuTrial:
    """A model on this worker's GPU."""

    def __init__(self, vae: Vae, compute: ComputeConfig, tile_above: int | None) -> None:
        self.compute = compute
        self.model = build_model(vae, compute, tile_above)

    def encode_checked_images(self) -> Tensor:
        """Return the latents of the self-check's images, in float64 on the CPU."""
        return encode_checked_images(self.model, self.compute)

    def measure(self, height: int, width: int, batch_size: int) -> float:
        """Return images per second, from uint8 pixels on the device to latents. Two batches warm up."""
        pixels = torch.randint(256, (batch_size, height, width, 3), dtype=torch.uint8, device=self.compute.device)

        def run() -> float:
            start = time.perf_counter()
            latents = encode_pixels(self.model, pixels, self.compute).mode()
            latents[0, 0, 0, 0].item()  # waits for the device
            return time.perf_counter() - start

        with torch.inference_mode():
            run()
            run()
            times = [run() for _ in range(3)]
            while sum(times) < SECONDS_PER_SIZE:
                times.append(run())
        return batch_size / statistics.median(times)

    def close(self) -> None:
        """Free the model's memory."""
        del self.model
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
