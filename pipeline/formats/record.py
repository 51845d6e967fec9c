"""What a part says of itself, inside its own file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.canonical_json import canonical_json
from pipeline.errors import REST_OF_SHARD

if TYPE_CHECKING:  # two seconds, which `latentmill --help` need not take
    pass


from collections import defaultdict
from collections.abc import Iterable

from pipeline.records import Reject


@dataclass(slots=True)
class BucketTally:
    """Running statistics of the latents of one bucket, a list entry a channel, in float64.

    Where moments are stored: of the means; `variance` is the mean of the variances then, and None else.
    """

    samples: int
    values: int
    mean: list[float]
    m2: list[float]
    min: list[float]
    max: list[float]
    variance: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a record holds it: without `variance` where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a part says of itself, inside its own file. Nothing in it depends on the run.

    inputs: sha256 over the part's samples as they were read (`pipeline.cache.input_hash`).
    round, supersedes: of a part that `retry` wrote beside the one of its number: which retry it was, and the rejects
    that do not count any more, as position and reason. Both are left out of other parts' records.
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
    filtered: int
    enlarged: int
    inputs: str
    rejects: tuple[Reject, ...]
    tally: Mapping[str, BucketTally]
    round: int = 0
    supersedes: tuple[tuple[int, str], ...] = ()

    @property
    def stem(self) -> str:
        """The file name of the part, without its folder and extension."""
        return f"{self.unit}-{self.part:05d}" + (f"r{self.round}" if self.round else "")

    @property
    def positions(self) -> list[int]:
        """Those that the part accounts for, in order. Of a part that `retry` wrote: of the rejects that it supersedes,
        and, where a `rest_of_shard` is among them, as many from there on as it has samples."""
        if not self.round:
            return list(range(self.first, self.first + self.samples))
        solved = [position for position, reason in self.supersedes if reason != REST_OF_SHARD]
        starts = [position for position, reason in self.supersedes if reason == REST_OF_SHARD]
        rest = [start + number for start in starts[:1] for number in range(self.samples - len(solved))]
        return sorted(solved + rest)

    @property
    def counted(self) -> list[int]:
        """The positions of its samples: a damaged shard's rest is none."""
        rests = {reject.position for reject in self.rejects if reject.reason == REST_OF_SHARD}
        return [position for position in self.positions if position not in rests]

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self) | {"tally": {bucket: tally.to_dict() for bucket, tally in self.tally.items()}}
        if not self.round:
            del fields["round"], fields["supersedes"]
        return fields

    def to_json(self) -> bytes:
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, text: bytes) -> "Record":
        """Raises ValueError, KeyError or TypeError for what is not a record."""
        fields = json.loads(text)
        fields["range"] = tuple(fields["range"]) if fields["range"] else None
        fields["rejects"] = tuple(Reject(**reject) for reject in fields["rejects"])
        fields["tally"] = {bucket: BucketTally(**tally) for bucket, tally in fields["tally"].items()}
        fields["supersedes"] = tuple((position, reason) for position, reason in fields.get("supersedes", ()))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A part that stands in the cache: its record, and its file's name, size and sha256."""

    record: Record
    file: str
    bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """As `_commits` holds it: rejects as counts by reason, and where the rest of a damaged shard begins."""
        fields = self.record.to_dict()
        reasons = [reject.reason for reject in self.record.rejects]
        fields["rejects"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        fields["rests"] = [reject.position for reject in self.record.rejects if reject.reason == REST_OF_SHARD]
        return {**fields, "file": self.file, "bytes": self.bytes, "sha256": self.sha256}


def unread_rests(records: Iterable[Record]) -> dict[str, set[int]]:
    """By unit, the positions from which on its input was never read: what is rejected so, and superseded by nothing."""
    found, taken = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)
    for record in records:
        found[record.unit].update(reject.position for reject in record.rejects if reject.reason == REST_OF_SHARD)
        taken[record.unit].update(position for position, reason in record.supersedes if reason == REST_OF_SHARD)
    return {unit: left for unit, positions in found.items() if (left := positions - taken[unit])}
