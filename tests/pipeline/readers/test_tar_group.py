"""Groups of small tars: positions count through them, and unreadable ones are left out unless parts need them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ChangedError, LatentmillError, ShardError, SourceError
from pipeline.limits import Limits
from pipeline.readers import tar_group
from pipeline.readers.members import DEFAULT_WANTED
from pipeline.readers.skipped import APART, HIDDEN
from pipeline.readers.tar_group import LeftOutTars, read_tar_group, select_shards
from pipeline.records import Unit
from pipeline.sources.planned_files import fetch_current_version
from pipeline.sources.units import make_units
from tests.conftest import write_tar
from tests.listed_files import list_source_files

TARS = 5


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    """Return a group of tars with 0 to 4 samples. Each has a hidden file."""
    for number in range(TARS):
        members = {f"{key}.jpg": b"%d %d" % (number, key) for key in range(number)}
        write_tar(tmp_path / f"s/{number}.tar", {**members, "._hidden": b""})
    files = list_source_files((str(tmp_path / "s"),), {}, "nowhere")
    (unit,) = make_units(files, tar_groups=[files])
    return unit


def read(
    unit: Unit, left_out: LeftOutTars, skipped: Counter[str] | None = None, limits: Limits | None = None
) -> list[tuple[int, str, str]]:
    """Return the position, the shard and the key of each sample."""
    samples = read_tar_group(unit, {}, DEFAULT_WANTED, limits or Limits(), skipped or Counter(), left_out)
    return [(sample.position, sample.shard, sample.key) for sample in samples]


def expect(*tars: int) -> list[tuple[int, str, str]]:
    pairs = [(f"s/{number}.tar", str(key)) for number in tars for key in range(number)]
    return [(position, *pair) for position, pair in enumerate(pairs)]


def test_positions_count_through_the_tars_and_each_file_is_counted_once(unit: Unit) -> None:
    left_out, skipped = LeftOutTars(), Counter[str](other=1)  # of another unit
    assert read(unit, left_out, skipped) == expect(1, 2, 3, 4)
    assert (left_out.positions, skipped) == ({}, {HIDDEN: TARS, "other": 1, APART: 0})


@pytest.mark.parametrize("problem", ["truncated", "touched", "missing", "grown", "members", "not a tar"])
def test_a_tar_is_left_out_for_any_lasting_problem(
    unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    path, limits = tmp_path / "s/2.tar", Limits()
    data = path.read_bytes()
    if problem == "missing":
        path.unlink()
    elif problem == "grown":
        path.write_bytes(data + bytes(len(data)))  # it remains a valid tar
        monkeypatch.setattr(tar_group, "SMALL_TAR_BYTES", len(data))
    elif problem == "touched":
        path.touch()
    elif problem == "members":
        write_tar(path, {f"{key}.txt": b"" for key in range(9)})
        limits = replace(limits, members=6)
    else:
        path.write_bytes(data[:700] if problem == "truncated" else b"BZh" + data[3:])
    if problem not in ("touched", "missing"):
        unit = fetch_current_version(unit, {})
    left_out = LeftOutTars(settled=1)
    assert read(unit, left_out, limits=limits) == expect(1, 3, 4)
    assert left_out.positions == {"s/2.tar": 1}
    assert [left_out.list_before(end) for end in (1, 2)] == [(), ("s/2.tar",)]
    error: type[LatentmillError] = ChangedError if problem in ("touched", "grown") else ShardError
    with pytest.raises(error, match=r"s/2\.tar"):
        read(unit, LeftOutTars(settled=2), limits=limits)


def test_tars_that_are_left_out_already_are_not_read(unit: Unit, tmp_path: Path) -> None:
    (tmp_path / "s/3.tar").unlink()
    left_out = LeftOutTars()
    assert read(replace(unit, left_out=frozenset({"s/3.tar"})), left_out) == expect(1, 2, 4)
    assert left_out.positions == {"s/3.tar": 3}
    assert read(select_shards(unit, {"s/2.tar"}), LeftOutTars()) == expect(2)


def test_nothing_is_left_out_because_a_disk_is_missing(unit: Unit, tmp_path: Path) -> None:
    (tmp_path / "s").rename(tmp_path / "away")
    with pytest.raises(SourceError, match="missing or empty"):
        read(unit, LeftOutTars(settled=0))
