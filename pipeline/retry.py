"""Rejected samples once more: what now succeeds becomes a further part beside the one that rejected it.

That helps where limits were raised, or a library learned to open what it could not. Nothing that stands is changed:
`<unit>-<part>r1` names the rejects that it supersedes, and what counts as rejected is what no such part supersedes.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline import commit
from pipeline.careful import Opener
from pipeline.encode import Vae
from pipeline.errors import REST
from pipeline.flow import Clock, EncodeJob, Encoder, Tools, fill, make_record, read, summed, to_the_damage, watched
from pipeline.records import FIRST, Attempt, Reject, Sample, Standing, Unit, UnitReport


@dataclass(frozen=True, slots=True)
class RetryTask:
    """The rejects of a unit that count.

    rejected: reasons by part and position. rounds: how many retries stand of each part.
    """

    unit: Unit
    rejected: Mapping[int, Mapping[int, str]]
    rounds: Mapping[int, int]

    @property
    def name(self) -> str:
        return self.unit.name


def tasks(units: Iterable[Unit], parts: Iterable[Standing]) -> list[RetryTask]:
    """What there is to retry. parts: all that stand, retries too."""
    rejected: dict[str, dict[int, dict[int, str]]] = {}
    rounds: dict[str, dict[int, int]] = {}
    for part in sorted(parts, key=lambda part: part.record.round):
        record = part.record
        mine = rejected.setdefault(record.unit, {}).setdefault(record.part, {})
        mine |= {reject.position: reject.reason for reject in record.rejects if reject.reason != REST}
        for position, _ in record.supersedes:
            mine.pop(position, None)
        rounds.setdefault(record.unit, {})[record.part] = record.round
    found = []
    for unit in units:
        left = {part: dict(mine) for part, mine in rejected.get(unit.name, {}).items() if mine}
        if left:
            found.append(RetryTask(unit, left, rounds[unit.name]))
    return found


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
            return retry(task, replace(tools, open_pixels=opener.open_pixels))

    @property
    def pictures(self) -> int:
        """Pictures encoded so far."""
        return self.encoder.pictures

    @property
    def steps(self) -> int:
        """What moves as long as anything does."""
        return self.encoder.steps


def noted(samples: Iterable[Sample | Reject], positions: set[int]) -> Iterator[Sample | Reject]:
    """The same samples, their positions put aside: an input may have fewer than it had."""
    for sample in samples:
        positions.add(sample.position)
        yield sample


def retry(task: RetryTask, tools: Tools) -> UnitReport:
    """Encode what now succeeds of a unit's rejects, a part for each part that has any."""
    job, clock, unit = tools.job, Clock(), task.unit
    wanted = {position for rejects in task.rejected.values() for position in rejects}
    readable = to_the_damage(read(unit, job, mended=range(len(unit.paths))), [])
    samples = (sample for sample in watched(readable, tools, clock) if sample.position in wanted)
    standing: list[Standing] = []
    for number, some in itertools.groupby(samples, key=lambda sample: sample.position // job.rows_per_part):
        read_again: set[int] = set()
        filled = fill(unit, noted(some, read_again), tools, clock, {})
        solved = read_again - {reject.position for reject in filled.rejects}
        superseded = tuple(sorted((p, why) for p, why in task.rejected[number].items() if p in solved))
        filled.rejects.clear()
        if not superseded:
            continue
        record = replace(
            make_record(unit, number, filled, last=False, tools=tools),
            first=superseded[0][0],
            round=task.rounds[number] + 1,
            supersedes=superseded,
        )
        with clock.stage("write"):
            standing.append(commit.publish(job.cache, record, filled.rows, job.layout))
            commit.finish(job.cache, standing[-1:])
    return summed(unit, standing, 0, clock.seconds)
