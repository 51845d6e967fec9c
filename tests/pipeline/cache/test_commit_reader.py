"""`_commits` is read once, in the order of the parts' names, and the statistics are what they are of all at once."""

import random
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cache import commit_reader, commits, stats, tally
from pipeline.cache import parts as part_files
from pipeline.cache import parts as parts_module
from pipeline.cache.commit_reader import CacheListing
from pipeline.cache.parts import hash_files, inspect_part
from pipeline.canonical_json import canonical_json
from pipeline.errors import CacheError
from pipeline.formats.record import BucketTally, PartInfo, Record
from pipeline.storage.folder import Folder

IDENTITY = "identity"


def made_record(unit: str, part: int, last: bool, draw: random.Random, round: int = 0) -> Record:
    """A part with rows in some of three buckets, and a reject or two."""
    rng = np.random.default_rng(draw.randrange(1 << 30))
    names = draw.sample(["64x64", "56x72", "72x56"], draw.randint(1, 3))
    tallies = {name: tally.tally_latents([torch.tensor(rng.normal(size=(4, 8, 8)))]) for name in sorted(names)}
    return Record(
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
        filtered=draw.randint(0, 2),
        enlarged=draw.randint(0, 2),
        rejects=(),
        tally=tallies,
        inputs="",
        round=round,
        supersedes=((0, "corrupt"),) if round else (),
    )


def put(cache: Path, records: Iterable[Record], committed: bool = True) -> list[PartInfo]:
    """Files for these parts of one unit, whose bytes are their records', and their commit."""
    standing = []
    for record in records:
        data = record.to_json()
        path = cache / f"_empty/{record.stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        file = f"_empty/{record.stem}.json"
        (hashed,) = hash_files(Folder(str(cache)), [file]).values()
        standing.append(PartInfo(record, file, len(data), hashed))
    if committed:
        (cache / "_commits").mkdir(exist_ok=True)
        name = commits.commit_name(standing)
        (cache / f"_commits/{name}.json").write_bytes(canonical_json(commits.commit_content(standing, {})))
    return standing


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty units, some retried, and some whose names begin with another's; one is under way."""
    monkeypatch.setattr(parts_module, "expected_stem", lambda record: f"_empty/{record.stem}")  # rows without a writer
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


def at_once(cache: Path) -> dict[str, Any]:
    """The statistics as they were made before: all parts in a list, then merged bucket by bucket."""
    folder = Folder(str(cache))
    parts = [stats.parse_part(standing.to_dict()) for standing in inspected(folder)]
    parts.sort(key=lambda part: part.file.rpartition("/")[2])
    buckets: dict[str, list[BucketTally]] = {}
    for part in parts:
        for name, one in part.tally.items():
            buckets.setdefault(name, []).append(one)
    merged = {name: tally.merge(buckets[name]) for name in sorted(buckets)}
    total = tally.merge(one for one in merged.values() if one)
    assert total
    return {
        "count": sum(part.rows for part in parts),
        "mean": total.mean,
        "std": tally.std_of(total),
        "files": len(parts),
    }


def inspected(folder: Folder) -> Iterator[PartInfo]:
    for file in part_files.list_part_files(folder):
        standing = inspect_part(folder, file, IDENTITY)
        assert standing
        yield standing


def test_statistics_are_to_the_last_bit_what_they_are_of_all_parts_at_once(cache: Path) -> None:
    written = stats.StatsWriter(Folder(str(cache)), IDENTITY).write()
    assert {name: written[name] for name in ("count", "mean", "std", "files")} == at_once(cache)


class Understood:
    """What is made of a part."""


def test_each_commit_is_read_once_and_few_are_held(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read, held, most = Folder.read, weakref.WeakSet[Understood](), 0

    def counted(self: Folder, name: str) -> bytes:
        reads[name] += 1
        return read(self, name)

    def understand(name: str, said: Any) -> Understood:
        one = Understood()
        held.add(one)
        return one

    monkeypatch.setattr(Folder, "read", counted)
    folder = Folder(str(cache))
    listing, files = CacheListing.of(folder), list[str]()
    for file, _ in commit_reader.pair_with_commits(folder, listing, understand):
        files.append(file)
        most = max(most, len(held))
    assert most < 20 < len(listing.files) / 2
    assert [commit_reader.file_name(file) for file in files] == sorted(map(commit_reader.file_name, listing.files))
    assert reads == {f"_commits/{name}.json": 1 for name in listing.commits}


def test_a_commit_without_any_file_left_is_damage(cache: Path) -> None:
    draw = random.Random(2)
    (gone,) = put(cache, [made_record("z-0123456789abcdef", 0, True, draw)])
    (cache / gone.file).unlink()
    with pytest.raises(CacheError, match=f"{gone.file} is gone, but was committed"):
        stats.StatsWriter(Folder(str(cache)), IDENTITY).write()


@pytest.mark.parametrize("stem", ["0", "a-8", "a-b-8", "zz"])
def test_what_another_job_adds_meanwhile_is_summed_up_without_reading_all_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stem: str
) -> None:
    folder = Folder(str(cache))
    summing = stats.StatsWriter(folder, IDENTITY)
    summing.write()
    draw = random.Random(3)
    put(cache, [made_record(f"{stem}-0123456789abcdef", part, part == 1, draw) for part in range(2)])
    reads: list[str] = []
    read = Folder.read

    def counted(self: Folder, name: str) -> bytes:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(Folder, "read", counted)
    written = summing.write()
    assert f"_commits/{stem}-0123456789abcdef.json" in reads
    assert len(reads) == len(set(reads))
    behind = [name for name in map(commit_reader.file_name, part_files.list_part_files(folder)) if name >= stem]
    assert len(reads) <= len(behind) + 4, "what comes before the new files is not read again"
    monkeypatch.undo()
    monkeypatch.setattr(parts_module, "expected_stem", lambda record: f"_empty/{record.stem}")
    assert written == stats.StatsWriter(folder, IDENTITY).write()
    assert {name: written[name] for name in ("count", "mean", "std", "files")} == at_once(cache)
