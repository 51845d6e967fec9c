"""The counts of many parts: rows, filtered, enlarged and rejected samples."""

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.parts import parse_unit_name
from pipeline.errors import REST_OF_SHARD


@dataclass(slots=True)
class PartCounts:
    """The counts of the parts so far, in any order.

    rests: the unit and position of each rejected rest of a damaged shard. superseded_rests: of each rest that a retry
    part supersedes. The two are separate, because a retry part can exist although the part with the reject was lost.
    """

    parts: int = 0
    rows: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    enlarged: int = 0
    reject_counts: Counter[str] = field(default_factory=Counter)
    rests: set[tuple[str, int]] = field(default_factory=set)
    superseded_rests: set[tuple[str, int]] = field(default_factory=set)

    def add(self, rows: pa.Table) -> None:
        """Add these parts. rows: with the schema of `pipeline.cache.part_table`."""
        self.parts += len(rows)
        self.rows += pc.sum(rows["rows"]).as_py() or 0
        self.enlarged += pc.sum(rows["enlarged"]).as_py() or 0
        for name, counter in (("filtered", self.filtered), ("rejects", self.reject_counts)):
            for chunk in rows[name].chunks:
                for reason, count in zip(chunk.keys.to_pylist(), chunk.items.to_pylist(), strict=True):
                    counter[reason] += count
        retried = rows.filter(pc.greater(pc.list_value_length(rows["supersedes"]), 0))
        for file, entries in zip(retried["file"].to_pylist(), retried["supersedes"].to_pylist(), strict=True):
            self.reject_counts.subtract(entry["reason"] for entry in entries)
            rests = [entry["position"] for entry in entries if entry["reason"] == REST_OF_SHARD]
            self.superseded_rests.update((parse_unit_name(file), position) for position in rests)
        damaged = rows.filter(pc.greater(pc.list_value_length(rows["rests"]), 0))
        for file, positions in zip(damaged["file"].to_pylist(), damaged["rests"].to_pylist(), strict=True):
            self.rests.update((parse_unit_name(file), position) for position in positions)

    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejects per reason, without the rejects that a retry part supersedes."""
        counts = self.reject_counts.copy()
        counts[REST_OF_SHARD] = len(self.rests - self.superseded_rests)
        return {reason: counts[reason] for reason in sorted(+counts)}
