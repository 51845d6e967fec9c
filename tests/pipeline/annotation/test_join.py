"""The join of a table with the rows of a cache, against a dictionary, with buckets that do not fit into memory."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.annotation import spool
from pipeline.annotation.join import ColumnJoin
from pipeline.annotation.part_rows import PartRows
from pipeline.errors import UsageError

Row = tuple[str, str, int]  # shard, key, number


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a run for every few hundred bytes, and join about two kilobytes at a time."""
    monkeypatch.setattr(spool, "RUN_BYTES", 500)
    monkeypatch.setattr(spool, "GROUP_BYTES", 2000)


def make_part(number: int, rows: Sequence[Row], groups: Sequence[int], old: bool = False) -> PartRows:
    shards, keys, _ = zip(*rows, strict=True)
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string()), "shard": pa.array(shards, pa.string())}
    if old:
        columns["value"] = pa.array([value for _, _, value in rows], pa.int64())
    return PartRows(f"data/{number:03}.parquet", tuple(groups), pa.table(columns))


def run_join(join: ColumnJoin, tables: Sequence[pa.Table], parts: Sequence[PartRows]) -> dict[str, pa.Table]:
    for table in tables:
        join.add_table(table)
    join.close_table()
    for part in parts:
        join.add_part(part)
    join.join()
    return {part.file: part.table for part in join.read_parts()}


@pytest.mark.parametrize("has_shards", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_random_tables_join_as_a_dictionary_does(tmp_path: Path, small_runs: None, has_shards: bool, seed: int) -> None:
    rng = random.Random(seed)
    parts, names = [], []
    for number in range(40):
        shard = f"s/{number // 3}.tar"
        keys = [f"{number if not has_shards else number % 3}/{index}" for index in range(rng.randint(1, 30))]
        rng.shuffle(keys)
        split = rng.randint(0, len(keys) - 1)
        groups = [size for size in (split, len(keys) - split) if size]
        parts.append(make_part(number, [(shard, key, 0) for key in keys], groups))
        names += [(shard, key) for key in keys]
    in_table = rng.sample(names, len(names) // 2) + [("s/x.tar", f"x{index}") for index in range(20)]
    rng.shuffle(in_table)
    values = {name: (index, [f"v{index}"] * rng.randint(0, 3)) for index, name in enumerate(in_table)}
    rows = [
        {**({"shard": shard} if has_shards else {}), "key": key, "number": value[0], "words": value[1]}
        for (shard, key), value in values.items()
    ]
    tables = [pa.Table.from_pylist(rows[start : start + 50]) for start in range(0, len(rows), 50)]
    join = ColumnJoin("t", tmp_path, lambda table: table)
    joined = run_join(join, tables, parts)
    assert len(list(tmp_path.glob("joined-*.arrow"))) > 5, "several runs are part of the test"
    assert list(joined) == [part.file for part in parts]
    for part in parts:
        table = joined[part.file]
        assert table["key"].to_pylist() == part.rows["key"].to_pylist()
        pairs = zip(part.rows["shard"].to_pylist(), part.rows["key"].to_pylist(), strict=True)
        expected = [values.get(pair, (None, None)) for pair in pairs]
        assert list(zip(table["number"].to_pylist(), table["words"].to_pylist(), strict=True)) == expected
        assert table["matched"].to_pylist() == [number is not None for number, _ in expected]
    counts = join.counts
    assert (counts.rows, counts.matched) == (len(names), len(names) // 2)
    assert (counts.table_rows, counts.used) == (len(in_table), len(names) // 2)
    assert counts.unused[-1].startswith("x")
    assert counts.unmatched in set(names) - values.keys()


def test_current_values_are_kept_and_changes_counted(tmp_path: Path, small_runs: None) -> None:
    parts = [make_part(n, [("s", f"{n}/{i}", i) for i in range(9)], [9], old=True) for n in range(20)]
    rows = [{"key": f"{n}/{i}", "value": i + i % 2} for n in range(20) for i in range(6)]
    join = ColumnJoin("t", tmp_path)
    joined = run_join(join, [pa.Table.from_pylist(rows)], parts)
    assert all(table["value"].to_pylist() == [0, 2, 2, 4, 4, 6, 6, 7, 8] for table in joined.values())
    assert (join.counts.changed, join.counts.changed_rows, join.counts.matched) == ({"value": 60}, 60, 120)


@pytest.mark.parametrize(
    ("kind", "old", "new", "changed"),
    [
        (pa.string(), ["a", None, "b", None], ["a", None, None, "c"], 2),
        (pa.float64(), [1.0, float("nan"), None, 2.0], [1.0, float("nan"), None, 3.0], 1),
        (pa.list_(pa.string()), [["a"], [], None, ["b", None]], [["a"], None, None, ["b"]], 2),
        (pa.struct([("a", pa.int8())]), [{"a": 1}, {"a": None}, None, {"a": 2}], [{"a": 1}, None, None, {"a": 2}], 1),
        (pa.timestamp("ns"), [1, None, 2**62, 3], [1, None, 2**62, 4], 1),
        (pa.binary(), [b"\xff", None, b"", b"1"], [b"\xff", b"", b"", b"2"], 2),
    ],
)
def test_changes_of_every_type_are_counted(
    tmp_path: Path, kind: pa.DataType, old: list[Any], new: list[Any], changed: int
) -> None:
    keys = [str(index) for index in range(4)]
    columns = {"key": keys, "shard": ["s"] * 4, "value": pa.array(old, kind)}
    part = PartRows("data/0.parquet", (4,), pa.table(columns))
    join = ColumnJoin("t", tmp_path)
    (table,) = run_join(join, [pa.table({"key": keys, "value": pa.array(new, kind)})], [part]).values()
    assert join.counts.changed["value"] == changed
    assert repr(table["value"].to_pylist()) == repr(pa.array(new, kind).to_pylist())


def test_a_key_twice_is_found_although_its_rows_are_far_apart(tmp_path: Path, small_runs: None) -> None:
    parts = [make_part(0, [("s", str(index), 0) for index in range(300)], [300])]
    rows = [{"key": str(index), "value": index} for index in range(300)]
    with pytest.raises(UsageError, match=r"^t has several rows of the key 7: .*, or add a column 'shard'"):
        run_join(ColumnJoin("t", tmp_path), [pa.Table.from_pylist([*rows, {"key": "7", "value": 0}])], parts)


def test_a_key_may_be_in_two_parts_of_a_shard_but_not_of_two_shards(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"], "value": [1]})
    parts = [make_part(0, [("s", "a", 0)], [1]), make_part(1, [("s", "a", 0)], [1])]
    joined = run_join(ColumnJoin("t", tmp_path), [table], parts)
    assert [rows["value"].to_pylist() for rows in joined.values()] == [[1], [1]]
    parts[1] = make_part(1, [("r", "a", 0)], [1])
    (tmp_path / "2").mkdir()
    with pytest.raises(UsageError, match="t needs a column 'shard', because keys repeat: r and s both have the key a"):
        run_join(ColumnJoin("t", tmp_path / "2"), [table], parts)


def test_a_read_of_few_buckets_maps_only_their_rows(tmp_path: Path) -> None:
    rows = spool.Spool(tmp_path, "rows")
    numbers = np.random.default_rng(0).permutation(20_000)
    for start in range(0, 20_000, 1000):
        some = numbers[start : start + 1000]
        rows.add(pa.table({"n": some}), some % spool.BUCKETS)
    rows.close()
    read = rows.read(7, 9)
    assert read is not None
    assert sorted(read["n"].to_pylist()) == [n for n in range(20_000) if n % spool.BUCKETS in (7, 8)]
    assert rows.count_rows().sum() == 20_000
    ranges = list(spool.split_buckets(rows))
    assert (ranges[0][0], ranges[-1][1]) == (0, spool.BUCKETS)
