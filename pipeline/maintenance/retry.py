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
from pipeline.cache.parts import find, publish
from pipeline.clock import Clock
from pipeline.errors import REST, ShardError, SourceError, StorageError
from pipeline.flow import EncodeJob, Encoder, Filled, Tools, fill, make_record, read, summed, watched
from pipeline.formats.record import Record, Standing
from pipeline.images.sandbox import Opener
from pipeline.prefetch import Peekable
from pipeline.readers.damage import rest_from, to_the_damage
from pipeline.records import FIRST, Attempt, Reject, Sample, Unit, UnitReport
from pipeline.storage import store
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


def tasks(units: Iterable[Unit], parts: Iterable[Standing], begun: Set[str] = frozenset()) -> list[RetryTask]:
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
            rests = [replace(record, tally={}) for record in records if REST in {why for _, why in record.supersedes}]
            found.append(RetryTask(unit, rejected, superseded, rounds, rests, any_size))
    return found


class Left:
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
        self.reasons = {position: reason for position, reason in left if reason != REST}
        self.rest = min((position for position, reason in left if reason == REST), default=None)
        taken = [position for position, reason in self.superseded if reason == REST]
        self.until = min((p for p in taken if self.rest is not None and p > self.rest), default=None)

    def is_in_rest(self, position: int) -> bool:
        return self.rest is not None and self.rest <= position and (self.until is None or position <= self.until)

    def wants(self, item: Sample | Reject) -> bool:
        """Whether a sample is to be tried: not the rest of a shard that is damaged where it was."""
        still_damaged = item.position == self.rest and isinstance(item, Reject) and item.reason == REST
        return item.position in self.reasons or (self.is_in_rest(item.position) and not still_damaged)

    def next_round(self, number: int) -> int:
        return self.rounds.get(number, 0) + 1


@dataclass(frozen=True, slots=True)
class RetryJob:
    """What a worker must know; `build` makes the tools on arrival."""

    job: EncodeJob

    def build(self, vae: Vae, stop: threading.Event) -> "Retrier":
        """The worker, its replica loaded."""
        return Retrier(self.job.build(vae, stop))

    def in_smaller_slices(self) -> "RetryJob":
        """The same job for less memory."""
        return RetryJob(self.job.in_smaller_slices())


class Retrier:
    """A worker that tries rejects again. Threads may call `run` together."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def run(self, task: RetryTask, attempt: Attempt = FIRST) -> UnitReport:
        """Always carefully: a picture may have been rejected because it ended a process."""
        tools = self.encoder.tools
        with Opener(tools.job.limits) as opener:
            return retry(task, replace(tools, open_pixels=opener.open_pixels, damaged_at=attempt.damaged_at))

    @property
    def pictures(self) -> int:
        """Pictures encoded so far."""
        return self.encoder.pictures

    @property
    def steps(self) -> int:
        """What moves as long as anything does."""
        return self.encoder.steps


def wanted(samples: Iterable[Sample | Reject], left: Left) -> Iterator[Sample | Reject]:
    """Those of a unit's samples that are to be tried; where another part goes on, one reject for the rest."""
    for sample in samples:
        left.end = sample.position + 1
        if left.wants(sample):
            yield rest_from(sample.position) if sample.position == left.until else sample


def of_part(samples: Peekable[Sample | Reject], number: int, size: int, left: Left) -> Iterator[Sample | Reject]:
    """The next samples, as long as they are of this part and still to be tried."""
    while (sample := samples.peek()) is not None and sample.position // size == number:
        next(samples)
        if left.wants(sample):
            yield sample


def noted(samples: Iterable[Sample | Reject], positions: list[int]) -> Iterator[Sample | Reject]:
    """The same samples, their positions put aside: an input may have fewer than it had."""
    for sample in samples:
        positions.append(sample.position)
        yield sample


def retry(task: RetryTask, tools: Tools) -> UnitReport:
    """Encode what now succeeds of a unit's rejects, a part for each part that has any."""
    job, clock, left = tools.job, Clock(), Left(task)
    damage: list[str] = []
    samples = Peekable(wanted(watched(reading(task, tools, damage), tools, clock), left))
    standing: list[Standing] = []

    def write(number: int, filled: Filled, positions: list[int]) -> None:
        if record := record_of(task.unit, number, filled, positions, left, samples.peek(), tools):
            with clock.stage("write"):
                standing.append(published(record, filled, left, job))

    while (first := samples.peek()) is not None:
        number = first.position // job.rows_per_part
        adopt(task.unit, number, left, job)
        positions: list[int] = []
        some = of_part(samples, number, job.rows_per_part, left)
        filled = fill(task.unit, noted(some, positions), tools, clock, {})
        if positions:
            write(number, filled, positions)
    if left.rest is not None and not damage:
        if left.end < left.rest:
            raise ShardError(f"{task.unit.url} has {left.end} samples, but {left.rest} were read before its damage")
        adopt(task.unit, left.rest // job.rows_per_part, left, job)
        if left.rest is not None:  # nothing follows where it was damaged
            write(left.rest // job.rows_per_part, Filled(), [])
    return summed(task.unit, standing, 0, clock.seconds)


def reading(task: RetryTask, tools: Tools, damage: list[str]) -> Iterator[Sample | Reject]:
    """The samples of a task's unit, as its input is now: if that has the samples of which the other parts were made."""
    unit, job = task.unit, tools.job
    now = store.as_it_is(unit, job.source_options)
    is_as_planned = (now.bytes, now.etag) == (unit.bytes, unit.etag or now.etag)
    if not is_as_planned and now.bytes != unit.bytes and not task.any_size:
        raise SourceError(
            f"{unit.url} has {now.bytes} bytes, {unit.bytes} when it was planned: its ranges would have other rows; "
            "encode it into another cache"
        )
    readable = read(now, job, on_piece=tools.on_piece, mended=range(len(unit.paths)))
    samples = to_the_damage(readable, tools.damaged_at, damage)
    if is_as_planned:
        return samples
    parts = commits.as_they_stand(job.cache, unit.name, job.identity, job.layout.container)
    return input_hash.proven(samples, [*(part.record for part in parts), *task.rests], unit.url)


def adopt(unit: Unit, number: int, left: Left, job: EncodeJob) -> None:
    """Take in the parts of this number that were written since the task was made: by another worker, or an attempt."""
    form = job.layout.container
    while part := find(job.cache, unit.name, number, job.identity, form, left.next_round(number)):
        left.take(part.record)


def record_of(
    unit: Unit,
    number: int,
    filled: Filled,
    positions: list[int],
    left: Left,
    following: Sample | Reject | None,
    tools: Tools,
) -> Record | None:
    """The record of what has succeeded; None where nothing has. What has not is taken out of `filled`.

    positions: of the samples that were tried. following: the next one that will be.
    """
    failed = {reject.position for reject in filled.rejects}
    superseded = [(p, left.reasons[p]) for p in positions if p in left.reasons and p not in failed]
    rest = [position for position in positions if left.is_in_rest(position)]
    if left.rest is not None and (rest or not positions):
        superseded.append((left.rest, REST))
        if following is not None and left.is_in_rest(following.position):
            chained = rest_from(following.position)
            filled.rejects.append(chained)
            filled.digests[chained.position] = input_hash.digest_of(chained)
            rest.append(chained.position)
    if not superseded:
        return None
    kept = {position for position, _ in superseded if position in filled.digests} | set(rest)
    filled.rejects = [reject for reject in filled.rejects if reject.position in rest]
    filled.digests = {position: digest for position, digest in filled.digests.items() if position in kept}
    return replace(
        make_record(unit, number, filled, last=False, tools=tools),
        first=min(position for position, _ in superseded),
        round=left.next_round(number),
        supersedes=tuple(sorted(superseded)),
    )


def published(record: Record, filled: Filled, left: Left, job: EncodeJob) -> Standing:
    """Write a part and its commit. Raises StorageError where another retry was first with one of other samples."""
    part = publish(job.cache, record, filled.rows, job.layout)
    commits.finish(job.cache, [part])
    if (part.record.positions, part.record.supersedes) != (record.positions, record.supersedes):
        raise StorageError(f"{job.cache.at(part.file)} was written by another retry, of other samples")
    left.take(part.record)
    return part
