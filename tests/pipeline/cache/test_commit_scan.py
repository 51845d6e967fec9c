"""One scan reads each commit once, from the log or from its own file, and gives the statistics of all parts."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentmill.cache_files import hash_files
from pipeline.cache import commit_scan, commits, stats, tally
from pipeline.cache import parts as part_files
from pipeline.cache import parts as parts_module
from pipeline.cache.commit_scan import CacheScan, Repair
from pipeline.cache.name_array import find_names, iterate_names, sort_names
from pipeline.cache.part_info import PartInfo
from pipeline.cache.parts import inspect_part, is_retry_part
from pipeline.canonical_json import canonical_json
from pipeline.errors import CacheError
from pipeline.formats.part_record import PartRecord
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
    """Compute the statistics in another way: from the records in all files, in one table."""
    return stats.summarize_parts(part.summary for part in inspect_all(Folder(str(cache))))


def inspect_all(folder: Folder) -> Iterator[PartInfo]:
    for file in part_files.list_part_files(folder):
        part = inspect_part(folder, file, IDENTITY)
        assert part
        yield part


def compute(cache: Path, repair: bool = False) -> dict[str, Any]:
    """Compute the statistics by a scan. repair: as a driver does at its end, which adds commits to the log."""
    driver = Repair(identity_sha256=IDENTITY, container="parquet")
    return stats.compute_stats(CacheScan(Folder(str(cache)), driver if repair else None), IDENTITY)


def test_statistics_equal_those_of_all_parts_at_once_to_the_last_bit(cache: Path) -> None:
    expected = compute_at_once(cache)
    assert compute(cache) == expected
    assert not (cache / "_log").exists(), "only a driver writes the log"
    assert compute(cache, repair=True) == expected
    assert compute(cache) == expected


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each file is read."""
    reads: Counter[str] = Counter()
    read = Folder.read

    def count_read(self: Folder, name: str) -> bytes:
        reads[name] += 1
        return read(self, name)

    monkeypatch.setattr(Folder, "read", count_read)
    return reads


def test_each_commit_is_read_once_and_then_from_the_log(cache: Path, reads: Counter[str]) -> None:
    compute(cache, repair=True)
    names = list(iterate_names(commit_scan.list_commit_names(Folder(str(cache)))))
    assert reads == {f"_commits/{name}.json": 1 for name in names}
    reads.clear()
    compute(cache, repair=True)
    assert reads.keys() == {"_log/00000.parquet"}
    draw = random.Random(4)
    put(cache, [made_record("new-0123456789abcdef", part, part == 1, draw) for part in range(2)])
    expected = compute_at_once(cache)
    reads.clear()
    assert compute(cache, repair=True) == expected
    assert {name for name in reads if name.startswith("_commits/")} == {"_commits/new-0123456789abcdef.json"}
    assert sorted(path.name for path in (cache / "_log").iterdir()) == ["00000.parquet", "00001.parquet"]


def test_a_scan_holds_few_commits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_scan, "PARTS_PER_TABLE", 5)
    scan = CacheScan(Folder(str(cache)))
    lengths = [len(table.rows) for table in scan.read_tables(IDENTITY)]
    assert max(lengths) <= 15 < sum(lengths) == len(scan.files), "five commits have at most 15 parts"


def test_the_last_rows_of_a_commit_count(cache: Path) -> None:
    """Two drivers can add the same commit, and a unit whose files were moved away can be encoded again."""
    compute(cache, repair=True)
    draw, folder = random.Random(5), Folder(str(cache))
    unit = min(path.stem for path in cache.glob("_commits/b-*.json") if not is_retry_part(path.stem))
    for path in [*cache.glob(f"_empty/{unit}-00*"), *cache.glob(f"_commits/{unit}*")]:
        path.unlink()
    expected = compute_at_once(cache)
    assert compute(cache) == expected, "rows of a commit that does not exist do not count"
    commit_scan.remove_lost_commits(folder, commit_scan.list_commit_names(folder))
    files = len([*cache.glob("_log/*")])
    commit_scan.remove_lost_commits(folder, commit_scan.list_commit_names(folder))
    assert len([*cache.glob("_log/*")]) == files, "the removal is written once"
    put(cache, [made_record(unit, 0, True, draw)])
    expected = compute_at_once(cache)
    assert compute(cache) == expected
    assert compute(cache, repair=True) == expected
    assert compute(cache) == expected


def test_a_commit_whose_files_are_all_missing_is_damage(cache: Path) -> None:
    draw = random.Random(2)
    (missing,) = put(cache, [made_record("z-0123456789abcdef", 0, True, draw)])
    (cache / missing.file).unlink()
    with pytest.raises(CacheError, match=f"{missing.file} was committed, but is missing"):
        compute(cache)


@pytest.mark.parametrize("filtered", [0, 3, None, ["min_size"], {"min_size": "3"}, {"min_size": 0}, {"min_size": True}])
def test_a_part_whose_filtered_samples_are_not_counts_by_setting_is_refused(tmp_path: Path, filtered: Any) -> None:
    folder = Folder(str(tmp_path))
    record = replace(made_record("u", 0, True, random.Random(0)), filtered=filtered)
    (part,) = put(tmp_path, [record])
    with pytest.raises(CacheError, match=r"_commits/u\.json is corrupt: it does not describe its parts"):
        list(commit_scan.read_summaries(folder, IDENTITY))
    with pytest.raises(CacheError, match="cannot be read as the record of a part"):
        inspect_part(folder, part.file, IDENTITY)


def test_names_are_found_in_an_array() -> None:
    draw = random.Random(6)
    names = ["".join(draw.choices("ab-é1", k=draw.randint(1, 9))) for _ in range(500)]
    array = sort_names(names)
    assert list(iterate_names(array)) == sorted(names, key=str.encode)
    wanted = [*draw.sample(names, 50), "", "zz", names[0] + "long enough not to fit", "a" * 8]
    for name, index in zip(wanted, find_names(array, wanted).tolist(), strict=True):
        assert (index >= 0) == (name in names)
        assert index < 0 or array[index].decode() == name
    assert find_names(sort_names([]), ["a"]).tolist() == [-1]
    assert find_names(array, []).tolist() == []
