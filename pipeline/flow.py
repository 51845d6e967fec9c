"""Encode one unit: samples are read, part files and their records are written.

    read -> decode -> transform -> batch -> encode -> write

`process_unit` runs all of these steps. A part file is its own commit: it is built in memory and published by one
conditional create. So a unit can be interrupted anywhere, and any worker can resume it. An existing part is never
written again.
"""

import itertools
import platform
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from latentmill.cache_info import SourceRules
from pipeline import tuning
from pipeline.cache import commits, input_hash, parts
from pipeline.cache.part_info import PartSummary, UnitReport
from pipeline.device_loop import DeviceLoop
from pipeline.encoder import ComputeConfig, LatentEncoder
from pipeline.errors import ChangedError, Stopped
from pipeline.formats.schema import OutputSchema
from pipeline.images.decode import OpenPixels
from pipeline.images.opener_processes import IS_SUPPORTED, OpenerProcesses
from pipeline.images.prepare import Opener, make_opener
from pipeline.images.remote_openers import LocalAndRemoteOpeners, RemoteOpeners, count_images_in_flight
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.part_writer import Stages, UnitWriter, check_left_out
from pipeline.prefetch import Peekable
from pipeline.readers.damage import ReadableSamples, cut_at_retried_rest, reject_missing_rest
from pipeline.readers.tar_group import LeftOutTars, leave_out
from pipeline.readers.unit import read_samples
from pipeline.records import FIRST_ATTEMPT, TAR_GROUP, Attempt, Reject, Sample, Seconds, Unit
from pipeline.sources.planned_files import fetch_current_version
from pipeline.storage.folder import Folder
from pipeline.timing import StageTimer
from pipeline.weights import Vae

MAX_OPEN_THREADS = 2  # more of them hardly open more images per second, because of the interpreter's lock
WRITING = 2  # units of a worker that are only written, in addition to those that are read
IMAGES_IN_FLIGHT_BYTES = 2 << 30  # of the opened images of a worker that wait for the device


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSpec:
    """All settings that a worker needs, small enough to be sent to it. The worker is built where it runs (`build`).

    identity_sha256: as in cache.json. image_column, key_column: columns of Parquet sources. source_rules: how texts
    are read. open_workers: threads or processes that open images, shared by the units in flight; 0: as many as the
    worker has cores. remote_openers: openers on other machines, in addition. run: name of this run. versions:
    versions of the libraries that affect the written bytes. candidates: what a worker may choose for its GPU
    (`pipeline.tuning`); None: `compute` has all settings. superseded: by unit and position, the reject reasons of
    samples that are in parts of `retry`, for units whose own parts were lost (`parts.read_superseded`). standing:
    by unit, the part files that existed when the driver listed the cache; None: the driver did not list it, and
    workers list the files of each unit.
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
    open_workers: int
    remote_openers: RemoteOpeners | None = None
    run: str
    versions: Mapping[str, str]
    candidates: tuning.Candidates | None = None
    superseded: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    standing: Mapping[str, Set[str]] | None = None
    source_rules: SourceRules = SourceRules()

    def build(self, vae: Vae, stop: threading.Event) -> "UnitWorker":
        """Build the worker and load its model. stop: set when the job is to stop."""
        if self.candidates is not None:
            compute = tuning.choose_compute(
                self.cache, vae, self.compute, self.candidates, self.transform.output_sizes, self.tile_above
            )
            return replace(self, compute=compute, candidates=None).build(vae, stop)
        opener = self.start_openers()  # processes start while the model is loaded
        encoder = LatentEncoder(
            vae, self.compute, self.dtype, self.layout.store, self.seed, self.tile_above, self.layout.has_flipped
        )
        error = encoder.check_precision()
        loop = DeviceLoop(encoder, self.units_in_flight, self.samples_in_flight, self.openers)
        pool = ThreadPoolExecutor(self.openers, thread_name_prefix="open")
        stages = Stages(pool=pool, loop=loop, stop=stop, opener=opener)
        return UnitWorker(WorkerContext(spec=self, latent_encoder=encoder, stages=stages, precision_error=error))

    def for_node(self, cores: float) -> "EncodeSpec":
        """Return the same job for a worker that may use this many cores of its node."""
        return replace(self, open_workers=self.open_workers or max(1, int(cores)))

    def start_openers(self) -> Opener:
        """Return the function with which a worker opens images: in its threads, or in processes if there are many."""
        count, transform, limits = self.open_workers, self.transform, self.limits
        opener = make_opener(transform, limits)
        if count > MAX_OPEN_THREADS and IS_SUPPORTED:
            opener = OpenerProcesses(count, transform, limits).open_image
        if self.remote_openers is not None:
            remote = self.remote_openers.start(transform, limits)
            opener = LocalAndRemoteOpeners(opener, count, remote, transform, limits).open_image
        return opener

    def with_smaller_batches(self) -> "EncodeSpec":
        """Return the same job with smaller batches, which need less memory."""
        return replace(self, compute=self.compute.with_smaller_batches())

    @property
    def tasks_per_worker(self) -> int:
        """The number of units that a worker has at the same time: some are read, and the others are written."""
        return self.units_in_flight + (0 if self.compute.device == "cpu" else WRITING)

    @property
    def units_in_flight(self) -> int:
        """The number of units that a worker reads at the same time.

        Images of several units fill the batches of a bucket. More buckets need more units.
        """
        if self.compute.device == "cpu":
            return 2
        return 8 if len(self.transform.output_sizes) > 1 else 4

    @property
    def openers(self) -> int:
        """The number of images that a worker opens at the same time."""
        return self.open_workers + count_images_in_flight(self.remote_openers, self.transform)

    @property
    def samples_in_flight(self) -> int:
        """The number of samples between the readers and the model: as many as full batches need, bounded in bytes."""
        buckets, batch = len(self.transform.output_sizes), self.compute.batch_size
        wanted = buckets * (batch - 1) + 2 * self.openers + 4 * batch
        image_bytes = 3 * self.transform.max_pixels
        return max(self.openers + batch, min(wanted, IMAGES_IN_FLIGHT_BYTES // image_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """The objects that a unit needs. The units in flight share them.

    progress: how many `samples` were read so far, in all units, and how many `pieces` were skipped after damage.
    damaged_at, is_retry: of the unit that is processed, see `Attempt`.
    precision_error: of the worker's self-check, see `LatentEncoder.check_precision`.
    """

    spec: EncodeSpec
    latent_encoder: LatentEncoder
    stages: Stages
    progress: Counter[str] = field(default_factory=Counter)
    damaged_at: int | None = None
    is_retry: bool = False
    precision_error: float | None = None

    def with_decoder(self, open_pixels: OpenPixels) -> "WorkerContext":
        """Return the same context with a function that decodes image files in the threads of this process."""
        opener = make_opener(self.spec.transform, self.spec.limits, open_pixels)
        return replace(self, stages=replace(self.stages, opener=opener))

    def on_piece(self) -> None:
        """Count a skipped piece of a damaged shard. Raises Stopped once the job is to stop."""
        if self.stages.stop.is_set():
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
        context = replace(self.context, damaged_at=attempt.damaged_at, is_retry=attempt.is_retry)
        if not attempt.isolated:
            return process_unit(unit, context)
        with SandboxedDecoder(context.spec.limits) as decoder:
            return process_unit(unit, context.with_decoder(decoder.open_pixels))

    @property
    def images(self) -> int:
        """The number of images encoded so far."""
        return self.context.latent_encoder.images

    @property
    def steps(self) -> int:
        """A counter that increases whenever the worker makes progress: samples read, images encoded, model runs."""
        return self.context.progress.total() + self.images + self.context.latent_encoder.runs

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the model ran so far."""
        return self.context.stages.loop.busy_seconds


def process_unit(unit: Unit, context: WorkerContext) -> UnitReport:
    """Encode the missing parts of a unit, and record the unit as done. Raises any error that fails the whole unit.

    A unit that another job has finished is not read.
    If the input has another time or ETag than was planned, its current version is used, provided that it has the
    samples from which the existing parts were made. The whole input is read to check that before anything is written.
    """
    spec, timer = context.spec, StageTimer()
    committed = commits.read_commit_if_exists(spec.cache, unit.name)
    if committed is not None:
        commits.parse_summaries(spec.cache, unit.name, committed)  # raises an error with its name if it is damaged
        return make_report(unit, committed["parts"], len(committed["parts"]), timer.seconds)
    try:
        return encode_missing_parts(unit, context, timer, find_standing_parts(unit, context))
    except ChangedError:
        current = fetch_current_version(unit, spec.source_options)
        standing = parts.list_unit_files(spec.cache, unit.name)
        records = list(parts.read_counted_records(spec.cache, standing, spec.identity_sha256))
        if current.bytes != unit.bytes or not records:
            raise
        current, left_out = leave_out(current, records), LeftOutTars.after(records, spec.rows_per_part)
        samples = read_samples(current, spec, on_piece=context.on_piece, left_out=left_out)
        readable = ReadableSamples(samples, context.damaged_at)
        exhaust(input_hash.check_inputs(instrument(readable, context, timer), records, unit.url))
    return encode_missing_parts(current, context, timer, standing)


def find_standing_parts(unit: Unit, context: WorkerContext) -> Collection[str]:
    """Return the files of the unit's parts that exist. The driver knows those that existed before this run."""
    if context.spec.standing is None or context.is_retry:
        return parts.list_unit_files(context.spec.cache, unit.name)
    return context.spec.standing.get(unit.name, ())


def encode_missing_parts(
    unit: Unit, context: WorkerContext, timer: StageTimer, standing: Collection[str]
) -> UnitReport:
    """Encode a unit whose input is as it was planned. Raises ChangedError if it is not.

    While a part is encoded and published, the samples of the next one are read.
    standing: the files of its parts that exist.
    """
    spec = context.spec
    skipped = Counter[str]()
    superseded = spec.superseded.get(unit.name, {})
    files = standing if unit.kind == TAR_GROUP else ()
    records = list(parts.read_counted_records(spec.cache, files, spec.identity_sha256))
    left_out, unit = LeftOutTars.after(records, spec.rows_per_part), leave_out(unit, records)
    readable = ReadableSamples(
        read_samples(unit, spec, skipped, context.on_piece, left_out=left_out), context.damaged_at
    )
    samples = Peekable(instrument(cut_at_retried_rest(readable, superseded), context, timer))
    unit_parts = parts.UnitParts(spec.cache, unit.name, spec.identity_sha256, spec.layout, standing)
    parts_to_skip, adopted = 0, None
    with UnitWriter(unit, spec, context.stages, timer, superseded, unit_parts.publish, left_out) as writer:
        for number in itertools.count():
            part = unit_parts.find(number)
            if part is not None:
                writer.adopt(part)
                parts_to_skip, adopted = parts_to_skip + 1, part.record
            else:
                first = number * spec.rows_per_part
                exhaust(itertools.islice(samples, parts_to_skip * spec.rows_per_part))  # samples of existing parts
                if adopted is not None and parts_to_skip:
                    check_left_out(adopted, left_out.list_before(first))
                parts_to_skip = 0
                part_samples: Iterator[Sample | Reject] = itertools.islice(samples, spec.rows_per_part)
                # an earlier worker read farther, and its parts exist
                if number and samples.is_done and not left_out.has_any_from(first):
                    part_samples = iter([reject_missing_rest(unit.url, first, readable.damage)])
                writer.read_part(number, part_samples, lambda: samples.is_done)
            if writer.has_last_part():
                break
    entries = commits.write_commit(spec.cache, writer.parts, collect_commit_facts(context, timer.seconds))
    return replace(
        make_report(unit, entries, writer.adopted, timer.seconds),
        encoded=writer.encoded,
        fp32_fallbacks=writer.fp32_fallbacks,
        texts=writer.texts,
        damage=readable.damage,
        skipped=skipped,
        precision_error=context.precision_error or 0.0,
        elapsed=timer.elapsed,
    )


def instrument(
    samples: Iterable[Sample | Reject], context: WorkerContext, timer: StageTimer
) -> Iterator[Sample | Reject]:
    """Yield the same samples, and time and count each. Raises Stopped between two samples once the job is to stop."""
    samples = iter(samples)
    while True:
        if context.stages.stop.is_set():
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


def collect_commit_facts(context: WorkerContext, seconds: Seconds) -> dict[str, object]:
    """Return the facts about a unit that `_commits` stores and that do not follow from its parts."""
    return {
        "seconds": asdict(seconds),
        "compute": asdict(context.latent_encoder.compute),
        "precision_error": context.precision_error,
        "versions": dict(context.spec.versions),
        "run": context.spec.run,
        "host": platform.node(),
    }


def make_report(unit: Unit, entries: Sequence[Mapping[str, Any]], adopted: int, seconds: Seconds) -> UnitReport:
    """Return the report of a finished unit for the driver.

    entries: of its parts in the commit. adopted: how many of its parts existed before.
    """
    return UnitReport(
        unit=unit.name,
        samples=sum(entry["samples"] for entry in entries),
        rows=sum(entry["rows"] for entry in entries),
        filtered=sum((Counter(entry["filtered"]) for entry in entries), Counter()),
        enlarged=sum(entry["enlarged"] for entry in entries),
        rejects=sum((Counter(entry["rejects"]) for entry in entries), Counter()),
        parts=len(entries),
        adopted=adopted,
        bytes=sum(entry["bytes"] for entry in entries),
        seconds=seconds,
        summaries=[PartSummary.from_commit(entry) for entry in entries],
    )
