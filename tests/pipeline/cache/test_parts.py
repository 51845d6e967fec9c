"""What stands is the truth: twins of two kinds, copies, and `_commits` that are behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.cache import parts as part_files
from pipeline.cache import parts as parts_module
from pipeline.cache import stats
from pipeline.cache.commit_reader import Repair
from pipeline.cache.commits import commit_names, finished_units, inspect_committed, read_commits, write_commit
from pipeline.cache.parts import _create, find_empty_duplicates, find_part, inspect_part, is_retry_part
from pipeline.errors import CacheError
from pipeline.flow import UnitWorker
from pipeline.images.transform import Transform
from pipeline.limits import Limits
from pipeline.maintenance import retry
from pipeline.records import Unit
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import unit_of

IDENTITY = "the identity"
STRICT = Limits(image_bytes=10)  # every image is a reject


def parts(cache: Path) -> list[stats.Part]:
    return list(stats.read_parts(Folder(str(cache)), IDENTITY))


def commits(cache: Path) -> dict[str, dict[str, Any]]:
    folder = Folder(str(cache))
    return dict(read_commits(folder, sorted(commit_names(folder))))


def mend(cache: Path, again: bool = False) -> None:
    mending = Repair(identity=IDENTITY, container="parquet", again=again)
    assert list(stats.read_parts(Folder(str(cache)), IDENTITY, mending=mending))


@pytest.mark.parametrize("first", ["with rows", "without"])
def test_writers_that_disagree_whether_there_are_rows_count_once(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Two jobs with other limits: one finishes the unit while the other is about to publish its first part."""
    cache = tmp_path / "c"
    limits = {"with rows": Limits(), "without": STRICT}
    mine, other = (worker(cache, limits=limits[which]) for which in sorted(limits, key=lambda which: which == first))
    create, between = Folder.create, [other.run]

    def slow(self: Folder, name: str, data: bytes) -> bool:
        if between:
            between.pop()(unit)
        return create(self, name, data)

    monkeypatch.setattr(Folder, "create", slow)
    mine.run(unit)
    monkeypatch.undo()
    mend(cache)
    found = parts(cache)
    assert sum(part.rows + part.filtered + sum(part.rejects.values()) for part in found) == 10
    (done,) = commits(cache).values()
    standing = {part.file for part in found if part.rows or part.rejects}
    assert {part["file"] for part in done["parts"]} == standing
    rejects = "".join(path.read_text() for path in cache.glob("_rejects/*"))
    assert rejects.count("\n") == sum(sum(part.rejects.values()) for part in found)
    assert stats.summarize_tallies(found) == stats.summarize_tallies(parts(cache))


def test_who_comes_too_late_to_commit_a_unit_leaves_its_rejects_alone(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    """A writer that found no part with rows when it looked, and finishes after the one that wrote it."""
    worker(tmp_path / "late", limits=STRICT).run(unit)
    worker(tmp_path / "c").run(unit)
    late = find_part(Folder(str(tmp_path / "late")), unit.name, 0, IDENTITY)
    assert late is not None
    before = {path: path.read_bytes() for path in tmp_path.glob("c/_*/*")}
    write_commit(Folder(str(tmp_path / "c")), [late])
    assert {path: path.read_bytes() for path in tmp_path.glob("c/_*/*")} == before


def test_retries_that_disagree_whether_there_are_rows_count_once(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(tmp_path / "c", limits=STRICT).run(unit)
    folder = Folder(str(tmp_path / "c"))
    standing = [inspect_part(folder, file, IDENTITY) for file in part_files.list_part_files(folder)]
    (task,) = retry.make_tasks([unit], [part for part in standing if part])
    none_large_enough = Transform(resolution=64, min_size=1000)
    bare, full = (
        retry.RetryWorker(worker(tmp_path / "c", **given)) for given in ({"transform": none_large_enough}, {})
    )
    publish, between = _create, [bare.run]

    def slow(*given: Any) -> Any:
        if between:
            between.pop()(task)
        return publish(*given)

    monkeypatch.setattr(parts_module, "_create", slow)
    full.run(task)
    mend(tmp_path / "c")
    found = parts(tmp_path / "c")
    assert len(find_empty_duplicates(part_files.list_part_files(folder))) == 1, (
        "the first part; the others were adopted"
    )
    assert stats.summarize_tallies(found)["rejected"] == {"not_an_image": 1}
    assert sum(part.rows + part.filtered for part in found if part.supersedes) == 9
    retried = [part.file for part in part_files.retry_parts(folder, IDENTITY)]
    told = commits(tmp_path / "c")
    assert sorted(part["file"] for name in told if is_retry_part(name) for part in told[name]["parts"]) == retried


def test_a_copy_of_another_part_is_not_taken_for_it(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    other = unit_of(write_tar(tmp_path / "s/1.tar", img2dataset_members(10, 5)))
    encoder = worker(tmp_path / "c")
    encoder.run(unit)
    shutil.copy(tmp_path / f"c/data/{unit.name}-00000.parquet", tmp_path / f"c/data/{other.name}-00000.parquet")
    with pytest.raises(
        CacheError, match=f"{other.name}-00000.parquet holds the part data/{unit.name}-00000: it was copied"
    ):
        encoder.run(other)
    assert finished_units(Folder(str(tmp_path / "c"))) == {unit.name}


def test_a_file_that_a_late_writer_changed_is_committed_again(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path
) -> None:
    """On a store that lets the last writer win; the record in the file says what it is."""
    worker(tmp_path / "c").run(unit)
    cache, path = Folder(str(tmp_path / "c")), tmp_path / f"c/data/{unit.name}-00001.parquet"
    before = commits(tmp_path / "c")[unit.name]
    told = pq.read_metadata(path).metadata
    pq.write_table(pq.read_table(path).replace_schema_metadata(told), path, compression="gzip")
    mend(tmp_path / "c", again=True)
    after = commits(tmp_path / "c")[unit.name]
    standing = inspect_committed(cache, unit.name, IDENTITY, "parquet")
    assert [part["sha256"] for part in after["parts"]] == [part.sha256 for part in standing]
    assert after["parts"][1]["sha256"] != before["parts"][1]["sha256"]
    assert (after["run"], after["seconds"]) == (before["run"], before["seconds"])


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"parts": [1]}', '{"parts": [{}]}', '{"parts": [{"file": "a", "sha256": ""}]}', "[" * 99_999],
)
def test_a_commit_that_is_none_is_named(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, content: str
) -> None:
    worker(tmp_path / "c").run(unit)
    (path,) = tmp_path.glob("c/_commits/*.json")
    path.write_text(content)
    with pytest.raises(CacheError, match=f"{path.name}.*; run latentmill verify, which says what to do"):
        parts(tmp_path / "c")


def test_commits_are_read_before_the_listing(
    worker: Callable[..., UnitWorker], unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that another job finishes meanwhile is in the sum, and no damage."""
    encoder, listed = worker(tmp_path / "c"), part_files.list_part_files

    def files(cache: Folder) -> list[str]:
        monkeypatch.undo()
        encoder.run(unit)
        return listed(cache)

    monkeypatch.setattr(parts_module, "list_part_files", files)
    assert sum(part.rows for part in parts(tmp_path / "c")) == 9
