"""The parts of a cache: what a commit holds about them, and the files that were read or written."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentmill.group_spans import GroupSpan
from pipeline.errors import REST_OF_SHARD
from pipeline.formats.part_record import BucketTally, PartRecord, check_counts
from pipeline.records import Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSummary:
    """The counts and statistics of a part. They can be read from the part's commit, without the part's file.

    bytes, groups: of its file.
    reject_counts: the number of rejects per reason. rest_positions: where the rest of a damaged shard is rejected.
    left_out: the tars that a group of tars left out, because they could not be read.
    """

    file: str
    bytes: int
    sha256: str
    groups: Sequence[GroupSpan]
    source: str
    rows: int
    filtered: Mapping[str, int]
    enlarged: int
    reject_counts: Mapping[str, int]
    rest_positions: Sequence[int]
    supersedes: Sequence[tuple[int, str]]
    tally: Mapping[str, BucketTally]
    left_out: Sequence[str] = ()

    @classmethod
    def from_commit(cls, entry: Mapping[str, Any]) -> "PartSummary":
        """Parse a part's entry in `_commits`. Raises KeyError, TypeError or AttributeError if it is not one."""
        check_counts(entry["filtered"])
        names = ("file", "bytes", "sha256", "source", "rows", "filtered", "enlarged")
        return cls(
            **{name: entry[name] for name in names},
            groups=[GroupSpan(*group) for group in entry["groups"]],
            reject_counts=entry["rejects"],
            rest_positions=entry.get("rests", ()),
            supersedes=entry.get("supersedes", ()),
            tally={name: BucketTally(**tally) for name, tally in entry["tally"].items()},
            left_out=entry.get("left_out", ()),
        )


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A part in the cache whose file was read or written: its record, and the file's name, size, sha256 and groups."""

    record: PartRecord
    file: str
    bytes: int
    sha256: str
    groups: Sequence[GroupSpan] = ()

    @property
    def summary(self) -> PartSummary:
        """The same summary that the part's entry in `_commits` gives."""
        record = self.record
        return PartSummary(
            file=self.file,
            bytes=self.bytes,
            sha256=self.sha256,
            groups=self.groups,
            source=record.source,
            rows=record.rows,
            filtered=record.filtered,
            enlarged=record.enlarged,
            reject_counts=record.reject_counts,
            rest_positions=record.rest_positions,
            supersedes=record.supersedes,
            tally=record.tally,
            left_out=record.left_out,
        )

    def to_commit_entry(self) -> dict[str, Any]:
        """Return the part's entry in `_commits`: the record, but with counts and rest positions instead of rejects."""
        fields = self.record.to_dict()
        fields["rejects"], fields["rests"] = self.record.reject_counts, self.record.rest_positions
        groups = [list(group) for group in self.groups]
        return {**fields, "file": self.file, "bytes": self.bytes, "sha256": self.sha256, "groups": groups}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReport:
    """The report of a finished unit to the driver. It has counts, never pixels.

    adopted: parts that existed already. encoded: rows of the other parts. fp32_fallbacks: images that overflowed in
    half precision and were encoded again in float32. texts: by text column, how many encoded rows have a text.
    damage: the error of a damaged shard whose rest was rejected; otherwise empty.
    precision_error: the relative error that the worker's self-check found, 0 if it computes in float32 on a CPU.
    skipped: the number of inputs that are not part of a sample, by kind (`jobs.skipped_inputs`).
    elapsed: seconds from the unit's start on its worker to its commit; 0 if another job had finished it.
    summaries: the unit's parts, for the commit log.
    """

    unit: str
    samples: int = 0
    rows: int = 0
    filtered: Mapping[str, int] = field(default_factory=dict)
    enlarged: int = 0
    rejects: Mapping[str, int] = field(default_factory=dict)
    parts: int = 0
    adopted: int = 0
    encoded: int = 0
    fp32_fallbacks: int = 0
    texts: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0
    damage: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)
    precision_error: float = 0.0
    seconds: Seconds = field(default_factory=Seconds)
    elapsed: float = 0.0
    summaries: Sequence[PartSummary] = ()


def find_unread_rests(records: Iterable[PartRecord]) -> dict[str, set[int]]:
    """Return, per unit, the positions from which its input was never read.

    These are the rejects `rest_of_shard` that no retry part supersedes.
    """
    rests, superseded = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
    for record in records:
        rests[record.unit].update(record.rest_positions)
        superseded[record.unit].update(position for position, reason in record.supersedes if reason == REST_OF_SHARD)
    return {unit: unread for unit, positions in rests.items() if (unread := positions - superseded[unit])}
