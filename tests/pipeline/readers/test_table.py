"""Tables of metadata and of paths, in the formats that people have."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ChangedError, ShardError
from pipeline.limits import Limits
from pipeline.readers.table import (
    NameRule,
    Table,
    find_path_column,
    load_table,
    normalize_paths,
    read_rows,
)
from pipeline.records import PlannedFile

RULE = NameRule("file_name", lambda schema: find_path_column(schema, None), normalize_paths)


def read(name: str, data: bytes | str, encoding: str = "utf-8", **limits: int) -> pa.Table:
    content = data if isinstance(data, bytes) else data.encode()
    return read_rows(io.BytesIO(content), name, Limits(**limits), encoding)


def types(table: pa.Table) -> dict[str, str]:
    return {field.name: str(field.type) for field in table.schema}


def test_columns_of_json_lines_have_their_types_and_texts_stay_texts() -> None:
    rows: list[dict[str, Any]] = [
        {"file_name": "a.jpg", "score": 1, "date": "2020-01-01", "tags": ["2020-01-01", "x"], "box": {"x": 1}},
        {"file_name": "b.jpg", "score": 1.5, "text": "caf\u00e9"},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    table = read("metadata.jsonl", b"\xef\xbb\xbf" + lines.encode())
    assert types(table) == {
        "file_name": "string",
        "score": "double",
        "date": "string",
        "tags": "list<item: string>",
        "box": "struct<x: int64>",
        "text": "string",
    }
    assert table.to_pylist()[0]["tags"] == ["2020-01-01", "x"]
    assert table.to_pylist()[1]["text"] == "caf\u00e9"
    assert read("a.jsonl", lines.encode("utf-16")).num_rows == 2
    assert read("a.jsonl", "\n").num_rows == 0
    polygons = [[[number, number], [0, 1]] for number in range(200)]
    assert read("a.jsonl", json.dumps({"polygons": polygons, "text": "[" * 200})).to_pylist()[0]["polygons"] == polygons


def test_columns_of_csv_are_numbers_only_if_nothing_is_lost() -> None:
    text = 'file_name,id,count,score,empty,text\r\n001.jpg,007,7,0.5,,"two\nlines, ""quoted"""\r\nb.jpg,12,,1e3,,NA\r\n'
    table = read("metadata.csv", text)
    assert table.to_pylist() == [
        {
            "file_name": "001.jpg",
            "id": "007",
            "count": 7,
            "score": 0.5,
            "empty": "",
            "text": 'two\nlines, "quoted"',
        },
        {"file_name": "b.jpg", "id": "12", "count": None, "score": 1000.0, "empty": "", "text": "NA"},
    ]
    assert read("a.tsv", "url\ttext\nhttp://x\ta, b\n").to_pylist() == [{"url": "http://x", "text": "a, b"}]
    assert read("a.csv", "file_name,text\na.jpg,caf\u00e9".encode("cp1252"), "cp1252")["text"].to_pylist() == [
        "caf\u00e9"
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_whole_numbers_of_json_beyond_64_bits_make_their_column_text(name: str) -> None:
    rows: list[dict[str, Any]] = [{"n": 1, "m": 2**63 - 1, "box": {"id": 1.5, "w": 2, "ok": True}, "ids": [1]}] * 5000
    rows += [{"n": 2**63, "m": -(2**63), "box": {"id": -(2**63) - 1, "w": 3, "ok": True}, "ids": [1, 10**40]}]
    table = read(name, json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    assert types(table) == {
        "n": "string",
        "m": "int64",
        "box": "struct<id: string, w: int64, ok: bool>",
        "ids": "list<item: string>",
    }
    first, last = table.slice(0, 1).to_pylist()[0], table.slice(5000).to_pylist()[0]
    assert (first["n"], first["box"]["id"], first["ids"]) == ("1", "1.5", ["1"])
    assert (last["n"], last["box"]["id"], last["ids"]) == (str(2**63), str(-(2**63) - 1), ["1", "1" + "0" * 40])


def test_columns_of_csv_that_name_rows_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,key,Filename,n\n1.50,2e1,1.0,1.50\n1.5,20,1,1.5\n")
    rule = NameRule("id", lambda schema: "id", lambda values: values)
    table = load_table(str(path), {}, None, rule, Limits())
    assert types(table.rows) == {"id": "string", "key": "string", "Filename": "string", "n": "double"}
    assert [table.find("1.50"), table.find("1.5")] == [0, 1]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ({"labels": [["00000/a.png", 6], ["00000/b.png", 0]]}, [("00000/a.png", 6), ("00000/b.png", 0)]),
        ({"a.png": {"caption": "x"}, "b.png": {"caption": "y"}}, [("a.png", "x"), ("b.png", "y")]),
        ([{"path": "a.png", "prompt": "x"}], [("a.png", "x")]),
    ],
)
def test_json_of_edm2_sd_scripts_and_pixart(content: object, rows: list[tuple[object, ...]]) -> None:
    assert [tuple(row.values()) for row in read("dataset.json", json.dumps(content)).to_pylist()] == rows


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", '{"a": 1}\nnonsense\n', "cannot be read as JSONL: line 2: "),
        ("a.jsonl", '{"a": 1}\n{"a": "x"}\n', "the column a has values of different types"),
        ("a.jsonl", '{"a": 1}\n' * 4096 + '{"a": "x"}\n', "Field a has incompatible types: int64 vs string"),
        ("a.jsonl", "[1]\n", "line 1 is not an object"),
        ("a.jsonl", '{"a":' * 100_000, "line 1: it is nested more than 100 levels deep"),
        ("a.jsonl", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: it is nested more than 100 levels deep"),
        (
            "a.jsonl",
            '{"a": "\\ud83d\\ude00"}\n\n{"a": "x\\ud83d"}',
            r"line 3: the column a has \\ud83d, half of a pair",
        ),
        ("a.jsonl", '{"a": {"\\udc00": ["x"]}}', r"line 1: the column a has \\udc00, half of a pair of surrogates"),
        ("a.json", '[{"a": 1}, {"b": ["\\ud83d"]}]', r"row 2: the column b has \\ud83d, half of a pair"),
        ("a.jsonl", '{"a": 1e999999999999999999999, "b": ' + "1" * 5000 + "}", "line 1: "),
        ("a.csv", "a,b\n1,2,3\n", "cannot be read as CSV: .*Expected 2 columns, got 3"),
        ("a.csv", "a,a\n1,2\n", "two columns have one name"),
        ("a.csv", 'a,b\n1,"x\n2,y\n3,z\n', "line 2: its opening quote is not closed"),
        ("a.csv", 'a,b\n1,"x\n2,"y"\n3,z\n', "line 2: its opening quote is closed in line 3, where text follows it"),
        ("a.csv", 'a,b\n1,"x" y\n', "line 2: its opening quote is closed in line 2, where text"),
        ("a.csv", '"a,b\n1,x\n', "line 1: its opening quote is not closed"),
        ("a.csv", b"a\ncaf\xe9\n", "cannot be read as CSV: .*--text-encoding"),
        ("a.json", "[1]", "neither a list of objects"),
        ("a.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.parquet", "no Parquet at all", "repair or remove"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(name: str, data: bytes | str, problem: str) -> None:
    with pytest.raises(ShardError, match=f"(?s){name} .*{problem}"):
        read(name, data)


def test_a_table_above_the_limit_is_refused_before_it_fills_the_memory() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": ["x" * 1000] * 10_000}), sink)  # a dictionary makes the file small
    assert len(sink.getvalue()) < 100_000
    for name, data in (("a.parquet", sink.getvalue()), ("a.jsonl", b'{"a": 1}\n' * 200_000)):
        with pytest.raises(ShardError, match=r"more than 1000000 bytes.*table_bytes"):
            read(name, data, table_bytes=1_000_000)


def test_rows_are_found_by_name() -> None:
    names = [None, "b.jpg", "./a.jpg", "x\\c.jpg", "\u00e9", "b.jpg", "\U0001f600"]
    table = Table.make(pa.table({"file_name": names, "n": range(7)}), RULE)
    wanted = ("a.jpg", "b.jpg", "x/c.jpg", "\u00e9", "\U0001f600", "zz", "")
    assert [table.find(name) for name in wanted] == [2, 1, 3, 4, 6, None, None]
    assert table.find_repeated_names() == ["b.jpg"]
    nothing = Table.make(pa.table({"caption": ["x"]}), RULE)
    assert (nothing.column, nothing.find("x"), nothing.find_repeated_names()) == ("", None, [])


@pytest.mark.parametrize(
    ("names", "wanted", "column"),
    [
        (["text", "file_name"], None, "file_name"),
        (["image_file_name", "mask_file_name"], None, "image_file_name"),
        (["target_file_name", "text"], None, "target_file_name"),
        (["target_file_name", "mask_file_name"], None, None),
        (["Image_Path", "caption"], None, "Image_Path"),
        (["file_name", "other"], "other", "other"),
        (["file_name"], "absent", "file_name"),
    ],
)
def test_the_column_of_paths(names: list[str], wanted: str | None, column: str | None) -> None:
    assert find_path_column(pa.schema([(name, pa.string()) for name in names]), wanted) == column


def test_a_table_is_read_once_and_again_if_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.jpg", "n": 1}\n')
    url = str(path)
    first = load_table(url, {}, None, RULE, Limits())
    results: list[Table] = []
    threads = [threading.Thread(target=lambda: results.append(load_table(url, {}, None, RULE, Limits()))) for _ in "ab"]
    for thread in threads:
        thread.start()
        thread.join()
    assert results == [first, first]
    assert all(table is first for table in results)
    path.write_text('{"file_name": "a.jpg", "n": 22}\n')
    assert load_table(url, {}, None, RULE, Limits()).rows["n"].to_pylist() == [22]
    with pytest.raises(ChangedError, match=r"metadata\.jsonl has changed since it was planned"):
        load_table(url, {}, PlannedFile("x/metadata.jsonl", 31, "m1"), RULE, Limits())
