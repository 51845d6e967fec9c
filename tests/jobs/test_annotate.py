"""`latentmill annotate`: columns from tables and from the sources, as versions that readers see."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentmill import Cache, IdentityError
from latentmill.errors import CacheError, UsageError
from latentmill.loading.batch import BatchSettings, check_settings, make_batch
from latentmill.loading.index import read_index
from latentmill.loading.row_groups import GroupReader
from pipeline.sources import units
from pipeline.storage.folder import Folder
from tests.conftest import encoded, img2dataset_members, smooth, write_tar
from tests.jobs.conftest import FORMATS, encode_in_formats

Command = Callable[..., tuple[int, str, str]]
KEYS = [f"{number:09d}" for number in range(6)]  # in each of the two tars


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two tars with the same keys. Images have two sizes."""
    folder = tmp_path_factory.mktemp("annotate") / "s"
    for name in ("a", "b"):
        members = img2dataset_members(0, 3, height=64, width=64) | img2dataset_members(3, 3, height=64, width=96)
        write_tar(folder / f"{name}.tar", members)
    return folder


@pytest.fixture(scope="module")
def originals(source: Path, micro_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a cache of each format, with two parts per tar and two buckets."""
    return encode_in_formats(tmp_path_factory, source, micro_vae, "--buckets", 64, "--multiple-of", 8)


@pytest.fixture(params=FORMATS)
def cache(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of a cache."""
    return Path(shutil.copytree(originals[request.param], tmp_path / "c"))


@pytest.fixture
def parquet_cache(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["parquet"], tmp_path / "c"))


def read_all(cache: Path, **options: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Return all rows by shard and key."""
    opened = Cache.open(str(cache), **options)
    rows = [row for file in opened.files() for row in opened.rows(file)]
    found = {(row["shard"], row["key"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_rows() -> list[dict[str, Any]]:
    """Return a row per row of the cache, in another order than the cache."""
    rows = [
        {"shard": f"s/{name}.tar", "key": key, "txt": f"new {name} {key}", "score": number / 4}
        for number, (name, key) in enumerate((name, key) for key in KEYS for name in ("b", "a"))
    ]
    return rows[5:] + rows[:5]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def annotate(latentmill: Command, cache: Path, *argv: object) -> dict[str, Any]:
    code, out, err = latentmill("annotate", cache, *argv, "--json")
    assert code == 0, err
    return dict(json.loads(out))


def test_a_table_is_joined_by_shard_and_key(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    before = read_bytes(cache)
    table = write_table(tmp_path / "t.parquet", make_rows())
    old = read_all(cache)
    facts = annotate(latentmill, cache, "--from", table)
    assert (facts["rows"], facts["matched"], facts["unused"], facts["version"]) == (12, 12, 0, 1)
    assert {name: data for name, data in read_bytes(cache).items() if not name.startswith("_columns/")} == before
    rows = read_all(cache)
    expected = {(row["shard"], row["key"]): row for row in make_rows()}
    assert rows.keys() == expected.keys() == old.keys()
    for name, row in rows.items():
        assert (row["txt"], row["score"]) == (expected[name]["txt"], expected[name]["score"])
        rest = old[name].keys() - {"txt"}
        assert {column: row[column] for column in rest} == {column: old[name][column] for column in rest}
    code, out, _ = latentmill("verify", cache)
    assert (code, "all files match" in out) == (0, True), out


def test_rows_have_overlays_for_chosen_columns_and_rows(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    annotate(latentmill, cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    opened = Cache.open(str(cache))
    expected = {(row["shard"], row["key"]): row["score"] for row in make_rows()}
    for file in opened.files():
        rows = list(opened.rows(file))
        assert [row["score"] for row in rows] == [expected[row["shard"], row["key"]] for row in rows]
        last = len(rows) - 1
        assert [row["score"] for row in opened.rows(file, wanted=[0, last])] == [rows[0]["score"], rows[last]["score"]]
        chosen = [row["score"] for row in opened.rows(file, columns=["score"])]
        assert chosen == [row["score"] for row in rows]
        if file.endswith(".parquet"):
            assert list(next(opened.rows(file, columns=["score", "width"]))) == ["score", "width"]
            assert list(next(opened.rows(file, columns=["score"]))) == ["score"]
        for start in range(len(rows)):
            slice_ = opened.overlays.read(file, ["txt"], start, start + 1)
            assert slice_.to_pylist() == [{"txt": rows[start]["txt"]}]
        assert opened.overlays.read(file).column_names == ["txt", "score"]


def test_overlays_have_the_row_groups_of_their_parts(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    annotate(latentmill, cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    opened = Cache.open(str(cache))
    (version,) = opened.overlays.versions
    sizes = []
    for index in range(len(version)):
        entry = version[index]
        file = pq.ParquetFile(cache / "_columns/files" / entry.name)
        widths = [row["width"] for row in opened.rows(entry.file)]
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert groups == [widths.count(width) for width in dict.fromkeys(widths)], entry.file
        sizes.append(len(groups))
    assert max(sizes) == 2, "a part with two buckets is part of the test"


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "arrow", "folder", "glob", "dictionary"])
def test_tables_of_every_format_give_the_same_columns(
    latentmill: Command, parquet_cache: Path, tmp_path: Path, form: str
) -> None:
    rows = make_rows()
    path = tmp_path / f"t.{form}"
    if form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.Table.from_pylist(rows).schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows), max_chunksize=5)
    elif form in ("folder", "glob"):
        path.mkdir()
        (path / "_SUCCESS").touch()
        write_table(path / "1.parquet", rows[:5])
        write_table(path / "2.parquet", rows[5:])
        path = path / "*.parquet" if form == "glob" else path
    else:
        path = tmp_path / "t.parquet"
        table = pa.Table.from_pylist(rows)
        pq.write_table(table.set_column(0, "shard", table["shard"].dictionary_encode()), path)
    facts = annotate(latentmill, parquet_cache, "--from", path)
    assert facts["columns"] == {"txt": "string", "score": "double"}
    tables = {version.info.table for version in Cache.open(str(parquet_cache)).overlays.versions}
    assert tables == {{"folder": "t.folder", "glob": "t.glob", "dictionary": "t.parquet"}.get(form, f"t.{form}")}
    found = read_all(parquet_cache)
    assert {name: (row["txt"], row["score"]) for name, row in found.items()} == {
        (row["shard"], row["key"]): (row["txt"], row["score"]) for row in rows
    }


TYPES = {
    "int": pa.array(range(12), pa.int64()),
    "half": pa.array(np.arange(12, dtype=np.float16)),
    "flag": pa.array([True, None] * 6),
    "bytes": pa.array([bytes([n, 0, 255]) for n in range(12)]),
    "words": pa.array([[f"w{n}", None] if n % 3 else None for n in range(12)], pa.list_(pa.string())),
    "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(36, dtype=np.float16)), 3),
    "sparse": pa.array([[n, -n] if n % 2 else None for n in range(12)], pa.list_(pa.int32(), 2)),
    "struct": pa.array([{"a": n, "b": [n / 2]} for n in range(12)]),
    "day": pa.array(range(12), pa.date32()),
    "time": pa.array(range(12), pa.timestamp("us", "UTC")),
    "large": pa.array([f"l{n}" for n in range(12)], pa.large_string()),
    "nothing": pa.nulls(12),
    "dotted.name": pa.array(range(12), pa.int8()),
}


@pytest.mark.parametrize("name", TYPES)
def test_values_of_every_type_come_back(latentmill: Command, cache: Path, tmp_path: Path, name: str) -> None:
    rows = make_rows()
    keys = {column: [row[column] for row in rows] for column in ("shard", "key")}
    pq.write_table(pa.table({**keys, name: TYPES[name]}), tmp_path / "t.parquet")
    annotate(latentmill, cache, "--from", tmp_path / "t.parquet")
    opened = Cache.open(str(cache))
    kind = pa.string() if name == "nothing" else TYPES[name].type
    assert opened.overlays.schema == pa.schema([(name, kind)])
    by_row = {(row["shard"], row["key"]): value for row, value in zip(rows, TYPES[name].to_pylist(), strict=True)}
    for file in opened.files():
        read = list(opened.rows(file))
        expected = [by_row[row["shard"], row["key"]] for row in read]
        assert [row[name] for row in read] == expected
        table = opened.overlays.read(file)
        assert table.schema == pa.schema([(name, kind)])
        assert table[name].to_pylist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[3]], r"t\.parquet has several rows of the key 00000\d+ of the shard s/[ab]\.tar"),
        (
            lambda rows: [{"key": row["key"], "txt": "x"} for row in rows[:1]],
            r"t\.parquet needs a column 'shard', because keys repeat: s/a\.tar and s/b\.tar both have the key 0000",
        ),
        (lambda rows: [{"shard": "s/a.tar", "txt": "x"}], "has no column 'key' to join its rows by; it has shard, txt"),
        (lambda rows: [{"key": None, "txt": "x"}, {"key": "1", "txt": "x"}], "has no value in the column 'key'"),
        (
            lambda rows: [{"key": ["1"], "txt": "x"}],
            "the column 'key' of t.parquet is list<element: string>, ",
        ),
        (lambda rows: [{**row, "height": 3} for row in rows], "has the column height, whose values are those of the"),
        (lambda rows: [{"shard": "s/c.tar", "key": "x", "txt": "y"}], "no row of the cache has a row in t.parquet"),
        (lambda rows: [{"shard": row["shard"], "key": row["key"]} for row in rows], "has no column besides key and"),
    ],
)
def test_ambiguous_and_useless_tables_are_refused(
    latentmill: Command,
    parquet_cache: Path,
    tmp_path: Path,
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    message: str,
) -> None:
    table = write_table(tmp_path / "t.parquet", change(make_rows()))
    code, _, err = latentmill("annotate", parquet_cache, "--from", table)
    assert code == 2
    assert re.search(message, err), err
    assert not (parquet_cache / "_columns").exists(), "nothing is published"


def test_wrong_commands_are_refused(latentmill: Command, parquet_cache: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", make_rows())
    (tmp_path / "t.xlsx").touch()
    (tmp_path / "empty").mkdir()
    for argv, message in [
        ((), "annotate needs either --from TABLE or --refresh-columns"),
        (("--from", table, "--refresh-columns"), "annotate needs either --from TABLE or --refresh-columns"),
        (("--from", tmp_path / "x.parquet"), f"there is no source at {tmp_path}/x.parquet"),
        (("--from", tmp_path / "t.xlsx"), "a table is a file with one of the extensions .parquet, .arrow, "),
        (("--from", table, "--columns", "score,sccore"), "--columns: t.parquet has no column sccore"),
        (("--from", table, "--source", tmp_path), "--source has no effect with --from"),
        (("--refresh-columns", "--unmatched", "null"), "--unmatched has no effect with --refresh-columns"),
        (("--refresh-columns", "--columns", "score"), "the cache has no column score from its sources; it has "),
    ]:
        code, _, err = latentmill("annotate", parquet_cache, *argv)
        assert (code, message in err) == (2, True), err


def test_a_null_among_the_numbers_of_an_embedding_is_refused(
    latentmill: Command, parquet_cache: Path, tmp_path: Path
) -> None:
    rows = make_rows()
    values = pa.array([[1.0, None]] * 12, pa.list_(pa.float32(), 2))
    keys = {column: [row[column] for row in rows] for column in ("shard", "key")}
    pq.write_table(pa.table({**keys, "e": values}), tmp_path / "t.parquet")
    code, _, err = latentmill("annotate", parquet_cache, "--from", tmp_path / "t.parquet")
    assert (code, "the column e of t.parquet has a null among the numbers of a fixed-size list" in err) == (2, True), (
        err
    )


def test_rows_without_a_match_are_counted_and_null_kept_or_refused(
    latentmill: Command, cache: Path, tmp_path: Path
) -> None:
    rows = [*make_rows()[:10], {"shard": "s/c.tar", "key": "x", "txt": "y", "score": 1.0}]
    unmatched = {(row["shard"], row["key"]) for row in make_rows()[10:]}
    table, before = write_table(tmp_path / "t.parquet", rows), read_all(cache)
    code, _, err = latentmill("annotate", cache, "--from", table, "--unmatched", "error")
    assert code == 2
    assert "1 row of t.parquet matches no row of the cache, such as the key x of s/c.tar" in err
    assert "2 rows of the cache have no row in t.parquet, such as the key " in err
    code, out, err = latentmill("annotate", cache, "--from", table, "--unmatched", "null")
    assert (code, "annotated 10 rows of 12" in out) == (0, True), err
    assert "2 rows of the cache have no row in t.parquet" in err
    assert "the columns are null there" in err
    found = read_all(cache)
    assert {name for name, row in found.items() if row["txt"] is None} == unmatched
    facts = annotate(latentmill, cache, "--from", table)
    assert (facts["matched"], facts["unused"]) == (10, 1)
    assert all(row["txt"] is None for name, row in read_all(cache).items() if name in unmatched), "null is kept"
    shutil.rmtree(cache / "_columns")
    annotate(latentmill, cache, "--from", table)
    found = read_all(cache)
    assert {name for name, row in found.items() if row["txt"] == before[name]["txt"]} == unmatched
    assert {name for name, row in found.items() if row["score"] is None} == unmatched, "there is no older score"


def test_versions_are_chosen_by_number_and_by_digest(latentmill: Command, parquet_cache: Path, tmp_path: Path) -> None:
    first = annotate(latentmill, parquet_cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    again = [{**row, "txt": "again"} for row in make_rows()]
    table = write_table(tmp_path / "u.parquet", again)
    second = annotate(latentmill, parquet_cache, "--from", table, "--columns", "txt")
    assert (first["version"], second["version"], second["created"]) == (1, 2, True)
    texts = {
        version: {row["txt"] for row in read_all(parquet_cache, columns_version=version).values()}
        for version in (0, 1, 2, None, first["digest"], second["digest"])
    }
    assert texts[2] == texts[None] == texts[second["digest"]] == {"again"}
    assert texts[1] == texts[first["digest"]] == {row["txt"] for row in make_rows()}
    assert texts[0] == {f"image {number}" for number in range(6)}
    assert {row["score"] for row in read_all(parquet_cache).values()} == {row["score"] for row in make_rows()}
    with pytest.raises(UsageError, match="has no version 3 of its columns; it has: 1, 2"):
        Cache.open(str(parquet_cache), columns_version=3)
    with pytest.raises(IdentityError, match=r"no version of the columns of .* has the digest abc"):
        Cache.open(str(parquet_cache), columns_version="abc")
    third = annotate(latentmill, parquet_cache, "--from", table, "--columns", "txt")
    assert (third["version"], third["created"]) == (2, False), "the newest columns are the same"
    back = annotate(latentmill, parquet_cache, "--from", tmp_path / "t.parquet")
    assert (back["version"], back["digest"]) == (3, first["digest"]), "an earlier state can come back"
    code, out, _ = latentmill("stats", parquet_cache)
    assert (code, f"version 3: txt, score from t.parquet, columns digest {first['digest']}" in out) == (0, True), out
    assert "columns    version 3: txt, score from t.parquet" in latentmill("status", parquet_cache)[1]
    code, out, _ = latentmill("stats", parquet_cache, "--json")
    assert json.loads(out)["columns"]["digest"] == first["digest"]


def test_a_part_that_is_added_later_has_null_until_annotate_runs_again(
    latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    argv = ("encode", source, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill(*argv, "--max-shards", 1)[0] == 0
    table = write_table(tmp_path / "t.parquet", make_rows())
    assert annotate(latentmill, cache, "--from", table)["matched"] == 6
    assert latentmill(*argv)[0] == 0
    with pytest.warns(UserWarning, match=r"version 1 of the columns of .* \(txt, score\) does not cover all files"):
        rows = read_all(cache)
    assert sum(row["score"] is None and row["txt"] is None for row in rows.values()) == 6
    opened = Cache.open(str(cache))
    with pytest.warns(UserWarning, match="does not cover all files"):
        tables = [opened.overlays.read(file) for file in opened.files()]
    assert [len(table) for table in tables] == [6, 6]
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    facts = annotate(latentmill, copy, "--from", write_table(tmp_path / "one.parquet", make_rows()[:1]))
    assert (facts["matched"], facts["version"]) == (1, 2)
    assert all(row["txt"] is not None for row in read_all(copy).values()), "a part that was not covered keeps its texts"
    facts = annotate(latentmill, cache, "--from", table)
    assert (facts["matched"], facts["version"]) == (12, 2)
    assert all(row["score"] is not None for row in read_all(cache).values())
    assert len(list((cache / "_columns/files").iterdir())) == 2, "the overlay of the first part is shared"


def test_an_interrupted_command_is_finished_by_the_same_one(
    latentmill: Command, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "t.parquet", make_rows())
    whole = Path(shutil.copytree(cache, tmp_path / "whole"))
    annotate(latentmill, whole, "--from", table)
    expected, create = read_bytes(whole), Folder.create
    steps = len(list((whole / "_columns").rglob("*.parquet")))
    assert steps == 5
    for step in range(steps):
        left = [step]

        def create_some(folder: Folder, name: str, data: Any, left: list[int] = left) -> bool:
            if name.startswith("_columns/"):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            return create(folder, name, data)

        copy = Path(shutil.copytree(cache, tmp_path / f"copy-{step}"))
        monkeypatch.setattr(Folder, "create", create_some)
        assert latentmill("annotate", copy, "--from", table)[0] == 130
        monkeypatch.setattr(Folder, "create", create)
        assert Cache.open(str(copy)).overlays.number == 0, "readers see no version before it is complete"
        code, out, _ = latentmill("verify", copy)
        assert (code, "no version lists it" in out) == ((1, True) if step else (0, False))
        assert annotate(latentmill, copy, "--from", table)["created"]
        assert read_bytes(copy) == expected


def test_two_commands_at_once_get_two_numbers(
    latentmill: Command, parquet_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command publishes its version right before this one does."""
    table = write_table(tmp_path / "t.parquet", make_rows())
    other = write_table(tmp_path / "u.parquet", [{**row, "txt": "other"} for row in make_rows()])
    create, nested = Folder.create, []

    def create_after_another(folder: Folder, name: str, data: Any) -> bool:
        if name == "_columns/00001.parquet" and not nested:
            nested.append(name)
            assert latentmill("annotate", parquet_cache, "--from", other)[0] == 0
        return create(folder, name, data)

    monkeypatch.setattr(Folder, "create", create_after_another)
    assert annotate(latentmill, parquet_cache, "--from", table)["version"] == 2
    assert nested
    monkeypatch.undo()
    assert {row["txt"] for row in read_all(parquet_cache, columns_version=1).values()} == {"other"}
    assert {row["txt"] for row in read_all(parquet_cache).values()} == {row["txt"] for row in make_rows()}
    assert latentmill("verify", parquet_cache)[0] == 0


def flip(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


def list_overlays(cache: Path) -> list[Path]:
    return sorted((cache / "_columns/files").iterdir())


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda c: flip(list_overlays(c)[0], 40), "it differs from the overlay that version 1 lists"),
    "swapped": (lambda c: swap(*list_overlays(c)[:2]), "it differs from the overlay that version 1 lists"),
    "removed": (lambda c: list_overlays(c)[1].unlink(), "no such file or directory"),
    "version cut": (lambda c: (c / "_columns/00001.parquet").write_bytes(b"PAR1"), "cannot be read as a version"),
    "version edited": (lambda c: edit_version(c, matched=1), "was changed after it was written"),
    "version removed": (lambda c: (c / "_columns/00001.parquet").rename(c / "_columns/00002.parquet"), "it is missing"),
    "foreign": (lambda c: (c / "_columns/notes.txt").touch(), "unexpected file"),
    "foreign below": (lambda c: (c / "_columns/files/x.parquet").touch(), "no version lists it"),
    "part removed": (lambda c: sorted((c / "data").iterdir())[0].unlink(), "not a sound part of the cache"),
}


def edit_version(cache: Path, **fields: Any) -> None:
    path = cache / "_columns/00001.parquet"
    table = pq.read_table(path)
    info = json.loads(pq.read_metadata(path).metadata[b"latentmill"]) | fields
    pq.write_table(table.replace_schema_metadata({b"latentmill": json.dumps(info).encode()}), path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_damage_of_columns(latentmill: Command, cache: Path, tmp_path: Path, damage: str) -> None:
    annotate(latentmill, cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    change, message = DAMAGES[damage]
    change(cache)
    code, out, err = latentmill("verify", cache)
    assert (code, message in out) == (1, True), out + err
    assert "_columns/" in out


def test_a_wrong_join_is_found_by_its_keys(latentmill: Command, parquet_cache: Path, tmp_path: Path) -> None:
    """A version whose hashes are right, but whose overlays have the rows of a part in another order."""
    from pipeline.annotation.join import ColumnJoin, PartColumns

    read_parts = ColumnJoin.read_parts

    def reverse(join: ColumnJoin) -> Iterator[PartColumns]:
        for part in read_parts(join):
            rows = part.table.take(list(reversed(range(len(part.table)))))
            yield PartColumns(part.file, part.groups, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColumnJoin, "read_parts", reverse)
        annotate(latentmill, parquet_cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    code, out, _ = latentmill("verify", parquet_cache)
    assert (code, "its keys are not those of data/" in out) == (1, True), out


def test_damaged_overlays_are_named_by_readers(latentmill: Command, parquet_cache: Path, tmp_path: Path) -> None:
    annotate(latentmill, parquet_cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    overlay = list_overlays(parquet_cache)[0]
    data = overlay.read_bytes()
    digest = json.loads((parquet_cache / "stats.json").read_text())["digest"]
    assert Cache.open(str(parquet_cache), digest=digest, verify=True).overlays.number == 1
    footer = int.from_bytes(data[-8:-4], "little") + 8
    overlay.write_bytes(data[:4] + bytes(len(data) - footer - 4) + data[-footer:])
    with pytest.raises(IdentityError, match=r"the overlays of version 1 of the columns of .* were changed"):
        Cache.open(str(parquet_cache), digest=digest, verify=True)
    with pytest.raises(CacheError, match=rf"{overlay.name} is damaged"):
        list(read_all(parquet_cache))
    (parquet_cache / "_columns/00001.parquet").write_bytes(b"")
    with pytest.raises(CacheError, match=r"_columns/00001\.parquet cannot be read as a version of columns"):
        Cache.open(str(parquet_cache))
    assert read_all(parquet_cache, columns_version=0), "the cache without later columns can be read"


def test_edited_captions_of_tars_are_refreshed(latentmill: Command, cache: Path, source: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "s"))
    members = img2dataset_members(0, 3, height=64, width=64) | img2dataset_members(3, 3, height=64, width=96)
    members[f"{KEYS[1]}.txt"] = b"a much longer caption"
    del members[f"{KEYS[2]}.txt"], members[f"{KEYS[4]}.jpg"]
    write_tar(moved / "a.tar", members)
    before = read_all(cache)
    code, out, err = latentmill("annotate", cache, "--refresh-columns", "--source", moved)
    assert code == 0, err
    assert "refreshed the columns of 11 rows, of which 2 changed" in out
    assert f"1 row at the source, such as the key {KEYS[4]} of s/a.tar; they keep their columns" in out
    assert "columns    txt (2)" in out
    rows = read_all(cache)
    changed = {name: row["txt"] for name, row in rows.items() if row["txt"] != before[name]["txt"]}
    assert changed == {("s/a.tar", KEYS[1]): "a much longer caption", ("s/a.tar", KEYS[2]): None}
    assert latentmill("verify", cache)[0] == 0
    facts = annotate(latentmill, cache, "--refresh-columns", "--source", moved)
    assert (facts["changed"], facts["created"], facts["version"]) == (0, False, 1)


def test_rows_of_a_group_of_tars_are_told_apart_by_their_shards(
    latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "TARS_PER_GROUP", 2)
    copy, cache = Path(shutil.copytree(source, tmp_path / "s")), tmp_path / "c"
    options = ("--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill("encode", copy, "--to", cache, *options)[0] == 0
    assert len(Cache.open(str(cache)).files()) == 1, "both tars are in one part"
    table = pa.table({"shard": ["s/b.tar"], "key": [KEYS[1]], "score": [2.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert annotate(latentmill, cache, "--from", tmp_path / "t.parquet")["matched"] == 1
    members = img2dataset_members(0, 3, height=64, width=64) | img2dataset_members(3, 3, height=64, width=96)
    members[f"{KEYS[2]}.txt"] = b"another caption"
    write_tar(copy / "a.tar", members)
    before = read_all(cache)
    assert annotate(latentmill, cache, "--refresh-columns")["changed"] == 1
    rows = read_all(cache)
    assert [name for name, row in rows.items() if row["score"] is not None] == [("s/b.tar", KEYS[1])]
    changed = {name: row["txt"] for name, row in rows.items() if row["txt"] != before[name]["txt"]}
    assert changed == {("s/a.tar", KEYS[2]): "another caption"}
    code, out, err = latentmill("verify", cache)
    assert (code, err) == (0, ""), out


def test_captions_of_a_folder_are_refreshed_without_reading_its_images(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    assert encode(folder)[0] == 0
    (folder / "a/1.txt").write_text("edited")
    (folder / "a/2.txt").write_text("added")
    (folder / "b/3.json").unlink()
    next(folder.glob("b/1.*")).unlink()
    for image in (*folder.rglob("*.jpg"), *folder.rglob("*.png")):
        times = image.stat()
        image.write_bytes(b"")  # opening or reading it would fail
        os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, out, err = latentmill("annotate", tmp_path / "c", "--refresh-columns")
    assert code == 0, err
    assert "refreshed the columns of 4 rows, of which 3 changed" in out
    assert "1 row at the source, such as the key b/1 of photos" in out
    assert "planned inputs that do not exist any more: 1 (photos/b/1." in err
    rows = {key: row for (_, key), row in read_all(tmp_path / "c").items()}
    assert [rows[key]["txt"] for key in ("a/1", "a/2", "b/1", "b/2")] == ["edited", "added", None, None]
    assert rows["b/3"]["json"] is None


def test_tables_of_metadata_are_read_as_they_are_now(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    def write(*captions: str) -> None:
        rows = (json.dumps({"file_name": f"{n}.jpg", "caption": text}) for n, text in enumerate(captions))
        (tmp_path / "i/metadata.jsonl").write_text("\n".join(rows))

    (tmp_path / "i").mkdir()
    for number in range(3):
        (tmp_path / f"i/{number}.jpg").write_bytes(encoded(smooth(number, 64, 64)))
    write("zero", "one", "two")
    assert encode(tmp_path / "i")[0] == 0
    write("zero", "another one", "two")
    facts = annotate(latentmill, tmp_path / "c", "--refresh-columns")
    assert (facts["matched"], facts["changed_columns"]) == (3, {"caption": 1})
    captions = [row["caption"] for row in read_all(tmp_path / "c").values()]
    assert sorted(captions) == ["another one", "two", "zero"]


def test_a_damaged_tar_is_refreshed_up_to_its_damage(
    latentmill: Command, parquet_cache: Path, source: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "s"))
    members = img2dataset_members(0, 6, height=64, width=64)
    members[f"{KEYS[0]}.txt"] = b"edited"
    path = write_tar(moved / "a.tar", members)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, out, err = latentmill("annotate", parquet_cache, "--refresh-columns", "--source", moved)
    assert code == 0, err
    assert "of which 1 changed" in out
    assert "samples after that keep their columns" in err
    texts = {name: row["txt"] for name, row in read_all(parquet_cache).items()}
    assert texts["s/a.tar", KEYS[0]] == "edited"
    assert texts["s/a.tar", KEYS[5]] == "image 5"


def test_columns_of_parquet_files_and_manifests_are_refreshed(
    encode: Command, latentmill: Command, tmp_path: Path
) -> None:
    images = [encoded(smooth(number, 64, 64)) for number in range(4)]

    def write(first: int, count: int) -> None:
        rows = range(first, first + count)
        table = {
            "image": pa.array([images[number % 4] for number in rows]),
            "id": [f"k{number}" for number in rows],
            "text": [f"text {number} of {count}" for number in rows],
            "at": pa.array(list(rows), pa.timestamp("s")),
            "tags": [[f"t{number}", "x" * count] for number in rows],
        }
        (tmp_path / "p").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "p/0.parquet", row_group_size=2)

    write(0, 4)
    assert encode(tmp_path / "p", "--key-column", "id")[0] == 0
    write(1, 6)  # a row less, three more
    facts = annotate(latentmill, tmp_path / "c", "--refresh-columns")
    assert (facts["matched"], facts["changed"]) == (3, 3)
    assert facts["columns"] == {"text": "string", "tags": "list<element: string>"}, "`at` has not changed"
    texts = {key: (row["text"], row["tags"][1]) for (_, key), row in read_all(tmp_path / "c").items()}
    new = {f"k{number}": (f"text {number} of 6", "xxxxxx") for number in (1, 2, 3)}
    assert texts == {"k0": ("text 0 of 4", "xxxx"), **new}

    (tmp_path / "i").mkdir()
    for number, image in enumerate(images):
        (tmp_path / f"i/{number}.jpg").write_bytes(image)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"path": f"i/{n}.jpg", "text": f"old {n}"}) + "\n" for n in range(4)))
    assert encode(manifest, "--to", tmp_path / "d")[0] == 0
    lines = [json.dumps({"path": f"i/{n}.jpg", "text": f"new {n}" if n == 2 else f"old {n}"}) for n in (3, 2, 1, 0)]
    manifest.write_text("\n".join(lines))
    facts = annotate(latentmill, tmp_path / "d", "--refresh-columns")
    assert (facts["matched"], facts["changed"], facts["changed_columns"]) == (4, 1, {"text": 1})
    assert {row["text"] for row in read_all(tmp_path / "d").values()} == {"old 0", "old 1", "new 2", "old 3"}


def test_a_refresh_leaves_columns_that_a_table_replaced(
    latentmill: Command, parquet_cache: Path, tmp_path: Path
) -> None:
    annotate(latentmill, parquet_cache, "--from", write_table(tmp_path / "t.parquet", make_rows()))
    code, out, err = latentmill("annotate", parquet_cache, "--refresh-columns")
    assert (code, "of which 0 changed" in out) == (0, True), err
    assert "not refreshed, because version 1 replaced them by those of t.parquet: txt" in err
    assert {row["txt"] for row in read_all(parquet_cache).values()} == {row["txt"] for row in make_rows()}


def test_batches_and_single_rows_have_the_columns_that_came_later(
    latentmill: Command, cache: Path, tmp_path: Path
) -> None:
    rows = make_rows()
    table = pa.Table.from_pylist(rows)
    numbers = np.arange(3 * len(rows), dtype=np.float16)
    table = table.append_column("e", pa.FixedSizeListArray.from_arrays(pa.array(numbers), 3))
    pq.write_table(table, tmp_path / "t.parquet")
    annotate(latentmill, cache, "--from", tmp_path / "t.parquet")
    opened = Cache.open(str(cache))
    index, expected = read_index(opened), {(row["shard"], row["key"]): n for n, row in enumerate(rows)}
    rules = check_settings(opened, BatchSettings(columns=("score", "e")))
    reader, seen = GroupReader(opened, index, rules.columns), 0
    for group, (start, count) in enumerate(zip(index.starts.tolist(), index.rows.tolist(), strict=True)):
        batch = make_batch(rules, index, {group: reader.read(group)}, np.arange(start, start + count))
        places = [expected[name] for name in zip(batch["shard"], batch["key"], strict=True)]
        assert batch["captions"] == [rows[place]["txt"] for place in places]
        assert batch["score"].tolist() == [rows[place]["score"] for place in places]
        assert (batch["e"].shape, batch["e"].dtype) == ((count, 3), torch.float16)
        assert batch["e"].tolist() == [[3 * place, 3 * place + 1, 3 * place + 2] for place in places]
        seen += count
    assert seen == 12
    row = opened[opened.find("s/b.tar", KEYS[4])]
    assert row["captions"] == f"new b {KEYS[4]}"


def test_an_embedding_that_is_missing_in_a_batch_is_named(
    latentmill: Command, parquet_cache: Path, tmp_path: Path
) -> None:
    rows = make_rows()[1:]
    keys = {column: [row[column] for row in rows] for column in ("shard", "key")}
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(22, np.float32)), 2)
    pq.write_table(pa.table({**keys, "e": values}), tmp_path / "t.parquet")
    annotate(latentmill, parquet_cache, "--from", tmp_path / "t.parquet")
    opened = Cache.open(str(parquet_cache))
    index, missing = read_index(opened), make_rows()[0]
    row = opened.find(missing["shard"], missing["key"])
    group = int(np.searchsorted(index.starts, row, side="right")) - 1
    rules = check_settings(opened, BatchSettings(columns=("e",)))
    read = GroupReader(opened, index, rules.columns).read(group)
    with pytest.raises(UsageError, match=rf"the column e has no value in the row {missing['key']} of s/"):
        make_batch(rules, index, {group: read}, np.arange(index.starts[group], index.starts[group] + index.rows[group]))
