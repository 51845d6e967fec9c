"""Tables of columns are read some rows at a time, with the types that whole columns have."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedError, ShardError
from pipeline.limits import Limits
from pipeline.readers import table as tables
from pipeline.readers.column_table import ColumnTable
from tests.listed_files import list_source_files


def open_table(*paths: Path) -> ColumnTable:
    files = [file for path in paths for file in list_source_files((str(path),), {}, "nowhere")]
    return ColumnTable(files, {}, Limits(), None)


def read_whole(table: ColumnTable) -> pa.Table:
    return table.convert(pa.concat_tables(table.read(), promote_options="permissive"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "", "-3"], pa.int64()),
        (["1", "2.5", ""], pa.float64()),
        (["1", "007"], pa.string()),
        (["", ""], pa.string()),
        (["1", "x"], pa.string()),
        (["9" * 25, "1"], pa.string()),
        (["9" * 25, "1.5"], pa.string()),
        (["9" * 17, "1"], pa.int64()),
        (["9" * 17, "1.5"], pa.string()),
        (["1.5", "9" * 17], pa.string()),
        (["9" * 15, "2e3", "inf", "-0"], pa.float64()),
        (["nan", "1"], pa.string()),
        (["-0", "1"], pa.string()),
    ],
)
def test_a_column_of_a_csv_has_one_type_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], kind: pa.DataType
) -> None:
    """The first half of the file has the first value only."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 256)
    column = [values[0]] * 200 + values
    path = tmp_path / "t.csv"
    path.write_text("key,value\n" + "".join(f"k{n},{value}\n" for n, value in enumerate(column)))
    table = open_table(path)
    assert len(list(table.read())) > 3
    read = read_whole(open_table(path))
    assert read["value"].type == kind
    texts = pa.chunked_array([pa.array(column)])
    assert read["value"].equals(tables.convert_numbers(texts, tables.choose_type(tables.find_written(texts))))
    assert read["key"].to_pylist() == [f"k{n}" for n in range(len(column))]


def test_quoted_lines_and_a_byte_order_mark_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffkey,text\na,"one\ntwo, three"\nb,""\n', encoding="utf-8")
    assert read_whole(open_table(path)).to_pylist() == [
        {"key": "a", "text": "one\ntwo, three"},
        {"key": "b", "text": ""},
    ]


def test_types_of_jsonl_rows_and_parquet_files_are_joined(tmp_path: Path) -> None:
    lines = [{"key": f"k{n}", "n": n} for n in range(5000)] + [{"key": "last", "n": 0.5, "more": ["x"]}]
    (tmp_path / "t.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)), encoding="utf-8")
    read = read_whole(open_table(tmp_path / "t.jsonl"))
    assert (len(read), read["n"].type, read["more"].type) == (5001, pa.float64(), pa.list_(pa.string()))
    assert read["n"].to_pylist()[-2:] == [4999.0, 0.5]
    pq.write_table(pa.table({"key": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"key": ["b"], "n": pa.array([2], pa.int64())}), tmp_path / "2.parquet")
    read = read_whole(open_table(tmp_path / "1.parquet", tmp_path / "2.parquet"))
    assert (read["n"].type, read["n"].to_pylist()) == (pa.int64(), [1, 2])


def test_large_rows_of_a_parquet_file_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    value = bytes(1 << 20)
    pq.write_table(
        pa.table({"key": [str(n) for n in range(50)], "v": [value] * 50}), tmp_path / "t.parquet", use_dictionary=False
    )
    batches = [table for table in open_table(tmp_path / "t.parquet").read() if len(table)]
    assert sum(map(len, batches)) == 50
    assert max(table.nbytes for table in batches) < 20 << 20


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 is not all")
    with pytest.raises(DamagedError, match=r"t\.parquet is not a Parquet file"):
        list(open_table(tmp_path / "t.parquet").read())
    (tmp_path / "t.jsonl").write_text('{"key": 1}\n{"key": \n')
    with pytest.raises(ShardError, match=r"t\.jsonl cannot be read as JSONL: line 2"):
        list(open_table(tmp_path / "t.jsonl").read())
    (tmp_path / "n.jsonl").write_text('{"key": "a", "n": 12345678901234567890}\n')
    with pytest.raises(ShardError, match=r"the column n has a whole number beyond 64 bits"):
        list(open_table(tmp_path / "n.jsonl").read())
    (tmp_path / "t.csv").write_text("key,v\na,1\nb\n")
    with pytest.raises(ShardError, match=r"t\.csv cannot be read as CSV"):
        list(open_table(tmp_path / "t.csv").read())
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    pq.write_table(pa.table({"key": ["a"], "v": latin}), tmp_path / "l.parquet")
    with pytest.raises(ShardError, match=r"l\.parquet cannot be read as PARQUET: .*UTF8"):
        list(open_table(tmp_path / "l.parquet").read())
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(ShardError, match=r"e\.csv is empty"):
        list(open_table(tmp_path / "e.csv").read())
