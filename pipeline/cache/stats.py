"""stats.json: the statistics of the whole cache, from its parts' records alone, and the digest that pins it.

Every time, the statistics are computed from all records, never added up over runs. So they do not depend on how the
work was interrupted.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from latentmill.cache import STATS
from latentmill.cache import read_stats as read_stats
from latentmill.canonical_json import cache_digest as cache_digest
from pipeline.cache.commit_scan import CacheListing, Repair, read_summaries, strip_folder
from pipeline.cache.part_info import PartSummary
from pipeline.cache.parts import strip_extension
from pipeline.cache.tally import compute_std, merge, merge_two, pool_channels
from pipeline.canonical_json import indented_json
from pipeline.errors import REST_OF_SHARD
from pipeline.formats.part_record import BucketTally
from pipeline.storage.folder import Folder

NAME = STATS
NEARLY_CONSTANT = 1e-4  # a channel's standard deviation, relative to that of the widest channel


@dataclass(slots=True)
class RunningStats:
    """The statistics of the parts so far. Parts must be added in the order of their file names.

    rests: the unit and position of each rejected rest of a damaged shard. superseded_rests: of each rest that a retry
    part supersedes. The two are separate, because a retry part can exist although the part with the reject was lost.
    """

    rows: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    enlarged: int = 0
    reject_counts: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, BucketTally] = field(default_factory=dict)
    rests: set[tuple[str, int]] = field(default_factory=set)
    superseded_rests: set[tuple[str, int]] = field(default_factory=set)

    def count(self, part: PartSummary) -> None:
        """Add a part's counts."""
        self.rows += part.rows
        self.filtered.update(part.filtered)
        self.enlarged += part.enlarged
        self.reject_counts.update(part.reject_counts)
        self.reject_counts.subtract(reason for _, reason in part.supersedes)
        self.rests.update((part.unit, position) for position in part.rest_positions)
        self.superseded_rests.update(
            (part.unit, position) for position, reason in part.supersedes if reason == REST_OF_SHARD
        )

    def add(self, part: PartSummary) -> None:
        """Add a part's counts and tallies."""
        self.count(part)
        for name, tally in part.tally.items():
            self.buckets[name] = merge_two(self.buckets[name], tally) if name in self.buckets else tally

    def copy(self) -> "RunningStats":
        """Return an independent copy. The tallies are shared, because they are never changed."""
        return replace(
            self,
            filtered=Counter(self.filtered),
            reject_counts=Counter(self.reject_counts),
            buckets=dict(self.buckets),
            rests=set(self.rests),
            superseded_rests=set(self.superseded_rests),
        )

    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejects per reason, without the rejects that a retry part supersedes."""
        counts = self.reject_counts.copy()
        counts[REST_OF_SHARD] = len(self.rests - self.superseded_rests)
        return {reason: counts[reason] for reason in sorted(+counts)}


def summarize(sums: RunningStats, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of stats.json. hashes: sha256 by file."""
    buckets = {name: sums.buckets[name] for name in sorted(sums.buckets)}
    total = merge(buckets.values())
    return {
        "count": sums.rows,
        **(_describe_channels(total) if total else {}),
        "buckets": {name: {"count": tally.samples, **_describe_channels(tally)} for name, tally in buckets.items()},
        "rejected": sums.rejected,
        "filtered": dict(sorted(sums.filtered.items())),
        "enlarged": sums.enlarged,
        "suggested": _suggest_scaling(total) if total else None,
        "files": len(hashes),
        "digest": cache_digest(hashes),
    }


def summarize_parts(parts: Iterable[PartSummary]) -> dict[str, Any]:
    """Return the content of stats.json for a cache with these parts, in any order."""
    sums, hashes = RunningStats(), dict[str, str]()
    for part in sorted(parts, key=lambda part: strip_folder(part.file)):
        sums.add(part)
        hashes[part.file] = part.sha256
    return summarize(sums, hashes)


class StatsWriter:
    """Computes and writes stats.json, also several times while other jobs add files.

    A second time, only the files from the first new one on are read again. For that, the writer keeps the sums at up to
    about `SNAPSHOTS` files, and the names and hashes of all files.
    """

    SNAPSHOTS = 32

    def __init__(self, cache: Folder, identity_sha256: str, repair: Repair | None = None) -> None:
        self.cache, self.identity_sha256, self.repair = cache, identity_sha256, repair
        self.files: tuple[str, ...] = ()
        self._snapshots: list[tuple[str, RunningStats]] = [("", RunningStats())]
        self._hashes: dict[str, str] = {}

    def write(self) -> dict[str, Any]:
        """Sum up the parts that are in the cache now, write stats.json, and return its content."""
        listing = CacheListing.read(self.cache)
        after, sums = self._rewind(listing.files)
        interval = max(1, len(listing.files) // self.SNAPSHOTS)
        for number, part in enumerate(read_summaries(self.cache, self.identity_sha256, listing, self.repair, after), 1):
            sums.add(part)
            self._hashes[part.file] = part.sha256
            if number % interval == 0:
                self._snapshots.append((strip_folder(part.file), sums.copy()))
        self.files = listing.files
        content = summarize(sums, self._hashes)
        self.cache.replace(NAME, encode_stats(content))
        return content

    def _rewind(self, files: Sequence[str]) -> tuple[str, RunningStats]:
        """Drop the snapshots that are not before all new and removed files.

        Returns the file name and the sums of the last snapshot that is left.
        """
        removed = set(self.files) - set(files)
        changed = set(files) ^ set(self.files)
        first = min((strip_folder(strip_extension(file)) for file in changed), default="")
        while changed and self._snapshots[-1][0] >= first:
            self._snapshots.pop()
        for file in removed:
            self._hashes.pop(file, None)
        name, sums = self._snapshots[-1]
        return name, sums.copy()


def find_implausible(content: Mapping[str, Any]) -> list[str]:
    """Return a line for each constant or nearly constant channel. Such a channel suggests a broken VAE.

    content: the content of stats.json.
    """
    stds = content.get("std", [])
    widest = max(stds, default=0.0)
    return [
        f"channel {channel} of the latents is {'constant' if not std else 'nearly constant'} (mean {mean:.4g}, std "
        f"{std:.2g}): is the VAE broken, or every image the same?"
        for channel, (mean, std) in enumerate(zip(content.get("mean", []), stds, strict=True))
        if content["count"] > 1 and std <= NEARLY_CONSTANT * widest
    ]


def _describe_channels(tally: BucketTally) -> dict[str, list[float]]:
    return {"mean": tally.mean, "std": compute_std(tally), "min": tally.min, "max": tally.max}


def _suggest_scaling(tally: BucketTally) -> dict[str, Any]:
    """Return constants that bring these latents to zero mean and unit variance, over all channels and per channel."""
    mean, std = pool_channels(tally)
    return {
        "scaling_factor": 1 / std if std > 0 else None,
        "shift_factor": mean,
        "latents_mean": tally.mean,
        "latents_std": compute_std(tally),
    }


def encode_stats(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of stats.json with this content."""
    return indented_json(content) + b"\n"
