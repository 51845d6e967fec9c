"""`latentmill verify` finds every kind of damage and names the damaged file."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import commits as commit_files
from pipeline.cache.commit_log import encode_log
from pipeline.cache.part_info import PartInfo
from pipeline.cache.part_table import SCHEMA
from pipeline.cache.reader import Cache
from pipeline.canonical_json import canonical_json, with_checksum
from pipeline.maintenance import verify
from pipeline.storage.folder import Folder
from tests.cache_infos import IDENTITY, info_of
from tests.conftest import img2dataset_members, write_tar
from tests.jobs.conftest import FORMATS, encode_in_formats

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three tars: ten samples, ten samples with one reject, and three rejects."""
    folder = tmp_path_factory.mktemp("verify") / "s"
    for number in range(2):
        members = img2dataset_members(10 * number, 10)
        if number:
            members["000000014.jpg"] = b"no image"
        write_tar(folder / f"{number}.tar", members)
    write_tar(folder / "2.tar", dict.fromkeys(("20.jpg", "21.jpg", "22.jpg"), b"no image"))
    return folder


@pytest.fixture(scope="module")
def originals(source: Path, micro_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an undamaged cache of each format."""
    return encode_in_formats(tmp_path_factory, source, micro_vae, "--resolution", 64, "--max-reject-rate", 1)


@pytest.fixture(params=FORMATS)
def cache(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of an undamaged cache, which a test may damage."""
    return Path(shutil.copytree(originals[request.param], tmp_path / "c"))


def part_path(cache: Path, number: int = 0) -> Path:
    return sorted((cache / "data").iterdir())[number]


def edit(path: Path, seal: bool, **fields: Any) -> None:
    """Change fields of a JSON file. seal: also update its sha256."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_bytes(canonical_json(with_checksum(content) if seal else content))


def test_a_sound_cache_has_no_problems(latentmill: Command, cache: Path) -> None:
    assert latentmill("verify", cache)[:2] == (0, f"{cache}: 7 files, 19 rows: all files match their records\n")
    code, out, err = latentmill("verify", cache, "--recount", "--reencode", 7)
    assert (code, err) == (0, "")
    assert "; the inputs have the samples that are recorded; 7 images encoded again, with the same latents" in out
    assert json.loads(latentmill("verify", cache, "--json")[1])["problems"] == []


def flip_byte(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("cache", FORMATS, indirect=True)
def test_a_flipped_byte_is_found_in_any_file(latentmill: Command, cache: Path) -> None:
    rng = random.Random(0)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        before = path.read_bytes()
        for index in {0, len(before) - 1, *(rng.randrange(len(before)) for _ in range(2))}:
            flip_byte(path, index)
            code, out, _ = latentmill("verify", cache)
            assert code == 1, f"{path.relative_to(cache)} at {index}"
            assert path.name in out or path.parent.name == "_plan", f"{path.relative_to(cache)} at {index}: {out}"
            path.write_bytes(before)
    assert latentmill("verify", cache)[0] == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap_files(path: Path, other: Path) -> None:
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def commit_path(cache: Path, unit: str = "1") -> Path:
    (path,) = (cache / "_commits").glob(f"{unit}-*.json")
    return path


def drop_last_part(cache: Path) -> None:
    content = json.loads(commit_path(cache).read_text())
    (cache / content["parts"][-1]["file"]).unlink()
    edit(commit_path(cache), seal=True, parts=content["parts"][:-1])


def add_row_to_commit(cache: Path) -> None:
    parts = json.loads(commit_path(cache).read_text())["parts"]
    parts[0]["rows"] += 1
    edit(commit_path(cache), seal=True, parts=parts)


def move_group_in_commit(cache: Path) -> None:
    parts = json.loads(commit_path(cache).read_text())["parts"]
    parts[0]["groups"][0][1] += 1
    edit(commit_path(cache), seal=True, parts=parts)


def edit_plan(cache: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = cache / "_plan/00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def edit_scaling(cache: Path) -> None:
    content = json.loads((cache / "cache.json").read_text())
    content["vae"]["scaling_factor"] = 0.5
    (cache / "cache.json").write_text(json.dumps(with_checksum(content), indent=1, ensure_ascii=False))


def edit_identity(cache: Path) -> None:
    content = json.loads((cache / "cache.json").read_text())
    content["identity"]["seed"] = 7
    (cache / "cache.json").write_text(json.dumps(with_checksum(content), indent=1, ensure_ascii=False))


def edit_statistics(cache: Path) -> None:
    content = json.loads((cache / "stats.json").read_text())
    (cache / "stats.json").write_text(json.dumps({**content, "count": 20}, indent=1) + "\n")


def edit_cache_json(cache: Path, **fields: Any) -> None:
    content = {**json.loads((cache / "cache.json").read_text()), **fields}
    (cache / "cache.json").write_text(json.dumps(with_checksum(content), indent=1, ensure_ascii=False))


def delete_only_part(cache: Path) -> None:
    """Delete a unit's only part, and its entry in the commit."""
    next((cache / "_empty").iterdir()).unlink()
    edit(commit_path(cache, "2"), seal=True, parts=[])


def duplicate_rejects(cache: Path) -> None:
    (path,) = (cache / "_rejects").glob("1-*")
    path.write_bytes(path.read_bytes() * 2)


# Each kind of damage to a cache, and the file that verify must name.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file of rows": (lambda c: part_path(c).unlink(), "data/0-"),
    "a truncated file of rows": (lambda c: truncate(part_path(c)), "data/0-"),
    "an empty file of rows": (lambda c: part_path(c).write_bytes(b""), "data/0-"),
    "two files swapped": (lambda c: swap_files(part_path(c, 0), part_path(c, 1)), "data/0-"),
    "two files of two units swapped": (lambda c: swap_files(part_path(c, 0), part_path(c, -1)), "data/0-"),
    "a copy in the same folder": (
        lambda c: shutil.copy(part_path(c), part_path(c).with_stem(part_path(c).stem + "-copy")),
        "-copy",
    ),
    "a copy under the name of a further part": (
        lambda c: shutil.copy(part_path(c), part_path(c).with_name(part_path(c).name.replace("00000", "00003"))),
        "-00003",
    ),
    "a foreign file": (lambda c: (c / "data/notes.txt").write_text("hello"), "data/notes.txt"),
    "a foreign file with our suffix": (
        lambda c: part_path(c).with_name("x" + part_path(c).suffix).write_text("hello"),
        "data/x",
    ),
    "the last part missing, and the commit edited": (drop_last_part, "_commits/1-"),
    "a missing commit": (lambda c: commit_path(c).unlink(), "_commits/1-"),
    "an edited commit": (lambda c: edit(commit_path(c), seal=False, run="another"), "_commits/1-"),
    "a commit that counts more rows than the part": (add_row_to_commit, "_commits/1-"),
    "a commit with another start of a row group": (move_group_in_commit, "_commits/1-"),
    "a commit without a unit": (lambda c: shutil.copy(commit_path(c), c / "_commits/x-0.json"), "_commits/x-0.json"),
    "missing rejects": (lambda c: next((c / "_rejects").glob("1-*")).unlink(), "_rejects/1-"),
    "rejects that are listed twice": (duplicate_rejects, "_rejects/1-"),
    "rejects without a unit": (lambda c: (c / "_rejects/x-0.jsonl").write_text("{}\n"), "_rejects/x-0.jsonl"),
    "a missing part without rows": (lambda c: next((c / "_empty").iterdir()).unlink(), "_empty/2-"),
    "a missing plan": (lambda c: (c / "_plan/00000.parquet").unlink(), "_plan/00000.parquet"),
    "a plan with another path": (lambda c: edit_plan(c, lambda row: row.update(path="s/9.tar")), "_plan/00000.parquet"),
    "a plan with another URL": (lambda c: edit_plan(c, lambda row: row.update(url="/x/0.tar")), "_plan/00000.parquet"),
    "a plan with another size": (lambda c: edit_plan(c, lambda row: row.update(bytes=1)), "_plan/00000.parquet"),
    "an edited identity": (edit_identity, "cache.json"),
    "edited constants": (edit_scaling, "cache.json"),
    "edited statistics": (edit_statistics, "stats.json"),
    "missing statistics": (lambda c: (c / "stats.json").unlink(), "stats.json"),
    "an edited card": (lambda c: (c / "README.md").write_text("# Mine"), "README.md"),
    "a unit's only part missing, and the commit edited": (delete_only_part, "_commits/2-"),
    "a commit that names parts twice": (
        lambda c: edit(commit_path(c), seal=True, parts=json.loads(commit_path(c).read_text())["parts"] * 2),
        "_commits/1-",
    ),
    "a commit of another shape": (lambda c: edit(commit_path(c), seal=True, parts=[{}]), "_commits/1-"),
    "a commit with NaN": (lambda c: commit_path(c).write_text('{"unit": NaN}'), "_commits/1-"),
    "a part without rows beside the same part with rows": (
        lambda c: (c / "_empty" / part_path(c).with_suffix(".json").name).write_bytes(b"{}"),
        "_empty/0-",
    ),
    "another unit's part over this one": (lambda c: shutil.copy(part_path(c, -1), part_path(c)), "data/0-"),
    "a folder among the parts": (lambda c: (c / "data/below").mkdir(), "data/below"),
    "a link to a part": (lambda c: (c / f"data/zz{part_path(c).suffix}").symlink_to(part_path(c)), "data/zz"),
    "a broken link": (lambda c: (c / "data/zz").symlink_to(c / "nothing"), "data/zz"),
    "a note among commits": (lambda c: (c / "_commits/notes.txt").write_text("hello"), "_commits/notes.txt"),
    "a note in the plan": (lambda c: (c / "_plan/notes.txt").write_text("hello"), "_plan/notes.txt"),
    "a plan of another shape": (lambda c: edit_plan(c, lambda row: row.update(path=None)), "_plan/00000.parquet"),
    "a VAE of another shape": (lambda c: edit_cache_json(c, vae=[]), "cache.json"),
    "a missing schema": (lambda c: edit_cache_json(c, schema=None), "cache.json"),
    "a run of another shape": (lambda c: next((c / "_runs").glob("*.json")).write_text("[NaN]"), "_runs/"),
    "a run whose plan is a list": (lambda c: edit(next((c / "_runs").glob("*.json")), seal=True, plan=[1]), "_runs/"),
    "an edited run": (lambda c: edit(next((c / "_runs").glob("*.json")), seal=False, outcome="x"), "_runs/"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_its_file_named(latentmill: Command, cache: Path, damage: str) -> None:
    apply_damage, file_name = DAMAGES[damage]
    apply_damage(cache)
    code, out, _ = latentmill("verify", cache)
    assert code == 1
    assert any(line.startswith(file_name) or file_name in line.split(":")[0] for line in out.splitlines()), out
    for line, advice in zip(out.splitlines()[:-1:2], out.splitlines()[1:-1:2], strict=True):
        assert ": " in line
        assert advice.startswith("  ")


def test_unexpected_files_are_named_once_and_never_stop_a_command(latentmill: Command, cache: Path) -> None:
    folders = ("_commits", "_empty", "_log", "_plan", "_rejects", "_runs", "data")
    for folder in folders:
        (cache / folder / "notes.txt").write_text("hello")
        (cache / folder / ".hidden").write_text("hello")
    code, out, _ = latentmill("verify", cache)
    assert code == 1
    reported = [line.split(":")[0] for line in out.splitlines() if not line.startswith("  ")][:-1]
    unexpected = [f"{folder}/notes.txt" for folder in folders]
    assert sorted(set(reported) - {"stats.json", "README.md"}) == unexpected
    assert len(reported) == len(set(reported)), reported
    assert latentmill("status", cache)[0] == 0
    assert latentmill("stats", cache)[0] == 0


def test_rebuild_writes_commits_and_rejects_from_the_parts(latentmill: Command, cache: Path) -> None:
    before = {path.name: json.loads(path.read_text()) for path in (cache / "_commits").iterdir()}
    shutil.rmtree(cache / "_commits")
    shutil.rmtree(cache / "_rejects")
    code, out, err = latentmill("verify", cache, "--rebuild")
    assert code == 0, out
    assert err.count("rebuilt the records of ") == 3
    after = {path.name: json.loads(path.read_text()) for path in (cache / "_commits").iterdir()}
    assert {name: content["parts"] for name, content in after.items()} == {
        name: content["parts"] for name, content in before.items()
    }


def test_rebuild_looks_up_each_commit_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many units, a search for the parts of each unit among all parts took minutes."""
    count, commit_name, names = 300, commit_files.get_commit_name, list[str]()
    part = verify.verify_cache(Cache.open(str(cache))).parts[0]
    parts = [replace(part, record=replace(part.record, unit=f"u-{number}")) for number in range(count)]

    def record_name(parts: Sequence[PartInfo]) -> str:
        names.append(commit_name(parts))
        return names[-1]

    monkeypatch.setattr(commit_files, "get_commit_name", record_name)
    result = verify.CheckResult(parts=parts, rebuildable=[part.record.unit for part in parts])
    assert (
        verify.rebuild_records(Cache(Folder(str(tmp_path / "rebuilt")), info_of(IDENTITY)), result)
        == result.rebuildable
    )
    assert len(list((tmp_path / "rebuilt/_commits").iterdir())) == count
    assert len(names) <= 2 * count


def test_rebuild_does_not_commit_damaged_rows(latentmill: Command, cache: Path) -> None:
    flip_byte(part_path(cache), part_path(cache).stat().st_size // 2)
    commits = {path.name: path.read_bytes() for path in (cache / "_commits").iterdir()}
    code, _, err = latentmill("verify", cache, "--rebuild")
    assert (code, err) == (1, "")
    assert {path.name: path.read_bytes() for path in (cache / "_commits").iterdir()} == commits


def test_following_the_advice_repairs_the_cache(
    latentmill: Command, cache: Path, source: Path, micro_vae: Path
) -> None:
    digest = json.loads((cache / "stats.json").read_text())["digest"]
    flip_byte(part_path(cache), part_path(cache).stat().st_size // 2)
    (line, *_) = latentmill("verify", cache)[1].splitlines()
    assert line.startswith("data/0-")
    part_path(cache).unlink()
    commit_path(cache, "0").unlink()
    argv = ["encode", source, "--to", cache, "--vae", micro_vae, "--workers", 0, "--max-reject-rate", 1]
    assert latentmill(*argv)[0] == 0
    assert latentmill("verify", cache)[0] == 0
    assert json.loads((cache / "stats.json").read_text())["digest"] == digest


@pytest.mark.parametrize(
    "damage", ["another unit's part over this one", "a unit's only part missing, and the commit edited"]
)
def test_following_the_advice_repairs_exchanged_files(
    latentmill: Command, cache: Path, source: Path, micro_vae: Path, damage: str, tmp_path: Path
) -> None:
    """Move away every file that verify advises to move away."""
    digest = json.loads((cache / "stats.json").read_text())["digest"]
    DAMAGES[damage][0](cache)
    for problem in json.loads(latentmill("verify", cache, "--json")[1])["problems"]:
        assert "move it" in problem["do"], problem
        file_names = [problem["file"], *re.findall(r"_commits/[^ ,]+\.json", problem["do"])]
        for name in file_names:
            if (cache / name).exists():
                shutil.move(cache / name, tmp_path / name.replace("/", "_"))
    argv = ["encode", source, "--to", cache, "--vae", micro_vae, "--workers", 0, "--max-reject-rate", 1]
    assert latentmill(*argv)[0] == 0
    assert latentmill("verify", cache)[0] == 0
    assert json.loads((cache / "stats.json").read_text())["digest"] == digest


def test_following_the_advice_repairs_a_part_that_exists_twice(
    latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path
) -> None:
    """Two jobs with different limits: one committed a part without rows, the other wrote it with rows and crashed."""
    cache = tmp_path / "c"
    argv = ["encode", source / "0.tar", "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    latentmill(*argv, "--input-limit", "image_bytes=10")
    first_files = {
        path: path.read_bytes() for folder in ("_empty", "_commits", "_rejects") for path in (cache / folder).iterdir()
    }
    for path in first_files:
        path.unlink()
    assert latentmill(*argv)[0] == 0
    for path, content in first_files.items():
        path.write_bytes(content)
    problems = json.loads(latentmill("verify", cache, "--json")[1])["problems"]
    assert [problem["file"].split("/")[0] for problem in problems] == ["_empty", "_commits", "_rejects"]
    assert [problem["do"] for problem in problems[:2]] == [
        "move it away, and run the encode command again",
        "run latentmill verify --rebuild, which writes it again",
    ]
    next((cache / "_empty").iterdir()).unlink()
    assert latentmill(*argv)[0] == 0
    assert latentmill("verify", cache, "--rebuild")[0] == 0


def edit_log(cache: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the first row with latents in the first log file."""
    path = min((cache / "_log").iterdir())
    rows = pq.read_table(path).to_pylist()
    change(next(row for row in rows if row["mean"]))
    path.write_bytes(encode_log(pa.Table.from_pylist(rows, schema=SCHEMA)))


LOG_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "another number of rows": lambda c: edit_log(c, lambda row: row.update(rows=row["rows"] + 1)),
    "another row group": lambda c: edit_log(c, lambda row: row["groups"][0].update(stop=1)),
    "another sha256": lambda c: edit_log(c, lambda row: row.update(sha256=bytes(32))),
    "another mean": lambda c: edit_log(c, lambda row: row["mean"].__setitem__(0, 0.5)),
    "a part of a commit only": lambda c: drop_log_row(c),
    "no Parquet file": lambda c: min((c / "_log").iterdir()).write_bytes(b"PAR1"),
    "a truncated file": lambda c: truncate(min((c / "_log").iterdir())),
}


def drop_log_row(cache: Path) -> None:
    path = min((cache / "_log").iterdir())
    rows = pq.read_table(path).to_pylist()
    names = [row["commit"] for row in rows]
    rows.remove(next(row for row in rows if names.count(row["commit"]) > 1))
    path.write_bytes(encode_log(pa.Table.from_pylist(rows, schema=SCHEMA)))


@pytest.mark.parametrize("damage", LOG_DAMAGES)
def test_a_commit_log_that_differs_from_the_parts_is_found_and_rebuilt(
    latentmill: Command, cache: Path, damage: str
) -> None:
    before = (cache / "stats.json").read_bytes()
    LOG_DAMAGES[damage](cache)
    code, out, _ = latentmill("verify", cache)
    assert code == 1
    assert out.startswith("_log/00000.parquet: "), out
    assert "\n  run latentmill verify --rebuild, which writes it again\n" in out
    code, out, _ = latentmill("verify", cache, "--rebuild")
    assert code == 0, out
    assert (cache / "stats.json").read_bytes() == before
    assert latentmill("verify", cache)[0] == 0
    assert "3 of 3 done" in latentmill("status", cache)[1]


def test_commands_name_a_damaged_commit_log(latentmill: Command, cache: Path) -> None:
    flip_byte(min((cache / "_log").iterdir()), 100)
    for verb in (["status", cache], ["retry", cache, "--workers", 0]):
        code, _, err = latentmill(*verb)
        assert code == 1
        assert f"{cache}/_log/00000.parquet cannot be read as a commit log" in err
        assert "verify --rebuild" in err


@pytest.fixture
def moved_source(source: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the inputs at another location, which a test may damage."""
    yield Path(shutil.copytree(source, tmp_path / "elsewhere/s"))


def test_exchanged_inputs_are_found(latentmill: Command, cache: Path, moved_source: Path) -> None:
    assert latentmill("verify", cache, "--recount", "--reencode", 19, "--source", moved_source)[0] == 0
    members = img2dataset_members(0, 10)
    members["000000003.jpg"] = members["000000004.jpg"]
    write_tar(moved_source / "0.tar", members)
    content = (moved_source / "0.tar").read_bytes()
    size = next(unit["bytes"] for unit in pq.read_table(cache / "_plan/00000.parquet").to_pylist())
    assert len(content) == size, "the size is the same, so only the images differ"
    code, out, _ = latentmill("verify", cache, "--recount", "--reencode", 19, "--source", moved_source)
    assert code == 1
    assert "000000003 is encoded to another latent" in out


def test_missing_inputs_are_an_error(latentmill: Command, cache: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "t/s/9.tar", img2dataset_members(0, 2))
    code, _, err = latentmill("verify", cache, "--recount", "--source", tmp_path / "t/s")
    assert (code, "none of the cache's inputs is at" in err) == (2, True)


def test_an_unfinished_cache_is_a_problem(latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path) -> None:
    argv = ["encode", source, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    latentmill(*argv, "--max-shards", 1)
    code, out, _ = latentmill("verify", tmp_path / "c")
    assert code == 1
    assert out.startswith("_plan: 2 of 3 units are not done\n  run the encode command again to resume\n")


@pytest.mark.slow
def test_a_cache_after_a_retry_is_sound(latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path) -> None:
    argv = ["encode", source, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    assert latentmill(*argv, "--input-limit", "image_bytes=1500")[0] == 3
    assert "more" in latentmill("retry", tmp_path / "c", "--workers", 0)[1]
    assert list((tmp_path / "c/data").glob("*r1.parquet"))
    code, out, _ = latentmill("verify", tmp_path / "c", "--recount", "--reencode", 30)
    assert code == 0, out


@pytest.fixture
def retried_cache(latentmill: Command, source: Path, micro_vae: Path, tmp_path: Path) -> Path:
    """Return a cache of tars with a part that a retry wrote."""
    argv = ["encode", source, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    latentmill(*argv, "--input-limit", "image_bytes=1500", "--format", "webdataset")
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    assert latentmill("verify", tmp_path / "c")[0] == 0
    return tmp_path / "c"


def edit_caption(path: Path) -> None:
    before = path.read_bytes()
    assert b"image 1" in before
    path.write_bytes(before.replace(b"image 1", b"image 7"))


RETRY_DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed caption": edit_caption,
    "a missing file": lambda path: path.unlink(),
    "a truncated file": truncate,
    "a missing commit of the part": lambda path: (path.parents[1] / f"_commits/{path.stem}.json").unlink(),
    "an edited commit of the part": lambda path: edit(
        path.parents[1] / f"_commits/{path.stem}.json", seal=False, run="x"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", RETRY_DAMAGES)
def test_damage_to_a_retry_part_is_found(latentmill: Command, retried_cache: Path, damage: str) -> None:
    path = next(path for path in sorted(retried_cache.glob("data/*r1.tar")) if b"image 1" in path.read_bytes())
    RETRY_DAMAGES[damage](path)
    code, out, _ = latentmill("verify", retried_cache)
    assert code == 1
    assert out.startswith((f"data/{path.name}: ", f"_commits/{path.stem}.json: ")), out
    if "_commits" in out.split(":")[0]:
        assert latentmill("verify", retried_cache, "--rebuild")[0] == 0
        return
    path.unlink(missing_ok=True)
    (retried_cache / f"_commits/{path.stem}.json").unlink()
    assert latentmill("retry", retried_cache, "--workers", 0)[0] == 0
    assert latentmill("verify", retried_cache)[0] == 0


def test_images_beyond_a_limit_are_not_reported_as_exchanged(
    latentmill: Command, micro_vae: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 2, height=300, width=300))
    limit = ["--input-limit", "pixels=100000"]
    argv = ["encode", tmp_path / "s", "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    assert latentmill(*argv, *limit)[0] == 0
    small = ["--input-limit", "pixels=1000"]
    code, out, _ = latentmill("verify", tmp_path / "c", "--reencode", 2, *small)
    assert code == 1
    assert "000000000 is rejected now (too_many_pixels), but has a row" in out
    assert "give the --input-limit that it was encoded with" in out
    assert latentmill("verify", tmp_path / "c", "--reencode", 2, *limit)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_edited_captions_are_found_without_the_vae(
    latentmill: Command, micro_vae: Path, tmp_path: Path, form: str
) -> None:
    """In folders, tars, Parquet files and metadata beside tars, and in image bytes that do not change the latent."""
    vae = shutil.copytree(micro_vae, tmp_path / "vae")
    members = img2dataset_members(0, 6, height=64, width=64)
    (tmp_path / "f").mkdir()
    for name, content in members.items():
        (tmp_path / "f" / name).write_bytes(content)
    write_tar(tmp_path / "t/0.tar", members)
    (tmp_path / "p").mkdir()
    table = pa.table(
        {"jpg": [members[f"{n:09d}.jpg"] for n in range(6)], "caption": [f"caption {n}" for n in range(6)]}
    )
    pq.write_table(table, tmp_path / "p/0.parquet")
    write_tar(tmp_path / "m/0.tar", members)
    urls = pa.table({"key": [f"{n:09d}" for n in range(6)], "url": [f"u{n}" for n in range(6)]})
    pq.write_table(urls, tmp_path / "m/0.parquet")
    caches = {}
    for source in "ftpm":
        caches[source] = tmp_path / f"c{source}"
        argv = ["encode", tmp_path / source, "--to", caches[source], "--vae", vae, "--resolution", 64, "--workers", 0]
        assert latentmill(*argv, "--format", form, "--rows-per-part", 4)[0] == 0
    shutil.rmtree(vae)
    for cache in caches.values():
        code, out, _ = latentmill("verify", cache, "--recount")
        assert (code, "the inputs have the samples that are recorded" in out) == (0, True), out

    (tmp_path / "f/000000001.txt").write_text("image 9")
    changed = members | {"000000005.jpg": members["000000005.jpg"][:-2] + b"\0\0"}  # after the image's own data
    write_tar(tmp_path / "t/0.tar", changed)
    captions = table["caption"].to_pylist()
    captions[2] = "caption 9"
    pq.write_table(table.set_column(1, "caption", [captions]), tmp_path / "p/0.parquet")
    pq.write_table(urls.set_column(1, "url", [["x", *urls["url"].to_pylist()[1:]]]), tmp_path / "m/0.parquet")
    for source, part in {"f": 0, "t": 1, "p": 0, "m": 0}.items():
        assert latentmill("verify", caches[source])[0] == 0
        code, out, _ = latentmill("verify", caches[source], "--recount")
        assert code == 1
        match = re.search(r"its images or their columns differ from those in (\S+)\n  restore the input", out)
        assert match, f"{source}: {out}"
        assert f"-{part:05d}" in match[1], f"{source}: {out}"
        assert "1 problem" in out


def test_several_changed_parts_of_an_input_are_one_problem(
    latentmill: Command, cache: Path, moved_source: Path
) -> None:
    write_tar(moved_source / "0.tar", img2dataset_members(100, 10))
    content = (moved_source / "0.tar").read_bytes()
    assert len(content) == pq.read_table(cache / "_plan/00000.parquet").to_pylist()[0]["bytes"]
    code, out, _ = latentmill("verify", cache, "--recount", "--source", moved_source)
    assert (code, out.count("its images or their columns differ from those in")) == (1, 1)
    assert re.search(r"those in data/0-\w+-00000\.\w+, data/0-\w+-00001\.\w+, data/0-\w+-00002\.\w+\n", out)


def test_a_shard_that_was_damaged_after_encoding_is_a_problem(
    latentmill: Command, cache: Path, moved_source: Path
) -> None:
    damaged = bytearray((moved_source / "0.tar").read_bytes())
    damaged[damaged.index(b"000000005.jpg")] ^= 1
    (moved_source / "0.tar").write_bytes(damaged)
    code, out, _ = latentmill("verify", cache, "--recount", "--source", moved_source)
    assert (code, "it was sound when it was encoded: " in out) == (1, True)


def test_the_same_samples_in_a_file_of_another_size_are_accepted(
    latentmill: Command, cache: Path, moved_source: Path
) -> None:
    with (moved_source / "0.tar").open("ab") as tar:
        tar.write(bytes(10240))
    code, out, _ = latentmill("verify", cache, "--recount", "--source", moved_source)
    assert code == 0, out
    write_tar(moved_source / "0.tar", img2dataset_members(0, 9))
    code, out, _ = latentmill("verify", cache, "--recount", "--source", moved_source)
    assert code == 1
    assert "0.tar: it has 9 samples, but 10 are recorded for 0-" in out
    assert re.search(r"0\.tar: its images or their columns differ from those in data/0-\w+-00002", out)
