"""Small tars that are units together: the rows are those of single tars, whatever happens to one of them."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import plan
from pipeline.cache.reader import read_rows
from pipeline.records import Unit
from pipeline.sources import units
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]
TARS, SAMPLES = 30, 3  # of the source; each tar has the same keys
BAD = 7  # the tar with an image that is none


def write_source(folder: Path, tars: int = TARS) -> Path:
    """Write tars with equal keys and different images. Two are compressed, one has a broken image, one has none."""
    for number in range(tars):
        members = {
            f"{int(name[:9]) - SAMPLES * number:09d}{name[9:]}": data
            for name, data in img2dataset_members(SAMPLES * number, SAMPLES, height=64, width=64).items()
        }
        if number == BAD:
            members["000000001.jpg"] = b"no image"
        tar = write_tar(folder / f"{number:05d}.tar", {} if number == 11 else members)
        if number in (4, 19):
            (folder / f"{number:05d}.tar.gz").write_bytes(gzip.compress(tar.read_bytes(), mtime=0))
            tar.unlink()
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "shards")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let eight tars fill a group: there are three groups, and six tars are left over."""
    monkeypatch.setattr(units, "TARS_PER_GROUP", 8)


@pytest.fixture
def encode(encode: Command) -> Command:
    def run(*argv: object) -> tuple[int, str, str]:
        return encode(*argv, "--max-reject-rate", 0.3, "--rows-per-part", 5)

    return run


@pytest.fixture
def reference(encode: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of the intact source, in which each tar is a unit."""
    with monkeypatch.context() as patch:
        patch.setattr(units, "TARS_PER_GROUP", TARS + 1)
        assert encode(source, "--to", tmp_path / "reference")[0] == 0
    assert {unit.kind for unit in read_plan(tmp_path / "reference")} == {"tar"}
    return tmp_path / "reference"


def read_plan(cache: Path) -> list[Unit]:
    return plan.read_plan(Folder(str(cache)))


def iterate_rows(cache: Path) -> Iterator[dict[str, Any]]:
    for path in (cache / "data").iterdir():
        yield from read_rows(Folder(str(cache)), f"data/{path.name}")


def read_sorted_rows(cache: Path) -> list[dict[str, Any]]:
    rows = sorted(iterate_rows(cache), key=lambda row: (row["shard"], row["key"]))
    assert len({(row["shard"], row["key"]) for row in rows}) == len(rows)
    return rows


def read_rejects(cache: Path) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for path in cache.glob("_rejects/*") for line in path.read_text().splitlines()]
    return sorted((line["shard"], line["key"], line["reason"]) for line in lines)


def read_stats(cache: Path) -> dict[str, Any]:
    return dict(json.loads((cache / "stats.json").read_text()))


def check_complete(latentmill: Command, cache: Path, reference: Path) -> None:
    """Check that a cache has the rows, rejects and statistics of the reference, and that its inputs agree."""
    code, out, err = latentmill("verify", cache, "--recount", "--reencode", 200)
    assert (code, err) == (0, ""), out
    assert read_sorted_rows(cache) == read_sorted_rows(reference)
    actual, expected = read_stats(cache), read_stats(reference)
    assert (actual["count"], actual["rejected"]) == (expected["count"], expected["rejected"])
    assert actual["mean"] == pytest.approx(expected["mean"], rel=1e-12)


def test_groups_have_the_rows_of_single_tars(
    encode: Command, latentmill: Command, source: Path, reference: Path, tmp_path: Path
) -> None:
    """Equal keys in several tars, compressed tars, and parts that end within a tar."""
    cache = tmp_path / "c"
    assert encode(source)[0] == 0
    assert [(unit.kind, len(unit.paths)) for unit in read_plan(cache)] == [("tars", 8)] * 3 + [("tar", 0)] * 6
    assert len(list((cache / "data").iterdir())) < len(list((reference / "data").iterdir()))
    assert read_rejects(cache) == read_rejects(reference) == [(f"shards/{BAD:05d}.tar", "000000001", "not_an_image")]
    check_complete(latentmill, cache, reference)
