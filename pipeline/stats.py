"""stats.json: what the whole cache holds, from its parts' records alone, and the digest that pins it.

Rebuilt from all records every time, never from one run's sums: so it is the same however the work was interrupted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import commit, tally
from pipeline.errors import REST, CacheError
from pipeline.records import VERIFY, BucketTally, json_object
from pipeline.storage import Folder

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


def parts(cache: Folder, identity: str) -> list[Part]:
    """All files of a cache, `_empty/` before `data/`, each sorted by name.

    Raises CacheError for a file that a commit names and that is not there.
    """
    known = committed(cache)  # first: what is committed meanwhile is in the listing, too
    files = commit.files(cache)
    for file in sorted(known.keys() - set(files)):
        raise CacheError(f"{cache.at(file)} is gone, but was committed: the cache is damaged; {VERIFY}")
    hidden = commit.shadowed(files)
    found = [known.get(file) or _uncommitted(cache, file, identity) for file in files]
    return [replace(part, **UNCOUNTED) if part.file in hidden else part for part in found]


def committed(cache: Folder) -> dict[str, Part]:
    """What `_commits` says of the parts of finished units, and of those that `retry` wrote, by file."""
    found: dict[str, Part] = {}
    for name, content in commit.commits(cache).items():
        try:
            found |= {part["file"]: part_of(part) for part in content["parts"]}
        except (KeyError, TypeError, AttributeError) as error:
            file = cache.at(f"{commit.COMMITS}/{name}.json")
            raise CacheError(f"{file} cannot be understood: it is damaged; {VERIFY}") from error
    return found


def _uncommitted(cache: Folder, file: str, identity: str) -> Part:
    standing = commit.inspect(cache, file, identity)
    if standing is None:
        raise CacheError(f"{cache.at(file)} was listed and has gone")
    return part_of(standing.to_dict())


def part_of(fields: Mapping[str, Any]) -> Part:
    """From what a commit, or a record, says of a part."""
    return Part(
        tally={name: BucketTally(**t) for name, t in fields["tally"].items()},
        **{name: fields[name] for name in Part.__dataclass_fields__ if name != "tally" and name in fields},
    )


def digest(all_parts: Iterable[Part]) -> str:
    """The sha256 of what `LC_ALL=C sha256sum _empty/* data/*` prints in the cache."""
    return hashlib.sha256("".join(f"{part.sha256}  {part.file}\n" for part in all_parts).encode()).hexdigest()


def summary(all_parts: Sequence[Part]) -> dict[str, Any]:
    """The content of stats.json."""
    in_order = sorted(all_parts, key=lambda part: part.file.rpartition("/")[2])
    buckets = tally.by_bucket(part.tally for part in in_order)
    total = tally.merge(buckets.values())
    return {
        "count": sum(part.rows for part in all_parts),
        **(_channels(total) if total else {}),
        "buckets": {name: {"count": t.samples, **_channels(t)} for name, t in buckets.items()},
        "rejected": rejected(all_parts),
        "filtered": sum(part.filtered for part in all_parts),
        "enlarged": sum(part.enlarged for part in all_parts),
        "suggested": _suggested(total) if total else None,
        "digest": digest(all_parts),
    }


def rejected(all_parts: Iterable[Part]) -> dict[str, int]:
    """How many samples are rejected, by reason: those that no retry has superseded.

    Each rest of a damaged shard is looked for by its place: a part that supersedes one may be there while the part that
    begins it was lost.
    """
    counts: Counter[str] = Counter()
    begun, taken = set[tuple[str, int]](), set[tuple[str, int]]()
    for part in all_parts:
        counts.update(part.rejects)
        counts.subtract(reason for _, reason in part.supersedes)
        begun.update((part.unit, position) for position in part.rests)
        taken.update((part.unit, position) for position, reason in part.supersedes if reason == REST)
    counts[REST] = len(begun - taken)
    return {reason: counts[reason] for reason in sorted(+counts)}


def doubts(content: Mapping[str, Any]) -> list[str]:
    """What in statistics looks like a broken VAE: a line for each channel that is constant, or nearly so.

    content: stats.json.
    """
    stds = content.get("std", [])
    greatest = max(stds, default=0.0)
    return [
        f"channel {channel} of the latents is {'constant' if not std else 'nearly constant'} (mean {mean:.4g}, std "
        f"{std:.2g}): is the VAE broken, or every picture the same?"
        for channel, (mean, std) in enumerate(zip(content.get("mean", []), stds, strict=True))
        if content["count"] > 1 and std <= DEAD * greatest
    ]


def _channels(t: BucketTally) -> dict[str, list[float]]:
    return {"mean": t.mean, "std": tally.std(t), "min": t.min, "max": t.max}


def _suggested(t: BucketTally) -> dict[str, Any]:
    """What would bring these latents to zero mean and unit variance: as one number each, and a channel."""
    mean, std = tally.over_channels(t)
    return {
        "scaling_factor": 1 / std if std > 0 else None,
        "shift_factor": mean,
        "latents_mean": t.mean,
        "latents_std": tally.std(t),
    }


def write(cache: Folder, identity: str) -> dict[str, Any]:
    """Make stats.json again from what stands in the cache, and return its content."""
    content = summary(parts(cache, identity))
    cache.replace(NAME, as_bytes(content))
    return content


def as_bytes(content: Mapping[str, Any]) -> bytes:
    """stats.json with this content."""
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def read(cache: Folder) -> dict[str, Any] | None:
    """The content of stats.json; None where no run has come to its end yet."""
    data = cache.read_if_there(NAME)
    return None if data is None else json_object(data, cache.at(NAME))
