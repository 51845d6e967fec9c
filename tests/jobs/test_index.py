"""index.parquet says what the footers and headers of the files say, after each command that changes a cache."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import finalize
from latentmill import Cache, group_spans
from latentmill.group_spans import GroupSpan, list_parquet_groups, list_tar_groups
from pipeline.cache import index
from pipeline.canonical_json import canonical_json
from pipeline.errors import StorageError
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]
Encode = Callable[..., int]
FORMATS = pytest.mark.parametrize("container", ["parquet", "webdataset"])
LISTS = ("rows", "start", "stop", "height", "width")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return four tars: two with images of two shapes and a large one, one of rejects, one of a single image."""
    for number in range(2):
        members = img2dataset_members(20 * number, 6, height=64, width=96)
        members |= img2dataset_members(20 * number + 6, 6, height=96, width=64)
        members |= img2dataset_members(20 * number + 12, 1, height=300, width=400)
        write_tar(tmp_path / f"s/{number}.tar", members)
    write_tar(tmp_path / "s/2.tar", dict.fromkeys(("50.jpg", "51.jpg"), b"no image"))
    write_tar(tmp_path / "s/3.tar", img2dataset_members(60, 1, height=64, width=64))
    return tmp_path / "s"


@pytest.fixture
def encode(
    latentmill: Command, micro_vae: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Encode:
    """Return the command for that source, with two rows per group. It returns the exit code."""
    monkeypatch.setattr(group_spans, "GROUP_BYTES", 4 * 8 * 8 * 2 * 2)  # two latents of 64 x 64 px
    options = ("--buckets", 64, "--multiple-of", 16, "--rows-per-part", 8, "--workers", 0, "--max-reject-rate", 1)

    def run(*more: object, vae: Path = micro_vae, cache: Path = tmp_path / "c") -> int:
        return latentmill("encode", source, "--to", cache, "--vae", vae, *options, *more)[0]

    return run


def read_index(cache: Path) -> dict[str, tuple[int, list[GroupSpan]]]:
    """Return the size and the groups of each file, as the index has them."""
    rows = pq.read_table(cache / index.NAME).to_pylist()
    names = [row["file"] for row in rows]
    assert names == sorted(set(names))
    groups = {row["file"]: zip(*(row[name] for name in LISTS), strict=True) for row in rows}
    return {row["file"]: (row["bytes"], [GroupSpan(*group) for group in groups[row["file"]]]) for row in rows}


def check(cache: Path) -> int:
    """Compare the index with the files, and read each group from its own bytes. Returns the number of groups."""
    found = read_index(cache)
    stats = json.loads((cache / "stats.json").read_text())
    metadata = pq.read_metadata(cache / index.NAME).metadata
    assert metadata[b"latentmill"] == canonical_json({"digest": stats["digest"], "format": 1})
    for file in sorted((cache / "data").iterdir()):
        size, groups = found.pop(file.name)
        data = file.read_bytes()
        assert size == len(data)
        read = read_tar_groups if file.suffix == ".tar" else read_parquet_groups
        keys = [key for group in groups for key in read(data, group)]
        assert keys == [row["key"] for row in Cache.open(str(cache)).rows(f"data/{file.name}")]
        expected = (
            list_tar_groups(io.BytesIO(data)) if file.suffix == ".tar" else list_parquet_groups(pq.read_metadata(file))
        )
        assert groups == expected
        stats["count"] -= sum(group.rows for group in groups)
    assert not found, "files that do not exist"
    assert stats["count"] == 0
    return sum(len(groups) for _, groups in read_index(cache).values())


def read_tar_groups(data: bytes, group: GroupSpan) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data[group.start : group.stop]), mode="r|") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    rows = [json.loads(content) for name, content in members if name.endswith(".latent.json")]
    assert {(row["height"], row["width"]) for row in rows} == {(group.height, group.width)}
    assert len(rows) == group.rows
    return [row["key"] for row in rows]


def read_parquet_groups(data: bytes, group: GroupSpan) -> list[str]:
    sparse = bytearray(len(data))
    sparse[group.start : group.stop] = data[group.start : group.stop]
    footer = pq.read_metadata(io.BytesIO(data))
    file = pq.ParquetFile(io.BytesIO(sparse), metadata=footer, page_checksum_verification=True)
    starts = [found.start for found in list_parquet_groups(footer)]
    table = file.read_row_group(starts.index(group.start))
    assert (table.num_rows, table["height"].unique().to_pylist()) == (group.rows, [group.height])
    return [str(key) for key in table["key"].to_pylist()]


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("flip", ["none", "both"])
def test_the_index_is_what_the_files_say(
    encode: Encode, latentmill: Command, tmp_path: Path, container: str, flip: str
) -> None:
    """A part of a run, the rest, a retry, and a rebuild without commits and log."""
    cache, settings = tmp_path / "c", ("--format", container, "--flip", flip)
    strict = ("--input-limit", "image_bytes=6000")
    assert encode(*settings, *strict, "--max-shards", 1) == 0
    before = check(cache)
    assert encode(*strict) == 0
    assert 2 * before < check(cache) + 1
    assert list((cache / "_empty").iterdir())
    assert latentmill("retry", cache, "--workers", 0)[0] == 0
    assert list((cache / "data").glob("*r1.*"))
    after = check(cache)
    assert after > 2 * before
    if flip == "both":
        assert all(group.rows == 1 for _, groups in read_index(cache).values() for group in groups)
    for _ in range(2):
        assert latentmill("verify", cache)[0] == 0
        written = (cache / index.NAME).read_bytes()
        for folder in ("_commits", "_log", "_rejects"):
            shutil.rmtree(cache / folder)
        (cache / index.NAME).unlink()
        assert latentmill("verify", cache, "--rebuild")[0] == 0
        assert (cache / index.NAME).read_bytes() == written
    assert check(cache) == after


@FORMATS
def test_parts_that_exist_without_commits_are_in_the_index(encode: Encode, tmp_path: Path, container: str) -> None:
    """The job was killed before it committed: the groups come from the files, without the log."""
    cache = tmp_path / "c"
    assert encode("--format", container) == 0
    written = (cache / index.NAME).read_bytes()
    for folder in ("_commits", "_log", "_rejects"):
        shutil.rmtree(cache / folder)
    (cache / index.NAME).unlink()
    assert encode() == 0
    assert (cache / index.NAME).read_bytes() == written
    check(cache)


@FORMATS
def test_a_crash_before_the_index_is_repaired_by_the_next_run(
    encode: Encode, latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    cache = tmp_path / "c"
    assert encode("--format", container, "--max-shards", 1) == 0
    older = (cache / index.NAME).read_bytes()

    def crash(*arguments: Any) -> None:
        raise StorageError("killed")

    monkeypatch.setattr(finalize, "write_index", crash)
    assert encode() == 1
    assert (cache / index.NAME).read_bytes() == older
    monkeypatch.setattr(finalize, "write_index", index.write_index)
    assert encode() == 0
    check(cache)
    assert latentmill("verify", cache)[0] == 0


def test_an_index_of_the_same_cache_is_not_written_again(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encode("--format", "webdataset") == 0
    replace, written = Folder.replace, list[str]()

    def note(self: Folder, name: str, data: bytes) -> None:
        written.append(name)
        replace(self, name, data)

    monkeypatch.setattr(Folder, "replace", note)
    assert encode() == 0
    assert "stats.json" in written
    assert not {index.NAME, index.WIDS_NAME} & {*written}
    (tmp_path / "c" / index.NAME).write_bytes(b"PAR1")
    assert encode() == 0
    assert {index.NAME, index.WIDS_NAME} <= {*written}


def test_an_older_index_of_a_concurrent_job_does_not_remain(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job writes parts and their index before this one writes its own, without them."""
    assert encode("--max-shards", 1) == 0
    cache = Folder(str(tmp_path / "c"))
    (tmp_path / "c" / index.NAME).unlink()
    write = index.write_index

    def write_later(*arguments: Any) -> None:
        monkeypatch.setattr(finalize, "write_index", write)
        assert encode() == 0
        assert check(tmp_path / "c") > 0
        write(*arguments)

    monkeypatch.setattr(finalize, "write_index", write_later)
    finalize.finalize_cache(cache, Cache.open(cache.url).info, single_writer=False)
    check(tmp_path / "c")


def test_a_cache_without_rows_has_an_index_without_rows(
    latentmill: Command, micro_vae: Path, source: Path, tmp_path: Path
) -> None:
    argv = ("--vae", micro_vae, "--resolution", 64, "--workers", 0, "--max-reject-rate", 1)
    assert latentmill("encode", source / "2.tar", "--to", tmp_path / "c", *argv)[0] == 0
    assert read_index(tmp_path / "c") == {}
    assert latentmill("verify", tmp_path / "c")[0] == 0


def edit_rows(cache: Path, **columns: Any) -> None:
    """Change the first row of the index, which keeps its metadata."""
    file = pq.ParquetFile(cache / index.NAME)
    table, metadata = file.read(), file.metadata.metadata
    rows = table.to_pylist()
    rows[0].update(columns)
    with pq.ParquetWriter(cache / index.NAME, index.SCHEMA) as writer:
        writer.write_table(table.from_pylist(rows, schema=index.SCHEMA))
        writer.add_key_value_metadata({"latentmill": metadata[b"latentmill"].decode()})


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "it is missing": lambda cache: (cache / index.NAME).unlink(),
    "it is no Parquet file": lambda cache: (cache / index.NAME).write_bytes(b"PAR1"),
    "it has another start": lambda cache: edit_rows(cache, start=[5]),
    "it has another size": lambda cache: edit_rows(cache, bytes=5),
    "it names another file": lambda cache: edit_rows(cache, file="x.tar"),
    "the shards of wids are missing": lambda cache: (cache / index.WIDS_NAME).unlink(),
    "the shards of wids are others": lambda cache: (cache / index.WIDS_NAME).write_bytes(b"{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_found_and_written_again(
    encode: Encode, latentmill: Command, tmp_path: Path, damage: str
) -> None:
    cache = tmp_path / "c"
    assert encode("--format", "webdataset", "--max-shards", 1) == 0
    assert encode() == 0
    before = {name: (cache / name).read_bytes() for name in (index.NAME, index.WIDS_NAME)}
    DAMAGES[damage](cache)
    code, out, _ = latentmill("verify", cache)
    assert code == 1
    name = index.WIDS_NAME if "wids" in damage else index.NAME
    assert out.startswith(f"{name}: it "), out
    assert out.splitlines()[1] == "  run latentmill verify --rebuild, which writes it again"
    assert out.endswith("1 problem\n")
    assert latentmill("verify", cache, "--rebuild")[0] == 0
    assert {name: (cache / name).read_bytes() for name in before} == before


def test_the_shards_of_wids_are_those_of_the_index(encode: Encode, tmp_path: Path) -> None:
    assert encode("--format", "webdataset") == 0
    content = json.loads((tmp_path / "c" / index.WIDS_NAME).read_text())
    assert (content["wids_version"], content["__kind__"]) == (1, "wids-shard-index-v1")
    assert {shard["url"]: (shard["filesize"], shard["nsamples"]) for shard in content["shardlist"]} == {
        f"data/{file}": (size, sum(group.rows for group in groups))
        for file, (size, groups) in read_index(tmp_path / "c").items()
    }
    assert encode("--format", "parquet", cache=tmp_path / "p") == 0
    assert not (tmp_path / "p" / index.WIDS_NAME).exists()
