"""Retry rejected samples. Samples that now succeed become a retry part, next to the part that rejected them.

A sample can succeed now because limits were raised, because a newer library decodes it, or because a damaged shard was
restored. Existing files are never changed. A retry part, such as `<unit>-<part>r1`, lists the rejects that it
supersedes. A reject counts until a retry part supersedes it.

The rest of a damaged shard is encoded part by part. Each of these parts ends with a `rest_of_shard` reject if more
samples follow. So the rest is done only when all its samples are encoded.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from pipeline.cache import commits, input_hash
from pipeline.cache.part_info import PartInfo, UnitReport
from pipeline.cache.parts import find_record, publish_part
from pipeline.errors import REST_OF_SHARD, ShardError, SourceError, StorageError
from pipeline.flow import EncodeSpec, UnitWorker, WorkerContext, instrument, make_report
from pipeline.formats.part_record import PartRecord
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.part_writer import PartBuffer, fill_part, make_record
from pipeline.prefetch import Peekable
from pipeline.readers.damage import ReadableSamples, reject_rest
from pipeline.readers.tar_group import leave_out
from pipeline.readers.unit import read_samples
from pipeline.records import FIRST_ATTEMPT, Attempt, Reject, Sample, Unit
from pipeline.sources.planned_files import fetch_current_version
from pipeline.timing import StageTimer
from pipeline.weights import Vae


@dataclass(frozen=True, slots=True)
class RetryTask:
    """A unit with rejects that count.

    rejected: the rejects of all its parts, as position and reason. superseded: the rejects that retry parts supersede.
    rounds: the number of the last retry, by part number.
    rests: the records of the retry parts that hold samples from the rest of a damaged shard.
    any_size: whether the input may have another size than planned.
    """

    unit: Unit
    rejected: Set[tuple[int, str]]
    superseded: Set[tuple[int, str]]
    rounds: Mapping[int, int]
    rests: Sequence[PartRecord]
    any_size: bool

    @property
    def name(self) -> str:
        """The name of the task in messages."""
        return self.unit.name


def make_tasks(
    units: Iterable[Unit], records: Iterable[PartRecord], started: Set[str] = frozenset()
) -> list[RetryTask]:
    """Return a task for each unit that has rejects to retry.

    records: of all parts that have rejects or that a retry wrote.
    started: the paths of the inputs from which the encode command read at least one sample.
    """
    records_by_unit: dict[str, list[PartRecord]] = {}
    for record in records:
        records_by_unit.setdefault(record.unit, []).append(record)
    tasks = []
    for unit in units:
        records = records_by_unit.get(unit.name, [])
        rejected = {(reject.position, reject.reason) for record in records for reject in record.rejects}
        superseded = {pair for record in records for pair in record.supersedes}
        rounds: dict[int, int] = {}
        for record in records:
            rounds[record.part] = max(record.round, rounds.get(record.part, 0))
        if rejected - superseded:
            # the size of a Parquet file decides which rows its ranges have; the plan has the ranges of a tar
            any_size = unit.range in (None, (0, 1)) or unit.kind == "tar" or unit.path not in started
            rests = [
                replace(record, tally={})
                for record in records
                if REST_OF_SHARD in {reason for _, reason in record.supersedes}
            ]
            tasks.append(RetryTask(leave_out(unit, records), rejected, superseded, rounds, rests, any_size))
    return tasks


class RemainingRejects:
    """The rejects of a unit that are still to be retried. It is updated with each retry part.

    reasons: why single samples were rejected, by position.
    rest: the position at which the unread rest of a damaged shard begins; None if there is no rest.
    until: the position at which that rest ends, because another part has the samples from there on; None otherwise.
    end: the position after the last sample that was read.
    """

    def __init__(self, task: RetryTask) -> None:
        self.rejected, self.superseded, self.rounds = set(task.rejected), set(task.superseded), dict(task.rounds)
        self.end = 0
        self._update()

    def add(self, record: PartRecord) -> None:
        """Add the rejects of a retry part, and the rejects that it supersedes."""
        self.rejected |= {(reject.position, reject.reason) for reject in record.rejects}
        self.superseded |= set(record.supersedes)
        self.rounds[record.part] = record.round
        self._update()

    def _update(self) -> None:
        remaining = self.rejected - self.superseded
        self.reasons = {position: reason for position, reason in remaining if reason != REST_OF_SHARD}
        self.rest = min((position for position, reason in remaining if reason == REST_OF_SHARD), default=None)
        read_rests = [position for position, reason in self.superseded if reason == REST_OF_SHARD]
        self.until = min((p for p in read_rests if self.rest is not None and p > self.rest), default=None)

    def is_in_rest(self, position: int) -> bool:
        """Return whether a position belongs to the unread rest of the shard, its end included."""
        return self.rest is not None and self.rest <= position and (self.until is None or position <= self.until)

    def should_retry(self, item: Sample | Reject) -> bool:
        """Return whether a sample is to be retried. It is not if the shard is still damaged at the same position."""
        is_still_damaged = item.position == self.rest and isinstance(item, Reject) and item.reason == REST_OF_SHARD
        return item.position in self.reasons or (self.is_in_rest(item.position) and not is_still_damaged)

    def next_round(self, number: int) -> int:
        """Return the number of the next retry of a part."""
        return self.rounds.get(number, 0) + 1


@dataclass(frozen=True, slots=True)
class RetrySpec:
    """All that a worker needs to retry units. It is small enough to be sent; `build` loads the model on arrival."""

    spec: EncodeSpec

    @property
    def tasks_per_worker(self) -> int:
        """The number of units that a worker retries at the same time."""
        return self.spec.tasks_per_worker

    def build(self, vae: Vae, stop: threading.Event) -> "RetryWorker":
        """Return the worker, with its model loaded. stop: set once the job is to stop."""
        return RetryWorker(self.spec.build(vae, stop))

    def for_node(self, cores: float) -> "RetrySpec":
        """Return the same job for a worker that may use this many cores of its node."""
        return RetrySpec(self.spec.for_node(cores))

    def with_smaller_batches(self) -> "RetrySpec":
        """Return the same job with smaller batches, which need less memory."""
        return RetrySpec(self.spec.with_smaller_batches())


class RetryWorker:
    """A worker that retries rejects. Several threads may call `run` at the same time."""

    def __init__(self, encoder: UnitWorker) -> None:
        self.encoder = encoder

    def run(self, task: RetryTask, attempt: Attempt = FIRST_ATTEMPT) -> UnitReport:
        """Retry a unit. Images are decoded in a separate process, because one may have crashed a worker before."""
        context = self.encoder.context
        with SandboxedDecoder(context.spec.limits) as decoder:
            return retry_unit(task, replace(context.with_decoder(decoder.open_pixels), damaged_at=attempt.damaged_at))

    @property
    def images(self) -> int:
        """Images encoded so far."""
        return self.encoder.images

    @property
    def steps(self) -> int:
        """A counter that increases whenever the worker makes progress."""
        return self.encoder.steps

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the model ran so far."""
        return self.encoder.busy_seconds


def select_rejects(samples: Iterable[Sample | Reject], remaining: RemainingRejects) -> Iterator[Sample | Reject]:
    """Yield the samples of a unit that are to be retried.

    If another part has the samples from some position on, a `rest_of_shard` reject is yielded at that position.
    """
    for sample in samples:
        remaining.end = sample.position + 1
        if remaining.should_retry(sample):
            yield reject_rest(sample.position) if sample.position == remaining.until else sample


def take_samples_of_part(
    samples: Peekable[Sample | Reject], number: int, size: int, remaining: RemainingRejects
) -> Iterator[Sample | Reject]:
    """Yield the next samples of this part that are still to be retried. size: the number of samples per part."""
    while (sample := samples.peek()) is not None and sample.position // size == number:
        next(samples)
        if remaining.should_retry(sample):
            yield sample


def record_positions(samples: Iterable[Sample | Reject], positions: list[int]) -> Iterator[Sample | Reject]:
    """Yield the same samples, and append their positions. An input may have fewer samples than before."""
    for sample in samples:
        positions.append(sample.position)
        yield sample


def retry_unit(task: RetryTask, context: WorkerContext) -> UnitReport:
    """Encode the rejects of a unit that now succeed: one retry part for each part that has such rejects."""
    spec, timer, remaining = context.spec, StageTimer(), RemainingRejects(task)
    readable, checked = read_for_retry(task, context)
    samples = Peekable(select_rejects(instrument(checked, context, timer), remaining))
    parts: list[PartInfo] = []

    def write(number: int, buffer: PartBuffer, positions: list[int]) -> None:
        if record := make_retry_record(task.unit, number, buffer, positions, remaining, samples.peek(), context):
            with timer.stage("write"):
                parts.append(publish_retry_part(record, buffer, remaining, spec))

    while (first := samples.peek()) is not None:
        number = first.position // spec.rows_per_part
        add_existing_parts(task.unit, number, remaining, spec)
        positions: list[int] = []
        part_samples = take_samples_of_part(samples, number, spec.rows_per_part, remaining)
        buffer = fill_part(task.unit, record_positions(part_samples, positions), spec, context.stages, timer, {})
        if positions:
            write(number, buffer, positions)
    if remaining.rest is not None and not readable.damage:
        if remaining.end < remaining.rest:
            raise ShardError(
                f"{task.unit.url} has {remaining.end} samples, but {remaining.rest} were read before it was damaged; "
                "restore the input"
            )
        add_existing_parts(task.unit, remaining.rest // spec.rows_per_part, remaining, spec)
        if remaining.rest is not None:  # no sample follows the damage
            write(remaining.rest // spec.rows_per_part, PartBuffer(), [])
    report = make_report(task.unit, [part.to_commit_entry() for part in parts], 0, timer.seconds)
    return replace(report, encoded=report.rows)


def read_for_retry(task: RetryTask, context: WorkerContext) -> tuple[ReadableSamples, Iterable[Sample | Reject]]:
    """Return the samples of a task's unit, as its input is now, and the same samples with a check.

    The check raises an error if the input does not have the samples from which the other parts were made.
    """
    unit, spec = task.unit, context.spec
    current = fetch_current_version(unit, spec.source_options)
    is_as_planned = (current.bytes, current.etag) == (unit.bytes, unit.etag or current.etag)
    if not is_as_planned and current.bytes != unit.bytes and not task.any_size:
        raise SourceError(
            f"{unit.url} has {current.bytes} bytes, but had {unit.bytes} when it was planned: its ranges would have "
            "other rows; encode it into another cache"
        )
    samples = read_samples(current, spec, on_piece=context.on_piece, may_differ=range(len(unit.paths)))
    readable = ReadableSamples(samples, context.damaged_at)
    if is_as_planned:
        return readable, readable
    parts = commits.inspect_committed(spec.cache, unit.name, spec.identity_sha256, spec.layout.container)
    records = [*(part.record for part in parts), *task.rests]
    return readable, input_hash.check_inputs(iter(readable), records, unit.url)


def add_existing_parts(unit: Unit, number: int, remaining: RemainingRejects, spec: EncodeSpec) -> None:
    """Add retry parts of this number that were written since the task was made, by another worker or attempt."""
    container = spec.layout.container
    while record := find_record(
        spec.cache, unit.name, number, spec.identity_sha256, container, remaining.next_round(number)
    ):
        remaining.add(record)


def make_retry_record(
    unit: Unit,
    number: int,
    buffer: PartBuffer,
    positions: list[int],
    remaining: RemainingRejects,
    following: Sample | Reject | None,
    context: WorkerContext,
) -> PartRecord | None:
    """Return the record of the samples that succeeded, or None if none did. Other samples are removed from `buffer`.

    positions: of the retried samples. following: the next sample to retry, if any.
    """
    failed = {reject.position for reject in buffer.rejects}
    superseded = [(p, remaining.reasons[p]) for p in positions if p in remaining.reasons and p not in failed]
    rest = [position for position in positions if remaining.is_in_rest(position)]
    if remaining.rest is not None and (rest or not positions):
        superseded.append((remaining.rest, REST_OF_SHARD))
        if following is not None and remaining.is_in_rest(following.position):
            next_rest = reject_rest(following.position)
            buffer.rejects.append(next_rest)
            buffer.digests[next_rest.position] = input_hash.hash_sample(next_rest)
            rest.append(next_rest.position)
    if not superseded:
        return None
    accounted = {position for position, _ in superseded if position in buffer.digests} | set(rest)
    buffer.rejects = [reject for reject in buffer.rejects if reject.position in rest]
    buffer.digests = {position: digest for position, digest in buffer.digests.items() if position in accounted}
    return replace(
        make_record(unit, number, buffer, False, context.spec, tuple(sorted(unit.left_out))),
        first=min(position for position, _ in superseded),
        round=remaining.next_round(number),
        supersedes=tuple(sorted(superseded)),
    )


def publish_retry_part(
    record: PartRecord, buffer: PartBuffer, remaining: RemainingRejects, spec: EncodeSpec
) -> PartInfo:
    """Write a retry part and its commit. Raises StorageError if another retry wrote the part with other samples."""
    part = publish_part(spec.cache, record, buffer.take_rows(), spec.layout)
    commits.write_commit(spec.cache, [part])
    if (part.record.positions, part.record.supersedes) != (record.positions, record.supersedes):
        raise StorageError(f"another retry wrote {spec.cache.url_of(part.file)} with other samples; run retry again")
    remaining.add(part.record)
    return part
