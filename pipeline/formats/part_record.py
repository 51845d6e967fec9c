"""The record inside a part's file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.canonical_json import canonical_json
from pipeline.errors import REST_OF_SHARD
from pipeline.records import Reject


@dataclass(slots=True)
class BucketTally:
    """Running statistics of the latents of one bucket, in float64. Each list has one entry per channel.

    If the cache stores moments, these are statistics of the posterior means, and `variance` is the mean of the
    posterior variances. Otherwise `variance` is None.
    """

    samples: int
    values: int
    mean: list[float]
    m2: list[float]
    min: list[float]
    max: list[float]
    variance: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a record, without `variance` if it is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def format_part_stem(unit: str, number: int, round: int = 0) -> str:
    """Return the file name of a part, without its folder and extension. round: of a retry part; otherwise 0."""
    return f"{unit}-{number:05d}" + (f"r{round}" if round else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """The record inside a part's file: the input of the part, and its counts. It does not depend on the run.

    inputs: sha256 over the part's samples as they were read (`pipeline.cache.input_hash`).
    left_out: of a group of tars, those that could not be read before the part's end: they have no positions.
    round, supersedes: only of a retry part, which `retry` writes beside the part of the same number. `round` is the
    number of the retry. `supersedes` lists the rejects that no longer count, as position and reason. The records of
    other parts leave both fields out.
    """

    format: int
    identity: str
    unit: str
    part: int
    last: bool
    source: str
    source_bytes: int
    range: tuple[int, int] | None
    first: int
    samples: int
    rows: int
    filtered: Mapping[str, int]
    enlarged: int
    inputs: str
    rejects: tuple[Reject, ...]
    tally: Mapping[str, BucketTally]
    left_out: tuple[str, ...] = ()
    round: int = 0
    supersedes: tuple[tuple[int, str], ...] = ()

    @property
    def stem(self) -> str:
        """The file name of the part, without its folder and extension."""
        return format_part_stem(self.unit, self.part, self.round)

    @property
    def positions(self) -> list[int]:
        """The positions that the part accounts for, in order.

        A retry part accounts for the rejects that it supersedes. If it supersedes a `rest_of_shard`, its other samples
        follow one another from the position of that reject on.
        """
        if not self.round:
            return list(range(self.first, self.first + self.samples))
        solved = [position for position, reason in self.supersedes if reason != REST_OF_SHARD]
        starts = [position for position, reason in self.supersedes if reason == REST_OF_SHARD]
        rest = [start + number for start in starts[:1] for number in range(self.samples - len(solved))]
        return sorted(solved + rest)

    @property
    def sample_positions(self) -> list[int]:
        """The positions of the part's samples. The rest of a damaged shard is not a sample."""
        rests = set(self.rest_positions)
        return [position for position in self.positions if position not in rests]

    @property
    def reject_counts(self) -> dict[str, int]:
        """The number of rejects per reason, sorted by reason."""
        reasons = [reject.reason for reject in self.rejects]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}

    @property
    def rest_positions(self) -> list[int]:
        """The positions from which the rest of a damaged shard is rejected."""
        return [reject.position for reject in self.rejects if reject.reason == REST_OF_SHARD]

    def describe_rejects(self) -> list[dict[str, Any]]:
        """Return the rejects as plain values. They have their shard if it is not the part's source."""
        rejects = [asdict(reject) for reject in self.rejects]
        for reject in rejects:
            if reject["shard"] in ("", self.source):
                del reject["shard"]
        return rejects

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        tally = {bucket: tally.to_dict() for bucket, tally in self.tally.items()}
        fields = asdict(self) | {"tally": tally, "rejects": self.describe_rejects()}
        if not self.left_out:
            del fields["left_out"]
        if not self.round:
            del fields["round"], fields["supersedes"]
        return fields

    def to_json(self) -> bytes:
        """Return the record as canonical JSON, for the part's file."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, text: bytes) -> "PartRecord":
        """Parse a record. Raises ValueError, KeyError or TypeError if the text is not a record."""
        fields = json.loads(text)
        check_counts(fields["filtered"])
        fields["range"] = tuple(fields["range"]) if fields["range"] else None
        fields["rejects"] = tuple(Reject(**reject) for reject in fields["rejects"])
        fields["tally"] = {bucket: BucketTally(**tally) for bucket, tally in fields["tally"].items()}
        fields["supersedes"] = tuple((position, reason) for position, reason in fields.get("supersedes", ()))
        fields["left_out"] = tuple(fields.get("left_out", ()))
        return cls(**fields)


def check_counts(counts: object) -> None:
    """Raise TypeError unless these are counts by name, of 1 or more, such as the `filtered` of a record."""
    if not isinstance(counts, Mapping) or not all(type(count) is int and count > 0 for count in counts.values()):
        raise TypeError(f"counts by name are expected, not {counts!r:.200}")
