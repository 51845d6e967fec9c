"""stats.json: what the whole cache holds, from its parts' records alone, and the digest that pins it.

Rebuilt from all records every time, never from one run's sums: so it is the same however the work was interrupted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.cache import commit_reader, commits
from pipeline.cache.commit_reader import CacheListing, PartFacts, Repair, file_name
from pipeline.cache.parts import find_empty_duplicates, inspect_part, stem_of
from pipeline.cache.tally import merge, merge_two, pool_channels, std_of
from pipeline.canonical_json import VERIFY_HINT, parse_json_object
from pipeline.errors import REST_OF_SHARD, CacheError
from pipeline.formats.record import BucketTally
from pipeline.storage.folder import Folder

NAME = "stats.json"
UNCOUNTED: dict[str, Any] = {
    "rows": 0,
    "filtered": 0,
    "enlarged": 0,
    "rejects": {},
    "rests": (),
    "supersedes": (),
    "tally": {},
}
DEAD = 1e-4  # of the widest channel's standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a cache knows of one of its files: from the unit's commit, or from the file itself."""

    file: str
    sha256: str
    unit: str
    source: str
    rows: int
    filtered: int
    enlarged: int
    rejects: Mapping[str, int]
    rests: Sequence[int] = ()
    supersedes: Sequence[tuple[int, str]] = ()
    tally: Mapping[str, BucketTally]


def read_parts(
    cache: Folder, identity: str, listing: CacheListing | None = None, mending: Repair | None = None, after: str = ""
) -> Iterator[Part]:
    """The files of a cache, in the order of their own names (`commits.by_file`).

    Raises CacheError for a file that a commit names and that is not there.
    """
    listing = listing or CacheListing.of(cache)
    hidden = find_empty_duplicates(listing.files)

    def understand(name: str, said: PartFacts) -> Part:
        return _committed(cache, name, said)

    for file, known in commit_reader.pair_with_commits(cache, listing, understand, mending, after):
        to_commit = mending is not None and file not in hidden
        part = known or _uncommitted(cache, file, identity, to_commit)
        yield replace(part, **UNCOUNTED) if file in hidden else part


def committed_parts(cache: Folder, names: Iterable[str]) -> Iterator[Part]:
    """What these commits say of their parts."""
    for name, content in commits.read_commits(cache, names):
        for said in content["parts"]:
            yield _committed(cache, name, said)


def _committed(cache: Folder, name: str, said: PartFacts) -> Part:
    try:
        return parse_part(said)
    except (KeyError, TypeError, AttributeError) as error:
        file = cache.at(f"{commits.COMMITS}/{name}.json")
        raise CacheError(f"{file} cannot be understood: it is damaged; {VERIFY_HINT}") from error


def _uncommitted(cache: Folder, file: str, identity: str, to_commit: bool) -> Part:
    """What a file says of itself. to_commit: where a retry died before it wrote its part's commit, write it now."""
    standing = inspect_part(cache, file, identity)
    if standing is None:
        raise CacheError(f"{cache.at(file)} was listed and has gone")
    if to_commit and standing.record.round:
        commits.write_commit(cache, [standing])
    return parse_part(standing.to_dict())


def parse_part(fields: Mapping[str, Any]) -> Part:
    """From what a commit, or a record, says of a part."""
    return Part(
        tally={name: BucketTally(**t) for name, t in fields["tally"].items()},
        **{name: fields[name] for name in Part.__dataclass_fields__ if name != "tally" and name in fields},
    )


def cache_digest(hashes: Mapping[str, str]) -> str:
    """The sha256 of what `LC_ALL=C sha256sum _empty/* data/*` prints in the cache. hashes: sha256 by file."""
    lines = hashlib.sha256()
    for file in sorted(hashes):
        lines.update(f"{hashes[file]}  {file}\n".encode())
    return lines.hexdigest()


@dataclass(slots=True)
class RunningStats:
    """Statistics of the parts so far. What is added must come in the order of the parts' own names.

    begun, taken: where rests of damaged shards stand, and those that a retry has taken up, by unit and position: the
    part that takes one up may stand while the part that begins it was lost.
    """

    rows: int = 0
    filtered: int = 0
    enlarged: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, BucketTally] = field(default_factory=dict)
    begun: set[tuple[str, int]] = field(default_factory=set)
    taken: set[tuple[str, int]] = field(default_factory=set)

    def count(self, part: Part) -> None:
        """Add a part's counts."""
        self.rows += part.rows
        self.filtered += part.filtered
        self.enlarged += part.enlarged
        self.rejects.update(part.rejects)
        self.rejects.subtract(reason for _, reason in part.supersedes)
        self.begun.update((part.unit, position) for position in part.rests)
        self.taken.update((part.unit, position) for position, reason in part.supersedes if reason == REST_OF_SHARD)

    def add(self, part: Part) -> None:
        """Add a part's counts and tallies."""
        self.count(part)
        for name, more in part.tally.items():
            self.buckets[name] = merge_two(self.buckets[name], more) if name in self.buckets else more

    def copy(self) -> "RunningStats":
        """The same now; the tallies in it are never changed."""
        return replace(
            self,
            rejects=Counter(self.rejects),
            buckets=dict(self.buckets),
            begun=set(self.begun),
            taken=set(self.taken),
        )

    @property
    def rejected(self) -> dict[str, int]:
        """How many samples are rejected, by reason: those that no retry has superseded."""
        counts = self.rejects.copy()
        counts[REST_OF_SHARD] = len(self.begun - self.taken)
        return {reason: counts[reason] for reason in sorted(+counts)}


def summarize(sums: RunningStats, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The content of stats.json. hashes: sha256 of each file."""
    buckets = {name: sums.buckets[name] for name in sorted(sums.buckets)}
    total = merge(buckets.values())
    return {
        "count": sums.rows,
        **(_channels(total) if total else {}),
        "buckets": {name: {"count": t.samples, **_channels(t)} for name, t in buckets.items()},
        "rejected": sums.rejected,
        "filtered": sums.filtered,
        "enlarged": sums.enlarged,
        "suggested": _suggested(total) if total else None,
        "files": len(hashes),
        "digest": cache_digest(hashes),
    }


def summarize_tallies(all_parts: Iterable[Part]) -> dict[str, Any]:
    """The content of stats.json from a cache's parts, in any order."""
    sums, hashes = RunningStats(), dict[str, str]()
    for part in sorted(all_parts, key=lambda part: file_name(part.file)):
        sums.add(part)
        hashes[part.file] = part.sha256
    return summarize(sums, hashes)


class StatsWriter:
    """Makes stats.json, and again where files came meanwhile: then only what is behind the first of them is read again.

    For that it keeps how the sums stood at some files, and the names and hashes of all.
    """

    MARKS = 32

    def __init__(self, cache: Folder, identity: str, mending: Repair | None = None) -> None:
        self.cache, self.identity, self.mending = cache, identity, mending
        self.files: tuple[str, ...] = ()
        self._marks: list[tuple[str, RunningStats]] = [("", RunningStats())]
        self._hashes: dict[str, str] = {}

    def write(self) -> dict[str, Any]:
        """Sum up what stands in the cache now, write stats.json, and return its content."""
        listing = CacheListing.of(self.cache)
        after, sums = self._back_to(listing.files)
        every = max(1, len(listing.files) // self.MARKS)
        for number, part in enumerate(read_parts(self.cache, self.identity, listing, self.mending, after), 1):
            sums.add(part)
            self._hashes[part.file] = part.sha256
            if number % every == 0:
                self._marks.append((file_name(part.file), sums.copy()))
        self.files = listing.files
        content = summarize(sums, self._hashes)
        self.cache.replace(NAME, encode_json(content))
        return content

    def _back_to(self, files: Sequence[str]) -> tuple[str, RunningStats]:
        """Forget what is not before all files that came or went. Returns the last name that is left, and the sums."""
        gone = set(self.files) - set(files)
        changed = set(files) ^ set(self.files)
        first = min((file_name(stem_of(file)) for file in changed), default="")
        while changed and self._marks[-1][0] >= first:
            self._marks.pop()
        for file in gone:
            self._hashes.pop(file, None)
        name, sums = self._marks[-1]
        return name, sums.copy()


def find_implausible(content: Mapping[str, Any]) -> list[str]:
    """What in statistics looks like a broken VAE: a line for each channel that is constant, or nearly so.

    content: stats.json.
    """
    stds = content.get("std", [])
    greatest = max(stds, default=0.0)
    return [
        f"channel {channel} of the latents is {'constant' if not std else 'nearly constant'} (mean {mean:.4g}, std "
        f"{std:.2g}): is the VAE broken, or every image the same?"
        for channel, (mean, std) in enumerate(zip(content.get("mean", []), stds, strict=True))
        if content["count"] > 1 and std <= DEAD * greatest
    ]


def _channels(t: BucketTally) -> dict[str, list[float]]:
    return {"mean": t.mean, "std": std_of(t), "min": t.min, "max": t.max}


def _suggested(t: BucketTally) -> dict[str, Any]:
    """What would bring these latents to zero mean and unit variance: as one number each, and a channel."""
    mean, std = pool_channels(t)
    return {
        "scaling_factor": 1 / std if std > 0 else None,
        "shift_factor": mean,
        "latents_mean": t.mean,
        "latents_std": std_of(t),
    }


def encode_json(content: Mapping[str, Any]) -> bytes:
    """stats.json with this content."""
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def read_stats(cache: Folder) -> dict[str, Any] | None:
    """The content of stats.json; None where no run has come to its end yet."""
    data = cache.read_if_there(NAME)
    return None if data is None else parse_json_object(data, cache.at(NAME))
