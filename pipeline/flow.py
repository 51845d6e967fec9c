"""Encode one unit: samples are read, part files and their records are written.

    read -> decode -> transform -> batch -> encode -> write

`process_unit` runs all of these steps. A part file is its own commit: it is built in memory and published by one
conditional create. So a unit can be interrupted anywhere, and any worker can resume it. An existing part is never
written again.
"""

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from pipeline.batching import make_batches
from pipeline.cache import commits, input_hash, parts, tally
from pipeline.cache.identity import FORMAT
from pipeline.cache.part_info import PartInfo
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import ChangedError, Rejected, Stopped
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema
from pipeline.images import decode
from pipeline.images.prepare import prepare_sample
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.images.transform import Transform
from pipeline.limits import Limits, check_share
from pipeline.prefetch import Peekable, map_in_order
from pipeline.readers.damage import ReadableSamples, cut_at_retried_rest, keep_rejected, reject_missing_rest
from pipeline.readers.unit import read_samples
from pipeline.records import (
    FIRST_ATTEMPT,
    Attempt,
    Filtered,
    PreparedImage,
    Reject,
    Row,
    Sample,
    Seconds,
    Unit,
    UnitReport,
)
from pipeline.storage import reading
from pipeline.storage.folder import Folder
from pipeline.timing import StageTimer
from pipeline.weights import Vae


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSpec:
    """All settings that a worker needs, small enough to be sent to it. The worker is built where it runs (`build`).

    identity_sha256: as in cache.json. image_column, key_column: columns of Parquet sources.
    open_threads: threads that decode images, shared by the units in flight.
    run: name of this run. versions: versions of the libraries that affect the written bytes.
    superseded: by unit and position, the reject reasons of samples that are in parts of `retry`, for units whose own
    parts were lost (`parts.superseded`).
    """

    cache: Folder
    source_options: Mapping[str, str]
    identity_sha256: str
    transform: Transform
    dtype: str
    seed: int
    layout: OutputSchema
    image_column: str | None
    key_column: str | None
    rows_per_part: int
    tile_above: int | None
    limits: Limits
    compute: ComputeConfig
    open_threads: int
    run: str
    versions: Mapping[str, str]
    superseded: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def build(self, vae: Vae, stop: threading.Event) -> "UnitWorker":
        """Build the worker and load its model. stop: set when the job is to stop."""
        pool = ThreadPoolExecutor(self.open_threads, thread_name_prefix="open")
        latent_encoder = LatentEncoder(vae, self.compute, self.dtype, self.layout.store, self.seed, self.tile_above)
        return UnitWorker(WorkerContext(spec=self, latent_encoder=latent_encoder, pool=pool, stop=stop))

    def with_smaller_slices(self) -> "EncodeSpec":
        """Return the same job with smaller slices, which need less memory."""
        return replace(self, compute=self.compute.with_smaller_slices())


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """The objects that a unit needs. The units in flight share them.

    progress: how many `samples` were read so far, in all units, and how many `pieces` were skipped after a damage.
    damaged_at: the known damage of the unit that is processed, see `Attempt`.
    """

    spec: EncodeSpec
    latent_encoder: LatentEncoder
    pool: ThreadPoolExecutor
    stop: threading.Event
    progress: Counter[str] = field(default_factory=Counter)
    open_pixels: Callable[[bytes, Limits], np.ndarray] = decode.open_pixels
    damaged_at: int | None = None

    def on_piece(self) -> None:
        """Count a skipped piece of a damaged shard. Raises Stopped once the job is to stop."""
        if self.stop.is_set():
            raise Stopped
        self.progress["pieces"] += 1


class UnitWorker:
    """A worker that processes units. Several threads may call `run` at the same time."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    def run(self, unit: Unit, attempt: Attempt = FIRST_ATTEMPT) -> UnitReport:
        """Encode the missing parts of a unit.

        An isolated attempt decodes the images in a separate process, because one of them may have ended a worker.
        An attempt with a known damage that finds the same damage encodes the shard up to it, and rejects the rest.
        """
        context = replace(self.context, damaged_at=attempt.damaged_at)
        if not attempt.isolated:
            return process_unit(unit, context)
        with SandboxedDecoder(context.spec.limits) as decoder:
            return process_unit(unit, replace(context, open_pixels=decoder.open_pixels))

    @property
    def images(self) -> int:
        """The number of images encoded so far."""
        return self.context.latent_encoder.images

    @property
    def steps(self) -> int:
        """A counter that increases whenever the worker makes progress: samples read, images encoded, model runs."""
        return self.context.progress.total() + self.images + self.context.latent_encoder.runs


@dataclass(slots=True)
class PartBuffer:
    """The results of the samples of one part. digests: the digest of each sample as it was read, by position."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    filtered: int = 0
    fp32_fallbacks: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def digests_in_order(self) -> list[bytes]:
        """The digest of each sample, or of its reject if it was rejected, in the reader or in any later step."""
        digests = self.digests | {reject.position: input_hash.hash_sample(reject) for reject in self.rejects}
        return [digests[position] for position in sorted(digests)]

    @property
    def samples(self) -> int:
        """The number of samples: encoded, rejected and filtered."""
        return len(self.rows) + len(self.rejects) + self.filtered


def process_unit(unit: Unit, context: WorkerContext) -> UnitReport:
    """Encode the missing parts of a unit, and record the unit as done. Raises any error that fails the whole unit.

    If the input has another time or ETag than was planned, its current version is used, provided that it has the
    samples from which the existing parts were made. The whole input is read to check that before anything is written.
    """
    spec, timer = context.spec, StageTimer()
    try:
        return encode_missing_parts(unit, context, timer)
    except ChangedError:
        current = reading.fetch_current_version(unit, spec.source_options)
        records = [part.record for part in parts.read_unit_parts(spec.cache, unit.name, spec.identity_sha256)]
        if current.bytes != unit.bytes or not records:
            raise
        samples = ReadableSamples(read_samples(current, spec, on_piece=context.on_piece), context.damaged_at)
        exhaust(input_hash.check_inputs(instrument(samples, context, timer), records, unit.url))
    return encode_missing_parts(current, context, timer)


def encode_missing_parts(unit: Unit, context: WorkerContext, timer: StageTimer) -> UnitReport:
    """Encode a unit whose input is as it was planned. Raises ChangedError if it is not."""
    spec = context.spec
    skipped = Counter[str]()
    superseded = spec.superseded.get(unit.name, {})
    readable = ReadableSamples(read_samples(unit, spec, skipped, context.on_piece), context.damaged_at)
    samples = Peekable(instrument(cut_at_retried_rest(readable, superseded), context, timer))
    unit_parts: list[PartInfo] = []
    adopted = parts_to_skip = encoded = fp32_fallbacks = 0
    texts: Counter[str] = Counter()
    for number in itertools.count():
        part = parts.find_part(spec.cache, unit.name, number, spec.identity_sha256, spec.layout.container)
        if part is None:
            exhaust(itertools.islice(samples, parts_to_skip * spec.rows_per_part))  # samples of existing parts
            part_samples: Iterator[Sample | Reject] = itertools.islice(samples, spec.rows_per_part)
            if number and samples.is_done:  # an earlier worker read farther, and its parts exist
                part_samples = iter([reject_missing_rest(unit.url, number * spec.rows_per_part, readable.damage)])
            buffer, parts_to_skip = fill_part(unit, part_samples, context, timer, superseded), 0
            encoded, fp32_fallbacks = encoded + len(buffer.rows), fp32_fallbacks + buffer.fp32_fallbacks
            texts += tally.count_texts(buffer.rows, spec.layout.columns.texts)
            record = make_record(unit, number, buffer, samples.is_done, context)
            with timer.stage("write"):
                part = parts.publish_part(spec.cache, record, buffer.rows, spec.layout)
        else:
            adopted, parts_to_skip = adopted + 1, parts_to_skip + 1
        unit_parts.append(part)
        if part.record.last:
            break
    commits.write_commit(spec.cache, unit_parts, describe_run(context, timer.seconds))
    report = make_report(unit, unit_parts, adopted, timer.seconds)
    report = replace(report, encoded=encoded, fp32_fallbacks=fp32_fallbacks, texts=texts)
    return replace(report, damage=readable.damage, skipped=skipped)


def instrument(
    samples: Iterable[Sample | Reject], context: WorkerContext, timer: StageTimer
) -> Iterator[Sample | Reject]:
    """Yield the same samples, and time and count each. Raises Stopped between two samples once the job is to stop."""
    samples = iter(samples)
    while True:
        if context.stop.is_set():
            raise Stopped
        with timer.stage("read"):
            sample = next(samples, None)
        if sample is None:
            return
        context.progress["samples"] += 1
        yield sample


def exhaust(samples: Iterable[Sample | Reject]) -> None:
    """Read all samples and discard them."""
    deque(samples, maxlen=0)


def fill_part(
    unit: Unit,
    samples: Iterable[Sample | Reject],
    context: WorkerContext,
    timer: StageTimer,
    superseded: Mapping[int, str],
) -> PartBuffer:
    """Decode, transform and encode the samples of one part. Its rows are sorted by bucket, then by position.

    superseded: by position, the reject reasons of samples that are in a part of `retry`.
    """
    buffer = PartBuffer()
    spec = context.spec

    def prepare(sample: Sample | Reject) -> tuple[PreparedImage | Reject | Filtered, float]:
        item, seconds = prepare_sample(unit, sample, spec.transform, spec.limits, context.open_pixels)
        buffer.digests[sample.position] = input_hash.hash_sample(sample)
        try:
            check_share(item.columns if isinstance(item, PreparedImage) else {}, spec.rows_per_part, spec.limits)
        except Rejected as error:
            item = Reject.from_error(sample.position, sample.key, error)
        return keep_rejected(sample, item, superseded.get(sample.position)), seconds

    window = spec.compute.batch_size + 2 * spec.open_threads
    prepared = map_in_order(context.pool, prepare, samples, window, wait=timer.wait)
    for batch in make_batches(select_images(prepared, buffer, timer), spec.compute.batch_size):
        encoded = context.latent_encoder.encode(batch, unit.path)
        timer.add(queue=encoded.queued, encode=encoded.seconds)
        buffer.fp32_fallbacks += encoded.fp32_fallbacks
        for image, latent in zip(batch, encoded.latents, strict=True):
            if isinstance(latent, Rejected):
                buffer.rejects.append(Reject.from_error(image.position, image.key, latent))
            else:
                buffer.rows.append(Row(image.drop_pixels(), latent))
    buffer.rows.sort(key=lambda row: (row.image.bucket, row.image.position))
    buffer.rejects.sort(key=lambda reject: reject.position)
    return buffer


def select_images(
    prepared: Iterable[tuple[PreparedImage | Reject | Filtered, float]], buffer: PartBuffer, timer: StageTimer
) -> Iterator[PreparedImage]:
    """Yield the images to encode. Rejects and the number of filtered samples are stored in `buffer`."""
    for item, seconds in prepared:
        timer.add(open=seconds)
        if isinstance(item, PreparedImage):
            yield item
        elif isinstance(item, Reject):
            buffer.rejects.append(item)
        else:
            buffer.filtered += 1


def make_record(unit: Unit, number: int, buffer: PartBuffer, last: bool, context: WorkerContext) -> PartRecord:
    """Return the record of a part. number: of the part, from 0. last: whether it ends the unit."""
    return PartRecord(
        format=FORMAT,
        identity=context.spec.identity_sha256,
        unit=unit.name,
        part=number,
        last=last,
        source=unit.path,
        source_bytes=unit.bytes,
        range=unit.range,
        first=number * context.spec.rows_per_part,
        samples=buffer.samples,
        rows=len(buffer.rows),
        filtered=buffer.filtered,
        enlarged=sum(row.image.enlarged for row in buffer.rows),
        inputs=input_hash.combine_digests(buffer.digests_in_order),
        rejects=tuple(buffer.rejects),
        tally=tally.tally_rows(buffer.rows, context.spec.layout.store),
    )


def describe_run(context: WorkerContext, seconds: Seconds) -> dict[str, object]:
    """Return the facts about a unit that `_commits` stores and that do not follow from its parts."""
    return {
        "seconds": asdict(seconds),
        "compute": asdict(context.latent_encoder.compute),
        "versions": dict(context.spec.versions),
        "run": context.spec.run,
    }


def make_report(unit: Unit, unit_parts: list[PartInfo], adopted: int, seconds: Seconds) -> UnitReport:
    """Return the report of a finished unit for the driver. adopted: how many of its parts existed before."""
    records = [part.record for part in unit_parts]
    return UnitReport(
        unit=unit.name,
        samples=sum(record.samples for record in records),
        rows=sum(record.rows for record in records),
        filtered=sum(record.filtered for record in records),
        enlarged=sum(record.enlarged for record in records),
        rejects=Counter(reject.reason for record in records for reject in record.rejects),
        parts=len(unit_parts),
        adopted=adopted,
        bytes=sum(part.bytes for part in unit_parts),
        seconds=seconds,
    )
