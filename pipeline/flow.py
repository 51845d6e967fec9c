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

from pipeline.batching import batches
from pipeline.cache import commits, input_hash, parts, tally
from pipeline.cache.identity import FORMAT
from pipeline.clock import Clock
from pipeline.encoder import Compute, Replica
from pipeline.errors import ChangedError, Rejected, ShardError, Stopped
from pipeline.formats.record import Record, Standing
from pipeline.formats.schema import Layout
from pipeline.images import decode
from pipeline.images.sandbox import Opener
from pipeline.images.transform import Transform
from pipeline.limits import Limits, check_columns, check_share
from pipeline.prefetch import Peekable, in_order
from pipeline.readers import parquet_keys
from pipeline.readers.damage import after_all_bytes, before_the_rest, rejected_again, rest_alone, to_the_damage
from pipeline.readers.folder import read_unit
from pipeline.readers.metadata import joined, read_beside_tar
from pipeline.readers.parquet import read_parquet
from pipeline.readers.tar import read_tar
from pipeline.records import FIRST, Attempt, Filtered, Picture, Reject, Row, Sample, Seconds, Unit, UnitReport
from pipeline.storage import store
from pipeline.storage.store import Folder
from pipeline.weights import Vae


class Reading(Protocol):
    """What of a job says how a unit is read."""

    @property
    def source_options(self) -> Mapping[str, str]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def key_column(self) -> str | None: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def superseded(self) -> Mapping[str, Mapping[int, str]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """What a worker must know, and little enough to be sent to it. `build` makes the tools on arrival.

    identity: sha256 of the cache's identity. image_column, key_column: of Parquet sources.
    open_threads: threads that open pictures, shared by the units in flight.
    run: name of this run. versions: of the libraries that decide bytes.
    superseded: what parts of `retry` have of units whose own parts were lost (`commit.superseded`).
    """

    cache: Folder
    source_options: Mapping[str, str]
    identity: str
    transform: Transform
    dtype: str
    seed: int
    layout: Layout
    image_column: str | None
    key_column: str | None
    rows_per_part: int
    tile_above: int | None
    limits: Limits
    compute: Compute
    open_threads: int
    run: str
    versions: Mapping[str, str]
    superseded: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def build(self, vae: Vae, stop: threading.Event) -> "Encoder":
        """The worker, its replica loaded."""
        pool = ThreadPoolExecutor(self.open_threads, thread_name_prefix="open")
        replica = Replica(vae, self.compute, self.dtype, self.layout.store, self.seed, self.tile_above)
        return Encoder(Tools(job=self, replica=replica, pool=pool, stop=stop))

    def in_smaller_slices(self) -> "EncodeJob":
        """The same job for less memory."""
        return replace(self, compute=self.compute.in_smaller_slices())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a unit needs on its way; the units in flight share them.

    seen: how many `samples` were read so far, in all units, and `pieces` of what is read past.
    damaged_at: of the unit that is done, see `Attempt`.
    """

    job: EncodeJob
    replica: Replica
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


class Encoder:
    """A worker that does units. Threads may call `run` together."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    def run(self, unit: Unit, attempt: Attempt = FIRST) -> UnitReport:
        """Do what is missing of a unit.

        A careful attempt has the pictures opened by a process of its own: one of them may have ended a worker. One that
        knows of a damage, and finds it again, takes the shard as far as it can be read, and rejects the rest.
        """
        tools = replace(self.tools, damaged_at=attempt.damaged_at)
        if not attempt.careful:
            return process(unit, tools)
        with Opener(tools.job.limits) as opener:
            return process(unit, replace(tools, open_pixels=opener.open_pixels))

    @property
    def pictures(self) -> int:
        """Pictures encoded so far."""
        return self.tools.replica.pictures

    @property
    def steps(self) -> int:
        """What moves as long as anything does: samples read, pictures encoded, the model's own runs."""
        return self.tools.seen.total() + self.pictures + self.tools.replica.runs


@dataclass(slots=True)
class Filled:
    """What became of the samples of one part. digests: of the samples as they were read, by position."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    filtered: int = 0
    again: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def digests_in_order(self) -> list[bytes]:
        """The digest of each sample; of one that was rejected, also later than when it was read, that of its reject."""
        digests = self.digests | {reject.position: input_hash.digest_of(reject) for reject in self.rejects}
        return [digests[position] for position in sorted(digests)]

    @property
    def samples(self) -> int:
        return len(self.rows) + len(self.rejects) + self.filtered


def process(unit: Unit, tools: Tools) -> UnitReport:
    """Encode what is missing of a unit, and record it as done. Raises what makes the unit fail as a whole.

    An input with another time or ETag than was planned is read as it is now, if it has the samples of which the parts
    that stand were made. All of it is read for that before anything is written.
    """
    job, clock = tools.job, Clock()
    try:
        return encode_missing(unit, tools, clock)
    except ChangedError:
        now = store.as_it_is(unit, job.source_options)
        records = [part.record for part in parts.of_unit(job.cache, unit.name, job.identity)]
        if now.bytes != unit.bytes or not records:
            raise
        samples = to_the_damage(read(now, job, on_piece=tools.on_piece), tools.damaged_at, [])
        drain(input_hash.proven(watched(samples, tools, clock), records, unit.url))
    return encode_missing(now, tools, clock)


def encode_missing(unit: Unit, tools: Tools, clock: Clock) -> UnitReport:
    """The same, of an input that is as it was planned. Raises ChangedError if it is not."""
    job = tools.job
    damage: list[str] = []
    passed = Counter[str]()
    superseded = job.superseded.get(unit.name, {})
    reading = to_the_damage(read(unit, job, passed, tools.on_piece), tools.damaged_at, damage)
    samples = Peekable(watched(before_the_rest(reading, superseded), tools, clock))
    standing: list[Standing] = []
    adopted = behind = encoded = again = 0
    texts: Counter[str] = Counter()
    for number in itertools.count():
        part = parts.find(job.cache, unit.name, number, job.identity, job.layout.container)
        if part is None:
            drain(itertools.islice(samples, behind * job.rows_per_part))  # what the parts that stood there hold
            some: Iterator[Sample | Reject] = itertools.islice(samples, job.rows_per_part)
            if number and samples.is_done:  # what stands was read farther than this
                some = iter([rest_alone(unit.url, number * job.rows_per_part, damage)])
            filled, behind = fill(unit, some, tools, clock, superseded), 0
            encoded, again = encoded + len(filled.rows), again + filled.again
            texts += tally.with_texts(filled.rows, job.layout.columns.texts)
            record = make_record(unit, number, filled, samples.is_done, tools)
            with clock.stage("write"):
                part = parts.publish(job.cache, record, filled.rows, job.layout)
        else:
            adopted, behind = adopted + 1, behind + 1
        standing.append(part)
        if part.record.last:
            break
    commits.finish(job.cache, standing, run_facts(tools, clock.seconds))
    report = summed(unit, standing, adopted, clock.seconds)
    damaged = "".join(damage)
    return replace(report, encoded=encoded, again=again, texts=texts, damage=damaged, passed_over=passed)


def read(
    unit: Unit,
    job: Reading,
    passed: Counter[str] | None = None,
    on_piece: Callable[[], None] = lambda: None,
    mended: Container[int] | None = None,
) -> Iterator[Sample | Reject]:
    """The samples of a unit, in its reading order. Nothing is opened before the first one is asked for.

    passed: what is no part of a sample is counted there, by kind.
    on_piece: called again and again while what follows a damage is read. A DamagedError is raised after that.
    mended: positions at which files of a folder may be others than were planned; those that a retry has, if not given.
    """
    options, columns = job.source_options, job.layout.columns
    if unit.kind == "tar":
        beside = read_beside_tar(unit.url, options, columns.from_parquet, job.limits, passed)
        with store.open_stream(unit.url, options, unit) as stream:
            samples = read_tar(stream, unit.url, columns.texts, job.limits, passed)
            for sample in after_all_bytes(samples, stream, on_piece):
                if isinstance(sample, Sample) and sample.key in beside:
                    yield joined(sample, beside[sample.key])
                else:
                    yield sample
    elif unit.kind == "parquet":
        with store.open_stream(unit.url, options, unit, seeking=True) as stream:
            part, image, key = unit.range or (0, 1), job.image_column, job.key_column
            known = parquet_keys.of_file(unit.url, unit.bytes, unit.etag, key)
            samples = read_parquet(
                stream, unit.url, unit.bytes, part, image, key, columns.schema, job.limits, known, passed
            )
            yield from after_all_bytes(samples, stream, on_piece)
    elif unit.kind == "folder":
        retried = job.superseded.get(unit.name, ())
        yield from read_unit(unit, options, columns.texts, job.limits, retried if mended is None else mended)
    else:
        raise ShardError(f"{unit.url}: this version cannot read units of the kind '{unit.kind}'")


def watched(samples: Iterator[Sample | Reject], tools: Tools, clock: Clock) -> Iterator[Sample | Reject]:
    """The same samples, each timed and counted; Stopped is raised between two of them once the job is to stop."""
    while True:
        if tools.stop.is_set():
            raise Stopped
        with clock.stage("read"):
            sample = next(samples, None)
        if sample is None:
            return
        tools.seen["samples"] += 1
        yield sample


def drain(samples: Iterable[Sample | Reject]) -> None:
    """Read past samples."""
    deque(samples, maxlen=0)


def fill(
    unit: Unit, samples: Iterable[Sample | Reject], tools: Tools, clock: Clock, superseded: Mapping[int, str]
) -> Filled:
    """Open, transform and encode the samples of one part; its rows by bucket, then position.

    superseded: those that another part has, by position, and why they were rejected here.
    """
    filled = Filled()
    job = tools.job

    def opened_once(sample: Sample | Reject) -> tuple[Picture | Reject | Filtered, float]:
        item, seconds = open_sample(unit, sample, job.transform, job.limits, tools.open_pixels)
        filled.digests[sample.position] = input_hash.digest_of(sample)
        try:
            check_share(item.columns if isinstance(item, Picture) else {}, job.rows_per_part, job.limits)
        except Rejected as why:
            item = Reject.of(sample.position, sample.key, why)
        return rejected_again(sample, item, superseded.get(sample.position)), seconds

    window = job.compute.batch_size + 2 * job.open_threads
    opened = in_order(tools.pool, opened_once, samples, window, wait=clock.wait)
    for batch in batches(pictures(opened, filled, clock), job.compute.batch_size):
        encoded = tools.replica.encode(batch, unit.path)
        clock.add(queue=encoded.queued, encode=encoded.seconds)
        filled.again += encoded.again
        for picture, latent in zip(batch, encoded.latents, strict=True):
            if isinstance(latent, Rejected):
                filled.rejects.append(Reject.of(picture.position, picture.key, latent))
            else:
                filled.rows.append(Row(picture.without_pixels(), latent))
    filled.rows.sort(key=lambda row: (row.picture.bucket, row.picture.position))
    filled.rejects.sort(key=lambda reject: reject.position)
    return filled


def pictures(
    opened: Iterable[tuple[Picture | Reject | Filtered, float]], filled: Filled, clock: Clock
) -> Iterator[Picture]:
    """The pictures that are to be encoded; what is not is put aside in `filled`."""
    for item, seconds in opened:
        clock.add(open=seconds)
        if isinstance(item, Picture):
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
) -> tuple[Picture | Reject | Filtered, float]:
    """Bytes to pixels at the size they are encoded at, and the seconds that took. Runs in a pool's thread."""
    start = time.perf_counter()
    return _open(unit, sample, transform, limits, open_pixels), time.perf_counter() - start


def _open(
    unit: Unit,
    sample: Sample | Reject,
    transform: Transform,
    limits: Limits,
    open_pixels: Callable[[bytes, Limits], np.ndarray],
) -> Picture | Reject | Filtered:
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
    return Picture(
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


def make_record(unit: Unit, number: int, filled: Filled, last: bool, tools: Tools) -> Record:
    """What the part will say of itself."""
    return Record(
        format=FORMAT,
        identity=tools.job.identity,
        unit=unit.name,
        part=number,
        last=last,
        source=unit.path,
        source_bytes=unit.bytes,
        range=unit.range,
        first=number * tools.job.rows_per_part,
        samples=filled.samples,
        rows=len(filled.rows),
        filtered=filled.filtered,
        enlarged=sum(row.picture.enlarged for row in filled.rows),
        inputs=input_hash.of_digests(filled.digests_in_order),
        rejects=tuple(filled.rejects),
        tally=tally.tally_rows(filled.rows, tools.job.layout.store),
    )


def run_facts(tools: Tools, seconds: Seconds) -> dict[str, object]:
    """What `_commits` keeps of a unit that does not follow from its parts."""
    return {
        "seconds": asdict(seconds),
        "compute": asdict(tools.replica.compute),
        "versions": dict(tools.job.versions),
        "run": tools.job.run,
    }


def summed(unit: Unit, standing: list[Standing], adopted: int, seconds: Seconds) -> UnitReport:
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
