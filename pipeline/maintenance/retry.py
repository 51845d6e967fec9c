"""Rejected samples once more: what now succeeds becomes a further part beside the one that rejected it.

That helps where limits were raised, a library learned to open what it could not, or a damaged shard was restored.
Nothing that stands is changed: `<unit>-<part>r1` names the rejects that it supersedes, and what counts as rejected is
what no such part supersedes. The rest of a damaged shard is taken up part by part; each of these parts ends with a
`rest_of_shard` of its own where more follows, so that the rest is done only when all of it is.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from pipeline.cache import commits, input_hash
from pipeline.cache.parts import find_part, publish_part
from pipeline.errors import REST_OF_SHARD, ShardError, SourceError, StorageError
from pipeline.flow import (
    EncodeSpec,
    PartBuffer,
    UnitWorker,
    WorkerContext,
    fill_part,
    instrument,
    make_record,
    make_report,
    read_samples,
)
from pipeline.formats.record import PartInfo, Record
from pipeline.images.sandbox import SandboxedDecoder
from pipeline.prefetch import Peekable
from pipeline.readers.damage import ReadableSamples, reject_rest
from pipeline.records import FIRST_ATTEMPT, Attempt, Reject, Sample, Unit, UnitReport
from pipeline.storage import reading
from pipeline.timing import StageTimer
from pipeline.weights import Vae


@dataclass(frozen=True, slots=True)
class RetryTask:
    """A unit with rejects that count.

    rejected, superseded: by all of its parts, as position and reason. rounds: how many retries stand of each part.
    rests: the records of those that have a part of what followed a damage. any_size: whether the input may have another
    size than it was planned with.
    """

    unit: Unit
    rejected: Set[tuple[int, str]]
    superseded: Set[tuple[int, str]]
    rounds: Mapping[int, int]
    rests: Sequence[Record]
    any_size: bool

    @property
    def name(self) -> str:
        return self.unit.name


def make_tasks(units: Iterable[Unit], parts: Iterable[PartInfo], begun: Set[str] = frozenset()) -> list[RetryTask]:
    """What there is to retry. parts: all that have rejects or that a retry wrote.

    begun: paths of the inputs of which anything was read before a damage.
    """
    by_unit: dict[str, list[Record]] = {}
    for part in parts:
        by_unit.setdefault(part.record.unit, []).append(part.record)
    found = []
    for unit in units:
        records = by_unit.get(unit.name, [])
        rejected = {(reject.position, reject.reason) for record in records for reject in record.rejects}
        superseded = {pair for record in records for pair in record.supersedes}
        rounds: dict[int, int] = {}
        for record in records:
            rounds[record.part] = max(record.round, rounds.get(record.part, 0))
        if rejected - superseded:
            # which range of a Parquet file has which rows depends on its size
            any_size = unit.range in (None, (0, 1)) or unit.path not in begun
            rests = [
                replace(record, tally={})
                for record in records
                if REST_OF_SHARD in {why for _, why in record.supersedes}
            ]
            found.append(RetryTask(unit, rejected, superseded, rounds, rests, any_size))
    return found


class RemainingRejects:
    """What is left to retry of a unit, while parts are written.

    reasons: of single samples, by position. rest: where the rest of a damaged shard begins. until: where it ends,
    because a part has what follows. end: the position after the last sample that was read.
    """

    def __init__(self, task: RetryTask) -> None:
        self.rejected, self.superseded, self.rounds = set(task.rejected), set(task.superseded), dict(task.rounds)
        self.end = 0
        self._count()

    def take(self, record: Record) -> None:
        """Take in what a part has that a retry wrote."""
        self.rejected |= {(reject.position, reject.reason) for reject in record.rejects}
        self.superseded |= set(record.supersedes)
        self.rounds[record.part] = record.round
        self._count()

    def _count(self) -> None:
        left = self.rejected - self.superseded
        self.reasons = {position: reason for position, reason in left if reason != REST_OF_SHARD}
        self.rest = min((position for position, reason in left if reason == REST_OF_SHARD), default=None)
        taken = [position for position, reason in self.superseded if reason == REST_OF_SHARD]
        self.until = min((p for p in taken if self.rest is not None and p > self.rest), default=None)

    def is_in_rest(self, position: int) -> bool:
        return self.rest is not None and self.rest <= position and (self.until is None or position <= self.until)

    def wants(self, item: Sample | Reject) -> bool:
        """Whether a sample is to be tried: not the rest of a shard that is damaged where it was."""
        still_damaged = item.position == self.rest and isinstance(item, Reject) and item.reason == REST_OF_SHARD
        return item.position in self.reasons or (self.is_in_rest(item.position) and not still_damaged)

    def next_round(self, number: int) -> int:
        return self.rounds.get(number, 0) + 1


@dataclass(frozen=True, slots=True)
class RetrySpec:
    """What a worker must know; `build` makes the tools on arrival."""

    spec: EncodeSpec

    def build(self, vae: Vae, stop: threading.Event) -> "RetryWorker":
        """The worker, its replica loaded."""
        return RetryWorker(self.spec.build(vae, stop))

    def with_smaller_slices(self) -> "RetrySpec":
        """The same job for less memory."""
        return RetrySpec(self.spec.with_smaller_slices())


class RetryWorker:
    """A worker that tries rejects again. Threads may call `run` together."""

    def __init__(self, encoder: UnitWorker) -> None:
        self.encoder = encoder

    def run(self, task: RetryTask, attempt: Attempt = FIRST_ATTEMPT) -> UnitReport:
        """Always carefully: an image may have been rejected because it ended a process."""
        context = self.encoder.context
        with SandboxedDecoder(context.spec.limits) as opener:
            return retry_unit(task, replace(context, open_pixels=opener.open_pixels, damaged_at=attempt.damaged_at))

    @property
    def images(self) -> int:
        """Images encoded so far."""
        return self.encoder.images

    @property
    def steps(self) -> int:
        """What moves as long as anything does."""
        return self.encoder.steps


def select_rejects(samples: Iterable[Sample | Reject], left: RemainingRejects) -> Iterator[Sample | Reject]:
    """Those of a unit's samples that are to be tried; where another part goes on, one reject for the rest."""
    for sample in samples:
        left.end = sample.position + 1
        if left.wants(sample):
            yield reject_rest(sample.position) if sample.position == left.until else sample


def samples_of_part(
    samples: Peekable[Sample | Reject], number: int, size: int, left: RemainingRejects
) -> Iterator[Sample | Reject]:
    """The next samples, as long as they are of this part and still to be tried."""
    while (sample := samples.peek()) is not None and sample.position // size == number:
        next(samples)
        if left.wants(sample):
            yield sample


def record_positions(samples: Iterable[Sample | Reject], positions: list[int]) -> Iterator[Sample | Reject]:
    """The same samples, their positions put aside: an input may have fewer than it had."""
    for sample in samples:
        positions.append(sample.position)
        yield sample


def retry_unit(task: RetryTask, context: WorkerContext) -> UnitReport:
    """Encode what now succeeds of a unit's rejects, a part for each part that has any."""
    spec, clock, left = context.spec, StageTimer(), RemainingRejects(task)
    readable, checked = read_for_retry(task, context)
    samples = Peekable(select_rejects(instrument(checked, context, clock), left))
    standing: list[PartInfo] = []

    def write(number: int, filled: PartBuffer, positions: list[int]) -> None:
        if record := make_retry_record(task.unit, number, filled, positions, left, samples.peek(), context):
            with clock.stage("write"):
                standing.append(publish_retry_part(record, filled, left, spec))

    while (first := samples.peek()) is not None:
        number = first.position // spec.rows_per_part
        take_existing_parts(task.unit, number, left, spec)
        positions: list[int] = []
        some = samples_of_part(samples, number, spec.rows_per_part, left)
        filled = fill_part(task.unit, record_positions(some, positions), context, clock, {})
        if positions:
            write(number, filled, positions)
    if left.rest is not None and not readable.damage:
        if left.end < left.rest:
            raise ShardError(f"{task.unit.url} has {left.end} samples, but {left.rest} were read before its damage")
        take_existing_parts(task.unit, left.rest // spec.rows_per_part, left, spec)
        if left.rest is not None:  # nothing follows where it was damaged
            write(left.rest // spec.rows_per_part, PartBuffer(), [])
    return make_report(task.unit, standing, 0, clock.seconds)


def read_for_retry(task: RetryTask, context: WorkerContext) -> tuple[ReadableSamples, Iterable[Sample | Reject]]:
    """Return the samples of a task's unit, as its input is now, and the same samples with a check.

    The check raises an error if the input does not have the samples from which the other parts were made.
    """
    unit, spec = task.unit, context.spec
    now = reading.current_version(unit, spec.source_options)
    is_as_planned = (now.bytes, now.etag) == (unit.bytes, unit.etag or now.etag)
    if not is_as_planned and now.bytes != unit.bytes and not task.any_size:
        raise SourceError(
            f"{unit.url} has {now.bytes} bytes, {unit.bytes} when it was planned: its ranges would have other rows; "
            "encode it into another cache"
        )
    samples = read_samples(now, spec, on_piece=context.on_piece, may_differ=range(len(unit.paths)))
    readable = ReadableSamples(samples, context.damaged_at)
    if is_as_planned:
        return readable, readable
    parts = commits.inspect_committed(spec.cache, unit.name, spec.identity, spec.layout.container)
    records = [*(part.record for part in parts), *task.rests]
    return readable, input_hash.check_inputs(iter(readable), records, unit.url)


def take_existing_parts(unit: Unit, number: int, left: RemainingRejects, spec: EncodeSpec) -> None:
    """Take in the parts of this number that were written since the task was made: by another worker, or an attempt."""
    form = spec.layout.container
    while part := find_part(spec.cache, unit.name, number, spec.identity, form, left.next_round(number)):
        left.take(part.record)


def make_retry_record(
    unit: Unit,
    number: int,
    filled: PartBuffer,
    positions: list[int],
    left: RemainingRejects,
    following: Sample | Reject | None,
    context: WorkerContext,
) -> Record | None:
    """The record of what has succeeded; None where nothing has. What has not is taken out of `filled`.

    positions: of the samples that were tried. following: the next one that will be.
    """
    failed = {reject.position for reject in filled.rejects}
    superseded = [(p, left.reasons[p]) for p in positions if p in left.reasons and p not in failed]
    rest = [position for position in positions if left.is_in_rest(position)]
    if left.rest is not None and (rest or not positions):
        superseded.append((left.rest, REST_OF_SHARD))
        if following is not None and left.is_in_rest(following.position):
            chained = reject_rest(following.position)
            filled.rejects.append(chained)
            filled.digests[chained.position] = input_hash.hash_sample(chained)
            rest.append(chained.position)
    if not superseded:
        return None
    kept = {position for position, _ in superseded if position in filled.digests} | set(rest)
    filled.rejects = [reject for reject in filled.rejects if reject.position in rest]
    filled.digests = {position: digest for position, digest in filled.digests.items() if position in kept}
    return replace(
        make_record(unit, number, filled, last=False, context=context),
        first=min(position for position, _ in superseded),
        round=left.next_round(number),
        supersedes=tuple(sorted(superseded)),
    )


def publish_retry_part(record: Record, filled: PartBuffer, left: RemainingRejects, spec: EncodeSpec) -> PartInfo:
    """Write a part and its commit. Raises StorageError where another retry was first with one of other samples."""
    part = publish_part(spec.cache, record, filled.rows, spec.layout)
    commits.write_commit(spec.cache, [part])
    if (part.record.positions, part.record.supersedes) != (record.positions, record.supersedes):
        raise StorageError(f"{spec.cache.at(part.file)} was written by another retry, of other samples")
    left.take(part.record)
    return part
