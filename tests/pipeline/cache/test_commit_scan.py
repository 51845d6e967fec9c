"""One scan reads each commit once, in the order of the file names, and gives the statistics of all parts at once."""

import random
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentmill.cache import hash_files
from pipeline.cache import commit_scan, commits, stats, tally
from pipeline.cache import parts as part_files
from pipeline.cache import parts as parts_module
from pipeline.cache.commit_scan import CacheListing
from pipeline.cache.part_info import PartInfo
from pipeline.cache.parts import inspect_part
from pipeline.canonical_json import canonical_json
from pipeline.errors import CacheError
from pipeline.formats.part_record import BucketTally, PartRecord
from pipeline.storage.folder import Folder

IDENTITY = "identity"


def made_record(unit: str, part: int, last: bool, draw: random.Random, round: int = 0) -> PartRecord:
    """Return the record of a part with rows in one to three buckets, and up to two filtered and enlarged images."""
    rng = np.random.default_rng(draw.randrange(1 << 30))
    names = draw.sample(["64x64", "56x72", "72x56"], draw.randint(1, 3))
    tallies = {name: tally.tally_latents([torch.tensor(rng.normal(size=(4, 8, 8)))]) for name in sorted(names)}
    return PartRecord(
        format=1,
        identity=IDENTITY,
        unit=unit,
        part=part,
        last=last,
        source=f"s/{unit}.tar",
        source_bytes=1,
        range=None,
        first=0,
        samples=len(names),
        rows=len(names),
        filtered=draw.choice([{}, {"min_size": 1}, {"max_aspect": 2, "min_size": 1}]),
        enlarged=draw.randint(0, 2),
        rejects=(),
        tally=tallies,
        inputs="",
        round=round,
        supersedes=((0, "corrupt"),) if round else (),
    )


def put(cache: Path, records: Iterable[PartRecord], committed: bool = True) -> list[PartInfo]:
    """Write files that hold only the records, for these parts of one unit, and their commit."""
    parts = []
    for record in records:
        data = record.to_json()
        path = cache / f"_empty/{record.stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        file = f"_empty/{record.stem}.json"
        (hashed,) = hash_files(Folder(str(cache)), [file]).values()
        parts.append(PartInfo(record, file, len(data), hashed))
    if committed:
        (cache / "_commits").mkdir(exist_ok=True)
        name = commits.get_commit_name(parts)
        (cache / f"_commits/{name}.json").write_bytes(canonical_json(commits.make_commit(parts, {})))
    return parts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of forty units: some are retried, some names begin with another unit's name. One unit is not finished."""
    monkeypatch.setattr(
        parts_module, "get_expected_stem", lambda record: f"_empty/{record.stem}"
    )  # parts with rows, but without a format
    draw = random.Random(1)
    names = [f"{stem}-{draw.randrange(16**16):016x}" for stem in ("a", "a-b", "b") for _ in range(10)]
    names += [f"{name}-{'0' * 15}{number}" for number, name in enumerate(names[:10])]
    for name in names:
        count = draw.randint(1, 3)
        put(tmp_path, [made_record(name, part, part == count - 1, draw) for part in range(count)])
        if draw.random() < 0.3:
            put(tmp_path, [made_record(name, 0, False, draw, round=1)])
    put(tmp_path, [made_record("ab-0000000000000000", 0, False, draw)], committed=False)
    return tmp_path


def compute_at_once(cache: Path) -> dict[str, Any]:
    """Compute the statistics in another way: collect all parts in a list, then merge them bucket by bucket."""
    folder = Folder(str(cache))
    parts = [part.summary for part in inspect_all(folder)]
    parts.sort(key=lambda part: part.file.rpartition("/")[2])
    buckets: dict[str, list[BucketTally]] = {}
    for part in parts:
        for name, bucket_tally in part.tally.items():
            buckets.setdefault(name, []).append(bucket_tally)
    merged = {name: tally.merge(buckets[name]) for name in sorted(buckets)}
    total = tally.merge(bucket_tally for bucket_tally in merged.values() if bucket_tally)
    assert total
    return {
        "count": sum(part.rows for part in parts),
        "mean": total.mean,
        "std": tally.compute_std(total),
        "files": len(parts),
    }


def inspect_all(folder: Folder) -> Iterator[PartInfo]:
    for file in part_files.list_part_files(folder):
        part = inspect_part(folder, file, IDENTITY)
        assert part
        yield part


def test_statistics_equal_those_of_all_parts_at_once_to_the_last_bit(cache: Path) -> None:
    written = stats.StatsWriter(Folder(str(cache)), IDENTITY).write()
    assert {name: written[name] for name in ("count", "mean", "std", "files")} == compute_at_once(cache)


class ParsedEntry:
    """The result of parsing a commit entry. A weak set counts how many exist."""


def test_each_commit_is_read_once_and_few_are_held(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read, held, max_held = Folder.read, weakref.WeakSet[ParsedEntry](), 0

    def count_read(self: Folder, name: str) -> bytes:
        reads[name] += 1
        return read(self, name)

    def parse_entry(name: str, entry: Any) -> ParsedEntry:
        parsed = ParsedEntry()
        held.add(parsed)
        return parsed

    monkeypatch.setattr(Folder, "read", count_read)
    folder = Folder(str(cache))
    listing, files = CacheListing.read(folder), list[str]()
    for file, _ in commit_scan.pair_with_commits(folder, listing, parse_entry):
        files.append(file)
        max_held = max(max_held, len(held))
    assert max_held < 20 < len(listing.files) / 2
    assert [commit_scan.strip_folder(file) for file in files] == sorted(map(commit_scan.strip_folder, listing.files))
    assert reads == {f"_commits/{name}.json": 1 for name in listing.commits}


def test_a_commit_whose_files_are_all_missing_is_damage(cache: Path) -> None:
    draw = random.Random(2)
    (missing,) = put(cache, [made_record("z-0123456789abcdef", 0, True, draw)])
    (cache / missing.file).unlink()
    with pytest.raises(CacheError, match=f"{missing.file} was committed, but is missing"):
        stats.StatsWriter(Folder(str(cache)), IDENTITY).write()


@pytest.mark.parametrize("stem", ["0", "a-8", "a-b-8", "zz"])
def test_parts_that_another_job_adds_are_counted_by_reading_few_files_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stem: str
) -> None:
    folder = Folder(str(cache))
    writer = stats.StatsWriter(folder, IDENTITY)
    writer.write()
    draw = random.Random(3)
    put(cache, [made_record(f"{stem}-0123456789abcdef", part, part == 1, draw) for part in range(2)])
    reads: list[str] = []
    read = Folder.read

    def count_read(self: Folder, name: str) -> bytes:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(Folder, "read", count_read)
    written = writer.write()
    assert f"_commits/{stem}-0123456789abcdef.json" in reads
    assert len(reads) == len(set(reads))
    following = [name for name in map(commit_scan.strip_folder, part_files.list_part_files(folder)) if name >= stem]
    assert len(reads) <= len(following) + 4, "files before the new ones are not read again"
    monkeypatch.undo()
    monkeypatch.setattr(parts_module, "get_expected_stem", lambda record: f"_empty/{record.stem}")
    assert written == stats.StatsWriter(folder, IDENTITY).write()
    assert {name: written[name] for name in ("count", "mean", "std", "files")} == compute_at_once(cache)


@pytest.mark.parametrize("filtered", [0, 3, None, ["min_size"], {"min_size": "3"}, {"min_size": 0}, {"min_size": True}])
def test_a_part_whose_filtered_samples_are_not_counts_by_setting_is_refused(tmp_path: Path, filtered: Any) -> None:
    folder = Folder(str(tmp_path))
    record = replace(made_record("u", 0, True, random.Random(0)), filtered=filtered)
    (part,) = put(tmp_path, [record])
    with pytest.raises(CacheError, match=r"_commits/u\.json is corrupt: it does not describe its parts"):
        list(commit_scan.read_committed_summaries(folder, ["u"]))
    with pytest.raises(CacheError, match="cannot be read as the record of a part"):
        inspect_part(folder, part.file, IDENTITY)
