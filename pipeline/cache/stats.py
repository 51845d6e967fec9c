"""stats.json: the statistics of the whole cache, from its parts' records alone, and the digest that pins it.

Every time, the statistics are computed from all records, never added up over runs. The sums are exact, so they depend
neither on the order of the parts nor on how the work was interrupted.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from latentmill.cache_files import STATS
from latentmill.cache_files import read_stats as read_stats
from latentmill.canonical_json import cache_digest as cache_digest
from pipeline.cache.commit_scan import CacheScan, PartTable, drop_twins
from pipeline.cache.name_array import iterate_names
from pipeline.cache.part_counts import PartCounts
from pipeline.cache.part_info import PartSummary
from pipeline.cache.part_table import make_table
from pipeline.cache.tally_sums import ChannelStats, TallySums
from pipeline.canonical_json import indented_json
from pipeline.storage.folder import Folder

NAME = STATS


@dataclass(slots=True)
class RunningStats:
    """The counts and the tallies of the parts so far, in any order."""

    counts: PartCounts = field(default_factory=PartCounts)
    tallies: TallySums = field(default_factory=TallySums)

    def add(self, rows: pa.Table) -> None:
        """Add these parts."""
        self.counts.add(rows)
        self.tallies.add(rows)


def summarize(sums: RunningStats, files: int, digest: str) -> dict[str, Any]:
    """Return the content of stats.json. files: the number of part files."""
    buckets = {name: sums.tallies.describe(name) for name in sorted(sums.tallies.buckets)}
    total = sums.tallies.describe() if buckets else None
    return {
        "count": sums.counts.rows,
        **(total.to_dict() if total else {}),
        "buckets": {name: {"count": bucket.samples, **bucket.to_dict()} for name, bucket in buckets.items()},
        "rejected": sums.counts.rejected,
        "filtered": dict(sorted(sums.counts.filtered.items())),
        "enlarged": sums.counts.enlarged,
        "suggested": _suggest_scaling(total, sums.tallies) if total else None,
        "files": files,
        "digest": digest,
    }


def summarize_parts(parts: Iterable[PartSummary]) -> dict[str, Any]:
    """Return the content of stats.json for a cache with these parts, in any order."""
    sums, parts = RunningStats(), sorted(parts, key=lambda part: part.file)
    if parts:
        sums.add(make_table([("", part) for part in parts]))
    return summarize(sums, len(parts), cache_digest((part.file, part.sha256) for part in parts))


def compute_stats(
    scan: CacheScan, identity_sha256: str, on_table: Callable[[PartTable], None] = lambda table: None
) -> dict[str, Any]:
    """Return the content of stats.json for the parts that a scan finds. Twins are in the digest, but count nothing.

    on_table: called with each table of parts.
    """
    sums, hashes = RunningStats(), np.zeros((len(scan.files), 32), np.uint8)
    for table in scan.read_tables(identity_sha256):
        sums.add(drop_twins(table.rows, scan.twins))
        hashes[table.files] = _get_hashes(table)
        on_table(table)
    pairs = zip(iterate_names(scan.files), (row.tobytes().hex() for row in hashes), strict=True)
    return summarize(sums, len(scan.files), cache_digest(pairs))


def _get_hashes(table: PartTable) -> np.ndarray:
    """Return the sha256 of each part's file: uint8 [n, 32]."""
    hashes = b"".join(value.as_py() for value in table.rows["sha256"])
    return np.frombuffer(hashes, np.uint8).reshape(-1, 32)


def write_stats(cache: Folder, content: Mapping[str, Any]) -> None:
    """Write stats.json."""
    cache.replace(NAME, encode_stats(content))


def count_samples(content: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many samples were rejected, and how many there are, also filtered ones. content: of stats.json."""
    rejected = sum(content["rejected"].values())
    return rejected, content["count"] + sum(content["filtered"].values()) + rejected


def _suggest_scaling(total: ChannelStats, sums: TallySums) -> dict[str, Any]:
    """Return constants that bring these latents to zero mean and unit variance, over all channels and per channel."""
    mean, std = sums.pool_channels()
    return {
        "scaling_factor": 1 / std if std > 0 else None,
        "shift_factor": mean,
        "latents_mean": total.mean,
        "latents_std": total.std,
    }


def encode_stats(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of stats.json with this content."""
    return indented_json(content) + b"\n"
