"""Parts that exist twice, with and without rows; copied parts; and commits that do not name the existing parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.cache import commit_scan, stats
from pipeline.cache import parts as part_files
from pipeline.cache import parts as parts_module
from pipeline.cache.commit_scan import CacheScan, Repair, read_summaries
from pipeline.cache.commits import inspect_committed, list_commits, list_finished_units, read_commits, write_commit
from pipeline.cache.part_info import PartSummary
from pipeline.cache.parts import (
    _create,
    find_part,
    find_twins,
    inspect_part,
    is_retry_part,
    read_part_record,
)
from pipeline.errors import CacheError
from pipeline.flow import UnitWorker
from pipeline.formats import parquet
from pipeline.formats.schema import OutputSchema
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.maintenance import retry
from pipeline.records import Container, Unit
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, slow_param, write_tar
from tests.pipeline.conftest import unit_of

IDENTITY = "the identity"
STRICT = Limits(image_bytes=10)  # every image is a reject


def parts(cache: Path) -> list[PartSummary]:
    return list(read_summaries(Folder(str(cache)), IDENTITY))


def commits(cache: Path) -> dict[str, dict[str, Any]]:
    folder = Folder(str(cache))
    return dict(read_commits(folder, sorted(list_commits(folder))))


def repair_commits(cache: Path, rehash: bool = False) -> None:
    repair = Repair(identity_sha256=IDENTITY, container="parquet", rehash=rehash)
    assert list(read_summaries(Folder(str(cache)), IDENTITY, repair=repair))


@pytest.mark.parametrize("first", ["with rows", "without"])
def test_a_part_counts_once_if_two_writers_disagree_on_its_rows(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Two jobs with different limits: one finishes the unit while the other is about to publish its first part."""
    cache = tmp_path / "c"
    limits = {"with rows": Limits(), "without": STRICT}
    slow, fast = (worker(cache, limits=limits[name]) for name in sorted(limits, key=lambda name: name == first))
    create, interruptions = Folder.create, [fast.run]

    def create_later(self: Folder, name: str, data: bytes) -> bool:
        if interruptions:
            interruptions.pop()(unit)
        return create(self, name, data)

    monkeypatch.setattr(Folder, "create", create_later)
    slow.run(unit)
    monkeypatch.undo()
    repair_commits(cache)
    summaries = parts(cache)
    assert sum(part.rows + sum(part.filtered.values()) + sum(part.reject_counts.values()) for part in summaries) == 10
    (commit,) = commits(cache).values()
    counted = {part.file for part in summaries}
    assert {entry["file"] for entry in commit["parts"]} == counted
    rejects = "".join(path.read_text() for path in cache.glob("_rejects/*"))
    assert rejects.count("\n") == sum(sum(part.reject_counts.values()) for part in summaries)
    assert stats.summarize_parts(summaries) == stats.summarize_parts(parts(cache))


def test_statistics_of_a_part_without_rows_are_replaced_once_it_exists_with_rows(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer without rows commits, and its statistics are written. Then a slower writer with rows ends."""
    folder, repair = Folder(str(tmp_path / "c")), Repair(identity_sha256=IDENTITY, container="parquet")
    serialize, written = parquet.serialize_part, list[dict[str, Any]]()

    def compute_stats() -> dict[str, Any]:
        return stats.compute_stats(CacheScan(folder, repair), IDENTITY)

    def finish_the_other_first(*arguments: Any) -> bytes:
        monkeypatch.undo()
        worker(tmp_path / "c", limits=STRICT).run(unit)
        written.append(compute_stats())
        return serialize(*arguments)

    monkeypatch.setattr(parquet, "serialize_part", finish_the_other_first)
    slow = worker(tmp_path / "c")
    slow.run(unit)
    assert (written[0]["count"], sum(written[0]["rejected"].values())) == (0, 10)
    for _ in range(2):  # the second time from the commit log
        content = compute_stats()
        assert content["count"] + sum(content["rejected"].values()) == 10
        counted_once = stats.summarize_parts(parts(tmp_path / "c"))
        assert content | {"files": 3, "digest": counted_once["digest"]} == counted_once
    (commit,) = commits(tmp_path / "c").values()
    files = set(part_files.list_part_files(folder)) - find_twins(part_files.list_part_files(folder))
    assert {entry["file"] for entry in commit["parts"]} == files


def test_a_writer_that_commits_too_late_does_not_change_the_rejects(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    """The writer found no part with rows when it looked, and finishes after the writer of such a part."""
    worker(tmp_path / "late", limits=STRICT).run(unit)
    worker(tmp_path / "c").run(unit)
    late = find_part(Folder(str(tmp_path / "late")), unit.name, 0, IDENTITY)
    assert late is not None
    before = {path: path.read_bytes() for path in tmp_path.glob("c/_*/*")}
    write_commit(Folder(str(tmp_path / "c")), [late])
    assert {path: path.read_bytes() for path in tmp_path.glob("c/_*/*")} == before


def test_a_part_counts_once_if_two_retries_disagree_on_its_rows(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(tmp_path / "c", limits=STRICT).run(unit)
    folder = Folder(str(tmp_path / "c"))
    records = part_files.read_counted_records(folder, part_files.list_part_files(folder), IDENTITY)
    (task,) = retry.make_tasks([unit], records)
    all_too_small = Transform(resolution=64, min_size=1000)
    without_rows, with_rows = (
        retry.RetryWorker(worker(tmp_path / "c", **options)) for options in ({"transform": all_too_small}, {})
    )
    create, interruptions = _create, [without_rows.run]

    def create_later(*arguments: Any) -> Any:
        if interruptions:
            interruptions.pop()(task)
        return create(*arguments)

    monkeypatch.setattr(parts_module, "_create", create_later)
    with_rows.run(task)
    repair_commits(tmp_path / "c")
    summaries = parts(tmp_path / "c")
    assert len(find_twins(part_files.list_part_files(folder))) == 1, (
        "only the first part exists twice; the retry adopts the others"
    )
    assert stats.summarize_parts(summaries)["rejected"] == {"not_an_image": 1}
    assert sum(part.rows + sum(part.filtered.values()) for part in summaries if part.supersedes) == 9
    files = part_files.list_part_files(folder)
    twins = find_twins(files)
    retried = sorted(file for file in files if is_retry_part(file.rpartition(".")[0]) and file not in twins)
    contents = commits(tmp_path / "c")
    entries = [entry for name, content in contents.items() if is_retry_part(name) for entry in content["parts"]]
    assert sorted(entry["file"] for entry in entries) == retried


def test_a_copy_of_another_part_is_refused(worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path) -> None:
    other = unit_of(write_tar(tmp_path / "s/1.tar", img2dataset_members(10, 5)))
    encoder = worker(tmp_path / "c")
    encoder.run(unit)
    shutil.copy(tmp_path / f"c/data/{unit.name}-00000.parquet", tmp_path / f"c/data/{other.name}-00000.parquet")
    with pytest.raises(
        CacheError, match=f"{other.name}-00000.parquet holds the part data/{unit.name}-00000: it was copied"
    ):
        encoder.run(other)
    assert list_finished_units(Folder(str(tmp_path / "c"))) == {unit.name}


@pytest.mark.parametrize("record_bytes", [512, 1500, 25_000])
@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_record_is_read_without_the_rows(
    worker: Callable[..., UnitWorker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: Container,
    record_bytes: int,
) -> None:
    monkeypatch.setattr(parts_module, "RECORD_BYTES", record_bytes)
    unit = unit_of(write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 60, height=64, width=64)))
    worker(tmp_path / "c", layout=OutputSchema(container=container), rows_per_part=60).run(unit)
    (file,) = part_files.list_part_files(Folder(str(tmp_path / "c")))
    part = inspect_part(Folder(str(tmp_path / "c")), file, IDENTITY)
    read_slice, sizes = Folder.read_slice, list[int]()

    def count_bytes(self: Folder, name: str, start: int, end: int | None = None) -> bytes | None:
        data = read_slice(self, name, start, end)
        sizes.append(len(data or b""))
        return data

    monkeypatch.setattr(Folder, "read_slice", count_bytes)
    record = read_part_record(Folder(str(tmp_path / "c")), file, IDENTITY)
    assert part is not None
    assert record == part.record
    assert len(sizes) == (1 if record_bytes == 25_000 else 2)
    assert sum(sizes) < part.bytes


@pytest.mark.parametrize("size", [slow_param(1), 100, 10_000_000])
@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_part_is_hashed_in_blocks(
    worker: Callable[..., UnitWorker],
    unit: Unit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: Container,
    size: int,
) -> None:
    """A block of one byte divides every size, so there is no short block at the end."""
    monkeypatch.setattr(parts_module, "HASHED_AT_ONCE", size)
    worker(tmp_path / "c", layout=OutputSchema(container=container)).run(unit)
    folder = Folder(str(tmp_path / "c"))
    for entry in commits(tmp_path / "c")[unit.name]["parts"]:
        part = inspect_part(folder, entry["file"], IDENTITY)
        assert part is not None
        assert (part.sha256, part.bytes) == (entry["sha256"], entry["bytes"])
        assert part.to_commit_entry() == {**entry, "range": None}


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("damage", [b"", b"x", b"PAR1", bytes(2000), b"\xff" * 70_000, b"\xff" * 70_000 + b"PAR1"])
def test_a_file_without_a_record_is_an_error_with_its_name(tmp_path: Path, container: Container, damage: bytes) -> None:
    folder, name = Folder(str(tmp_path)), f"data/u-00000{parts_module.PART_FORMATS[container].SUFFIX}"
    folder.replace(name, damage)
    for read in (inspect_part, read_part_record):
        with pytest.raises(CacheError, match=rf"{name} is not a part of a latentmill cache: it has no readable record"):
            read(folder, name, IDENTITY)


def test_a_file_that_a_late_writer_overwrote_is_committed_again(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    """On a store where the last writer wins, the record in the file still tells which part it is."""
    worker(tmp_path / "c").run(unit)
    cache, path = Folder(str(tmp_path / "c")), tmp_path / f"c/data/{unit.name}-00001.parquet"
    before = commits(tmp_path / "c")[unit.name]
    metadata = pq.read_metadata(path).metadata
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path, compression="gzip")
    repair_commits(tmp_path / "c", rehash=True)
    after = commits(tmp_path / "c")[unit.name]
    committed = inspect_committed(cache, unit.name, IDENTITY, "parquet")
    assert [entry["sha256"] for entry in after["parts"]] == [part.sha256 for part in committed]
    assert after["parts"][1]["sha256"] != before["parts"][1]["sha256"]
    assert (after["run"], after["seconds"]) == (before["run"], before["seconds"])


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"parts": [1]}', '{"parts": [{}]}', '{"parts": [{"file": "a", "sha256": ""}]}', "[" * 99_999],
)
def test_a_damaged_commit_is_an_error_with_its_name(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, content: str
) -> None:
    worker(tmp_path / "c").run(unit)
    (path,) = tmp_path.glob("c/_commits/*.json")
    path.write_text(content)
    with pytest.raises(CacheError, match=f"{path.name}.*; run latentmill verify, which says what to do"):
        parts(tmp_path / "c")
    with pytest.raises(CacheError, match=path.name):  # a worker finds the commit of another job
        worker(tmp_path / "c").run(unit)


@pytest.mark.parametrize("groups", [None, [[1, 2, 3, 4]], [["1", 2, 3, 4, 5]], [1], {"rows": 1}])
def test_a_commit_with_other_row_groups_is_an_error_with_its_name(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, groups: object
) -> None:
    worker(tmp_path / "c").run(unit)
    (path,) = tmp_path.glob("c/_commits/*.json")
    content = json.loads(path.read_text())
    content["parts"][0]["groups"] = groups
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=f"{path.name} is corrupt: it does not describe its parts"):
        parts(tmp_path / "c")


def test_commits_are_read_before_the_listing(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that another job finishes during the scan counts, and is not reported as damage."""
    encoder, list_files = worker(tmp_path / "c"), commit_scan.list_files

    def finish_and_list(cache: Folder) -> Any:
        monkeypatch.undo()
        encoder.run(unit)
        return list_files(cache)

    monkeypatch.setattr(commit_scan, "list_files", finish_and_list)
    assert sum(part.rows for part in parts(tmp_path / "c")) == 9
