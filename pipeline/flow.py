"""The whole way of one unit: samples in, part files and their records out.

    read -> open -> transform -> batches -> encode -> write

A part file is its own commit: it is made in memory and published by one conditional create, so that a unit can be
cut short anywhere and taken up by anybody; what stands is never made again.
"""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np

from pipeline.batching import make_batches
from pipeline.cache import commits, input_hash, parts, tally
from pipeline.cache.identity import FORMAT
from pipeline.clock import StageClock
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import ChangedError, Rejected, ShardError, Stopped
from pipeline.formats.record import PartInfo, Record
from pipeline.formats.schema import OutputSchema
from pipeline.images import decode
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.images.transform import Transform
from pipeline.limits import Limits, check_columns, check_share
from pipeline.prefetch import Peekable, in_order
from pipeline.readers import parquet_keys
from pipeline.readers.damage import (
    before_retried_rest,
    keep_rejected,
    read_past_damage,
    reject_missing_rest,
    until_damage,
)
from pipeline.readers.folder import read_folder_unit
from pipeline.readers.metadata import merge_metadata, read_tar_metadata
from pipeline.readers.parquet import read_parquet
from pipeline.readers.tar import read_tar
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
from pipeline.storage import store
from pipeline.storage.store import Folder
from pipeline.weights import Vae


class ReadSpec(Protocol):
    """What of a job says how a unit is read."""

    @property
    def source_options(self) -> Mapping[str, str]: ...
    @property
    def layout(self) -> OutputSchema: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def key_column(self) -> str | None: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def superseded(self) -> Mapping[str, Mapping[int, str]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSpec:
    """What a worker must know, and little enough to be sent to it. `build` builds the worker on arrival.

    identity: sha256 of the cache's identity. image_column, key_column: of Parquet sources.
    open_threads: threads that open images, shared by the units in flight.
    run: name of this run. versions: of the libraries that decide bytes.
    superseded: what parts of `retry` have of units whose own parts were lost (`commit.superseded`).
    """

    cache: Folder
    source_options: Mapping[str, str]
    identity: str
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
        """The worker, its replica loaded."""
        pool = ThreadPoolExecutor(self.open_threads, thread_name_prefix="open")
        latent_encoder = LatentEncoder(vae, self.compute, self.dtype, self.layout.store, self.seed, self.tile_above)
        return UnitWorker(WorkerContext(spec=self, latent_encoder=latent_encoder, pool=pool, stop=stop))

    def with_smaller_slices(self) -> "EncodeSpec":
        """The same job for less memory."""
        return replace(self, compute=self.compute.with_smaller_slices())


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """What a unit needs on its way; the units in flight share them.

    seen: how many `samples` were read so far, in all units, and `pieces` of what is read past.
    damaged_at: of the unit that is done, see `Attempt`.
    """

    spec: EncodeSpec
    latent_encoder: LatentEncoder
    pool: ThreadPoolExecutor
    stop: threading.Event
    seen: Counter[str] = field(default_factory=Counter)
    open_pixels: Callable[[bytes, Limits], np.ndarray] = decode.open_pixels
    damaged_at: int | None = None

    def on_piece(self) -> None:
        """Count a piece of what is read past. Raises Stopped once the job is to stop."""
        if self.stop.is_set():
            raise Stopped
        self.seen["pieces"] += 1


class UnitWorker:
    """A worker that does units. Threads may call `run` together."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    def run(self, unit: Unit, attempt: Attempt = FIRST_ATTEMPT) -> UnitReport:
        """Do what is missing of a unit.

        A careful attempt has the images opened by a process of its own: one of them may have ended a worker. One that
        knows of a damage, and finds it again, takes the shard as far as it can be read, and rejects the rest.
        """
        context = replace(self.context, damaged_at=attempt.damaged_at)
        if not attempt.isolated:
            return process_unit(unit, context)
        with SandboxedDecoder(context.spec.limits) as opener:
            return process_unit(unit, replace(context, open_pixels=opener.open_pixels))

    @property
    def images(self) -> int:
        """Images encoded so far."""
        return self.context.latent_encoder.images

    @property
    def steps(self) -> int:
        """What moves as long as anything does: samples read, images encoded, the model's own runs."""
        return self.context.seen.total() + self.images + self.context.latent_encoder.runs


@dataclass(slots=True)
class PartBuffer:
    """What became of the samples of one part. digests: of the samples as they were read, by position."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    filtered: int = 0
    again: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def digests_in_order(self) -> list[bytes]:
        """The digest of each sample; of one that was rejected, also later than when it was read, that of its reject."""
        digests = self.digests | {reject.position: input_hash.hash_sample(reject) for reject in self.rejects}
        return [digests[position] for position in sorted(digests)]

    @property
    def samples(self) -> int:
        return len(self.rows) + len(self.rejects) + self.filtered


def process_unit(unit: Unit, context: WorkerContext) -> UnitReport:
    """Encode what is missing of a unit, and record it as done. Raises what makes the unit fail as a whole.

    An input with another time or ETag than was planned is read as it is now, if it has the samples of which the parts
    that stand were made. All of it is read for that before anything is written.
    """
    spec, clock = context.spec, StageClock()
    try:
        return encode_missing(unit, context, clock)
    except ChangedError:
        now = store.current_version(unit, spec.source_options)
        records = [part.record for part in parts.read_unit_parts(spec.cache, unit.name, spec.identity)]
        if now.bytes != unit.bytes or not records:
            raise
        samples = until_damage(read_samples(now, spec, on_piece=context.on_piece), context.damaged_at, [])
        drain(input_hash.check_inputs(instrument(samples, context, clock), records, unit.url))
    return encode_missing(now, context, clock)


def encode_missing(unit: Unit, context: WorkerContext, clock: StageClock) -> UnitReport:
    """The same, of an input that is as it was planned. Raises ChangedError if it is not."""
    spec = context.spec
    damage: list[str] = []
    passed = Counter[str]()
    superseded = spec.superseded.get(unit.name, {})
    reading = until_damage(read_samples(unit, spec, passed, context.on_piece), context.damaged_at, damage)
    samples = Peekable(instrument(before_retried_rest(reading, superseded), context, clock))
    standing: list[PartInfo] = []
    adopted = behind = encoded = again = 0
    texts: Counter[str] = Counter()
    for number in itertools.count():
        part = parts.find_part(spec.cache, unit.name, number, spec.identity, spec.layout.container)
        if part is None:
            drain(itertools.islice(samples, behind * spec.rows_per_part))  # what the parts that stood there hold
            some: Iterator[Sample | Reject] = itertools.islice(samples, spec.rows_per_part)
            if number and samples.is_done:  # what stands was read farther than this
                some = iter([reject_missing_rest(unit.url, number * spec.rows_per_part, damage)])
            filled, behind = fill_part(unit, some, context, clock, superseded), 0
            encoded, again = encoded + len(filled.rows), again + filled.again
            texts += tally.count_texts(filled.rows, spec.layout.columns.texts)
            record = make_record(unit, number, filled, samples.is_done, context)
            with clock.stage("write"):
                part = parts.publish_part(spec.cache, record, filled.rows, spec.layout)
        else:
            adopted, behind = adopted + 1, behind + 1
        standing.append(part)
        if part.record.last:
            break
    commits.write_commit(spec.cache, standing, describe_run(context, clock.seconds))
    report = make_report(unit, standing, adopted, clock.seconds)
    damaged = "".join(damage)
    return replace(report, encoded=encoded, again=again, texts=texts, damage=damaged, passed_over=passed)


def read_samples(
    unit: Unit,
    spec: ReadSpec,
    passed: Counter[str] | None = None,
    on_piece: Callable[[], None] = lambda: None,
    mended: Container[int] | None = None,
) -> Iterator[Sample | Reject]:
    """The samples of a unit, in its reading order. Nothing is opened before the first one is asked for.

    passed: what is no part of a sample is counted there, by kind.
    on_piece: called again and again while what follows a damage is read. A DamagedError is raised after that.
    mended: positions at which files of a folder may be others than were planned; those that a retry has, if not given.
    """
    options, columns = spec.source_options, spec.layout.columns
    if unit.kind == "tar":
        beside = read_tar_metadata(unit.url, options, columns.from_parquet, spec.limits, passed)
        with store.open_stream(unit.url, options, unit) as stream:
            samples = read_tar(stream, unit.url, columns.texts, spec.limits, passed)
            for sample in read_past_damage(samples, stream, on_piece):
                if isinstance(sample, Sample) and sample.key in beside:
                    yield merge_metadata(sample, beside[sample.key])
                else:
                    yield sample
    elif unit.kind == "parquet":
        with store.open_stream(unit.url, options, unit, seeking=True) as stream:
            part, image, key = unit.range or (0, 1), spec.image_column, spec.key_column
            known = parquet_keys.keys_of_file(unit.url, unit.bytes, unit.etag, key)
            samples = read_parquet(
                stream, unit.url, unit.bytes, part, image, key, columns.schema, spec.limits, known, passed
            )
            yield from read_past_damage(samples, stream, on_piece)
    elif unit.kind == "folder":
        retried = spec.superseded.get(unit.name, ())
        yield from read_folder_unit(unit, options, columns.texts, spec.limits, retried if mended is None else mended)
    else:
        raise ShardError(f"{unit.url}: this version cannot read units of the kind '{unit.kind}'")


def instrument(
    samples: Iterator[Sample | Reject], context: WorkerContext, clock: StageClock
) -> Iterator[Sample | Reject]:
    """The same samples, each timed and counted; Stopped is raised between two of them once the job is to stop."""
    while True:
        if context.stop.is_set():
            raise Stopped
        with clock.stage("read"):
            sample = next(samples, None)
        if sample is None:
            return
        context.seen["samples"] += 1
        yield sample


def drain(samples: Iterable[Sample | Reject]) -> None:
    """Read past samples."""
    deque(samples, maxlen=0)


def fill_part(
    unit: Unit,
    samples: Iterable[Sample | Reject],
    context: WorkerContext,
    clock: StageClock,
    superseded: Mapping[int, str],
) -> PartBuffer:
    """Open, transform and encode the samples of one part; its rows by bucket, then position.

    superseded: those that another part has, by position, and why they were rejected here.
    """
    filled = PartBuffer()
    spec = context.spec

    def opened_once(sample: Sample | Reject) -> tuple[PreparedImage | Reject | Filtered, float]:
        item, seconds = open_sample(unit, sample, spec.transform, spec.limits, context.open_pixels)
        filled.digests[sample.position] = input_hash.hash_sample(sample)
        try:
            check_share(item.columns if isinstance(item, PreparedImage) else {}, spec.rows_per_part, spec.limits)
        except Rejected as why:
            item = Reject.of(sample.position, sample.key, why)
        return keep_rejected(sample, item, superseded.get(sample.position)), seconds

    window = spec.compute.batch_size + 2 * spec.open_threads
    opened = in_order(context.pool, opened_once, samples, window, wait=clock.wait)
    for batch in make_batches(images_to_encode(opened, filled, clock), spec.compute.batch_size):
        encoded = context.latent_encoder.encode(batch, unit.path)
        clock.add(queue=encoded.queued, encode=encoded.seconds)
        filled.again += encoded.again
        for image, latent in zip(batch, encoded.latents, strict=True):
            if isinstance(latent, Rejected):
                filled.rejects.append(Reject.of(image.position, image.key, latent))
            else:
                filled.rows.append(Row(image.drop_pixels(), latent))
    filled.rows.sort(key=lambda row: (row.image.bucket, row.image.position))
    filled.rejects.sort(key=lambda reject: reject.position)
    return filled


def images_to_encode(
    opened: Iterable[tuple[PreparedImage | Reject | Filtered, float]], filled: PartBuffer, clock: StageClock
) -> Iterator[PreparedImage]:
    """The images that are to be encoded; what is not is put aside in `filled`."""
    for item, seconds in opened:
        clock.add(open=seconds)
        if isinstance(item, PreparedImage):
            yield item
        elif isinstance(item, Reject):
            filled.rejects.append(item)
        else:
            filled.filtered += 1


def open_sample(
    unit: Unit,
    sample: Sample | Reject,
    transform: Transform,
    limits: Limits,
    open_pixels: Callable[[bytes, Limits], np.ndarray] = decode.open_pixels,
) -> tuple[PreparedImage | Reject | Filtered, float]:
    """Bytes to pixels at the size they are encoded at, and the seconds that took. Runs in a pool's thread."""
    start = time.perf_counter()
    return _open_sample(unit, sample, transform, limits, open_pixels), time.perf_counter() - start


def _open_sample(
    unit: Unit,
    sample: Sample | Reject,
    transform: Transform,
    limits: Limits,
    open_pixels: Callable[[bytes, Limits], np.ndarray],
) -> PreparedImage | Reject | Filtered:
    if isinstance(sample, Reject):
        return sample
    try:
        check_columns(sample.columns, limits)
        rgb = open_pixels(sample.image, limits)
    except Rejected as why:
        return Reject.of(sample.position, sample.key, why)
    height, width = rgb.shape[:2]
    fit = transform.fit(height, width, unit.path, sample.key)
    if fit is None:
        return Filtered(sample.position)
    return PreparedImage(
        position=sample.position,
        key=sample.key,
        columns=sample.columns,
        pixels=transform.apply(rgb, fit),
        original_height=height,
        original_width=width,
        crop_top=fit.top,
        crop_left=fit.left,
        enlarged=fit.enlarged,
        flipped=fit.flipped,
    )


def make_record(unit: Unit, number: int, filled: PartBuffer, last: bool, context: WorkerContext) -> Record:
    """What the part will say of itself."""
    return Record(
        format=FORMAT,
        identity=context.spec.identity,
        unit=unit.name,
        part=number,
        last=last,
        source=unit.path,
        source_bytes=unit.bytes,
        range=unit.range,
        first=number * context.spec.rows_per_part,
        samples=filled.samples,
        rows=len(filled.rows),
        filtered=filled.filtered,
        enlarged=sum(row.image.enlarged for row in filled.rows),
        inputs=input_hash.combine_digests(filled.digests_in_order),
        rejects=tuple(filled.rejects),
        tally=tally.tally_rows(filled.rows, context.spec.layout.store),
    )


def describe_run(context: WorkerContext, seconds: Seconds) -> dict[str, object]:
    """What `_commits` keeps of a unit that does not follow from its parts."""
    return {
        "seconds": asdict(seconds),
        "compute": asdict(context.latent_encoder.compute),
        "versions": dict(context.spec.versions),
        "run": context.spec.run,
    }


def make_report(unit: Unit, standing: list[PartInfo], adopted: int, seconds: Seconds) -> UnitReport:
    """What the driver is told of a finished unit."""
    records = [part.record for part in standing]
    return UnitReport(
        unit=unit.name,
        samples=sum(record.samples for record in records),
        rows=sum(record.rows for record in records),
        filtered=sum(record.filtered for record in records),
        enlarged=sum(record.enlarged for record in records),
        rejects=Counter(reject.reason for record in records for reject in record.rejects),
        parts=len(standing),
        adopted=adopted,
        bytes=sum(part.bytes for part in standing),
        seconds=seconds,
    )
