"""Sources that have the same name, overlap, or were renamed, moved or edited between runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cache import plan
from tests.conftest import encoded, img2dataset_members, slow_param, smooth, write_tar
from tests.jobs.test_sources import read_column, read_table, write_parquet

Command = Callable[..., tuple[int, str, str]]


def write_photos(folder: Path, seeds: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / f"{number:05}.jpg").write_bytes(encoded(smooth(seed), quality=90))
    return folder


def write_shard(path: Path, first: int) -> Path:
    """Write a tar of two samples. Its size does not depend on the samples."""
    return write_tar(path, {name: data.ljust(9000, b"\0") for name, data in img2dataset_members(first, 2).items()})


def count_rows(cache: Path) -> int:
    return int(json.loads((cache / "stats.json").read_text())["count"])


def test_folders_with_the_same_name_need_different_names(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    cats, dogs = write_photos(tmp_path / "cats/images", range(3)), write_photos(tmp_path / "dogs/images", range(50, 52))
    assert encode(cats)[0] == 0
    code, _, err = encode(dogs)
    assert (code, f"give it a name: images2={dogs};" in err) == (2, True)
    assert count_rows(tmp_path / "c") == 3
    assert encode(f"images2={dogs}")[0] == 0
    assert set(read_table(tmp_path / "c")["shard"].to_pylist()) == {"images", "images2"}
    assert count_rows(tmp_path / "c") == 5
    for sources in ((cats,), (f"images2={dogs}",), (cats, f"images2={dogs}")):
        code, out, err = encode(*sources)
        assert (code, err, "encoded 0 images" in out) == (0, "", True)
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_sources_with_the_same_name_are_refused_before_any_write(encode: Command, tmp_path: Path) -> None:
    cats, dogs = write_shard(tmp_path / "cats/shards/00000.tar", 0), write_shard(tmp_path / "dogs/shards/00000.tar", 10)
    code, _, err = encode(cats.parent, dogs.parent)
    assert (code, f"give one of them another: shards2={dogs.parent}" in err) == (2, True)
    assert not (tmp_path / "c").exists()
    assert encode(cats.parent, f"shards2={dogs.parent}")[0] == 0
    assert count_rows(tmp_path / "c") == 4


def test_tars_with_the_same_path_and_size_are_distinguished(encode: Command, tmp_path: Path) -> None:
    cats, dogs = write_shard(tmp_path / "cats/shards/00000.tar", 0), write_shard(tmp_path / "dogs/shards/00000.tar", 10)
    assert cats.stat().st_size == dogs.stat().st_size
    assert encode(cats.parent)[0] == 0
    code, _, err = encode(dogs.parent)
    assert (code, f"shards2={dogs.parent}" in err) == (2, True)


def test_parquet_files_with_the_same_name_are_distinguished(encode: Command, tmp_path: Path) -> None:
    for name, seeds in (("cats", range(3)), ("dogs", range(50, 60))):
        images = [encoded(smooth(seed), quality=90) for seed in seeds]
        write_parquet(tmp_path / name / "data/train-00000-of-00001.parquet", images, text=[name] * len(images))
    assert encode(tmp_path / "cats/data")[0] == 0
    code, _, err = encode(tmp_path / "dogs/data")
    assert (code, "data2=" in err) == (2, True)
    assert encode(f"dogs={tmp_path}/dogs/data")[0] == 0
    assert read_table(tmp_path / "c")["text"].to_pylist().count("dogs") == 10


def test_names_can_be_given_in_yaml(encode: Command, tmp_path: Path) -> None:
    sources = [
        f"{name}={write_photos(tmp_path / name / 'images', seeds)}"
        for name, seeds in (("a", range(2)), ("b", range(5, 7)))
    ]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"source": sources}))
    assert encode("--config", tmp_path / "job.yaml")[0] == 0
    assert set(read_table(tmp_path / "c")["shard"].to_pylist()) == {"a", "b"}


def test_a_source_under_another_name_is_not_encoded_twice(encode: Command, tmp_path: Path) -> None:
    source = write_photos(tmp_path / "data/photos", range(2))
    assert encode(source)[0] == 0
    code, _, err = encode(source.parent)
    assert (code, f"If it is the same source, name it: photos={source}. " in err) == (2, True)
    pics = source.rename(tmp_path / "data/pics")
    code, _, err = encode(pics)
    assert (code, f"name it: photos={pics}. If it is another source, use --new-source" in err) == (2, True)
    assert count_rows(tmp_path / "c") == 2
    code, out, err = encode(f"photos={pics}")
    assert (code, "encoded 0 images" in out, "INFO the source photos has moved from " in err) == (0, True, True)
    assert encode(pics, "--new-source")[0] == 0
    assert count_rows(tmp_path / "c") == 4


def test_overlapping_folders_are_read_once(encode: Command, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", range(1))
    best = write_photos(tmp_path / "photos/best", range(7, 8))
    code, _, err = encode(best, tmp_path / "photos")
    assert (code, "read once: 1 (best/00000.jpg is photos/best/00000.jpg)" in err) == (0, True)
    assert sorted(read_column(tmp_path / "c", "shard").items()) == [("00000", "photos"), ("best/00000", "photos")]


def test_files_that_latentmill_wrote_into_its_source_are_skipped(
    encode: Command, latentmill: Command, micro_vae: Path, tmp_path: Path
) -> None:
    source = write_photos(tmp_path / "photos", range(2))
    argv = ("--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill("encode", source, "--to", source / "latents", *argv)[0] == 0
    assert latentmill("decode", source / "latents", "--to", source / "previews", "--workers", 0)[0] == 0
    assert latentmill("decode", source / "latents", "--to", source, "--workers", 0)[0] == 0
    code, out, err = encode(source)
    assert (code, "encoded 2 images" in out) == (0, True)
    assert f"INFO skipped files of the cache {source}/latents: " in err
    assert f"INFO skipped files of the previews {source}/previews: 7\n" in err
    assert f"INFO skipped files of the previews {source}: 7\n" in err
    code, _, err = latentmill("encode", source / "previews", "--to", tmp_path / "d", *argv)
    assert (code, f"latentmill wrote all files there, the previews {source}/previews" in err) == (2, True)


def test_the_report_marks_previews_before_the_first_is_drawn(
    encode: Command, latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_photos(tmp_path / "photos", range(2))
    assert encode(source)[0] == 0
    seen = []

    def fail(*args: Any) -> None:
        seen.append(json.loads((tmp_path / "p/report.json").read_text()))
        raise OSError

    monkeypatch.setattr("pipeline.preview.contact_sheet.encode_png", fail)
    assert latentmill("decode", tmp_path / "c", "--to", tmp_path / "p", "--workers", 0)[0] == 1
    assert (seen[0]["made_by"], seen[0]["finished"]) == ("latentmill decode", False)


def change_after_planning(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Apply a change between planning and reading."""
    extend = plan.extend_plan

    def extend_then_change(*args: Any, **kwargs: Any) -> Any:
        planned = extend(*args, **kwargs)
        change()
        return planned

    monkeypatch.setattr(plan, "extend_plan", extend_then_change)


def test_a_tar_that_is_rewritten_during_a_run_is_encoded_by_the_next(
    encode: Command, latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shard(tmp_path / "s/0.tar", 0).parent
    write_shard(shards / "1.tar", 10)
    with monkeypatch.context() as patch:
        change_after_planning(patch, lambda: write_shard(shards / "0.tar", 20))
        code, _, err = encode(shards)
    assert (code, "s/0.tar has changed since it was planned (its time or ETag); " in err) == (1, True)
    code, _, err = encode(shards)
    assert code == 0
    assert (
        "INFO inputs that have changed since they were planned: 1 (s/0.tar); none of their samples are encoded yet"
        in err
    )
    assert sorted(read_column(tmp_path / "c", "key")) == ["000000010", "000000011", "000000020", "000000021"]
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0
    status = json.loads(latentmill("status", tmp_path / "c", "--json")[1])
    assert (status["state"], status["units"]) == ("done", {"planned": 2, "done": 2})
    assert status["bytes"]["planned"] == sum(path.stat().st_size for path in shards.iterdir())


def test_a_unit_that_is_planned_twice_is_a_damaged_plan(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    assert encode(write_shard(tmp_path / "s/0.tar", 0))[0] == 0
    shutil.copy(tmp_path / "c/_plan/00000.parquet", tmp_path / "c/_plan/00001.parquet")
    code, out, _ = latentmill("verify", tmp_path / "c")
    assert (code, "_plan/00001.parquet: the unit 0-" in out, " is planned twice" in out) == (1, True, True)


def test_changed_times_of_inputs_do_not_prevent_resuming(encode: Command, tmp_path: Path) -> None:
    shards = write_shard(tmp_path / "s/0.tar", 0).parent
    write_shard(shards / "1.tar", 10)
    assert encode(shards, "--max-shards", 1)[0] == 0
    for path in shards.iterdir():
        os.utime(path, (1, 1))
    code, out, err = encode(shards)
    assert (code, "encoded 2 images" in out) == (0, True)
    assert "planned: 1 (s/0.tar); the cache still holds the old version" in err
    assert "planned: 1 (s/1.tar); none of their samples are encoded yet" in err
    assert encode(shards, "--same-source")[2] == encode(shards)[2] == ""


def test_a_changed_input_fails_its_partly_encoded_unit(encode: Command, tmp_path: Path) -> None:
    shards = write_shard(tmp_path / "s/0.tar", 0).parent
    assert encode(shards, "--rows-per-part", 1)[0] == 0
    first, second = sorted((tmp_path / "c/data").iterdir())
    second.unlink()
    next((tmp_path / "c/_commits").iterdir()).unlink()
    write_shard(shards / "0.tar", 20)
    code, _, err = encode(shards)
    assert (code, "they are partly encoded. " in err, first.stem + " was made from other samples" in err) == (
        1,
        True,
        True,
    )
    assert "If a unit fails: restore its input, or move away" in err
    assert list((tmp_path / "c/data").iterdir()) == [first]
    first.unlink()
    assert encode(shards)[0] == 0
    assert sorted(read_column(tmp_path / "c", "key")) == ["000000020", "000000021"]


@pytest.mark.parametrize("lost", [slow_param(0), 1])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_partly_encoded_unit_is_resumed_if_its_samples_are_the_same(
    encode: Command, latentmill: Command, tmp_path: Path, kind: str, lost: int
) -> None:
    """If an existing part was made from other samples, no part is written, not even an earlier one."""
    path = write_shard(tmp_path / "s/0.tar", 0)
    if kind == "parquet":
        path.unlink()
        images = [encoded(smooth(seed), quality=90).ljust(9000, b"\0") for seed in range(2)]
        path = write_parquet(tmp_path / "s/0.parquet", images, text=["first", "second"])
    intact = path.read_bytes()
    assert encode(path.parent, "--rows-per-part", 1)[0] == 0
    table = read_table(tmp_path / "c").sort_by("key")
    parts = sorted((tmp_path / "c/data").iterdir())
    parts.pop(lost).unlink()
    next((tmp_path / "c/_commits").iterdir()).unlink()

    other = bytearray(intact)
    offset = [at for at in range(len(intact)) if intact.startswith(b"\xff\xd9\0", at)][1 - lost]
    other[offset + 2] = 1  # the padding after an image of the existing part
    path.write_bytes(other)
    code, _, err = encode(path.parent)
    assert (code, f"{parts[0].stem} was made from other samples" in err) == (1, True), err
    assert list((tmp_path / "c/data").iterdir()) == parts

    path.write_bytes(intact)
    code, out, err = encode(path.parent)
    assert (code, "encoded 1 image in" in out) == (0, True), err
    assert read_table(tmp_path / "c").sort_by("key") == table
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def copy_without_times(source: Path, target: Path) -> Path:
    """Copy a folder without the times of its files."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    return target


def test_a_job_can_be_resumed_from_a_copy_of_its_source(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    shards = write_shard(tmp_path / "s/0.tar", 0).parent
    write_shard(shards / "1.tar", 10)
    assert encode(shards, "--max-shards", 1)[0] == 0
    elsewhere = copy_without_times(shards, tmp_path / "copy/s")
    shutil.rmtree(shards)
    code, _, err = encode(elsewhere)
    assert (code, "--same-source" in err) == (2, True)
    code, out, _ = encode(elsewhere, "--same-source")
    assert (code, "encoded 2 images" in out) == (0, True)
    assert encode(elsewhere)[2] == ""
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_other_verbs_find_a_source_by_its_name(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    source = write_photos(tmp_path / "photos", range(2))
    assert encode(source, "--input-limit", "image_bytes=1", "--max-reject-rate", 1)[0] == 0
    pics = copy_without_times(source, tmp_path / "copy/pics")
    shutil.rmtree(source)
    argv = (tmp_path / "c", "--workers", 0)
    code, _, err = latentmill("retry", *argv, "--source", pics)
    assert (code, f"name it: photos={pics}" in err) == (2, True)
    code, _, err = latentmill("retry", *argv, "--source", f"photos={pics}")
    assert (code, "holds other files" in err, err.rstrip().endswith("--same-source")) == (2, True, True)
    assert latentmill("retry", *argv, "--source", f"photos={pics}", "--same-source")[0] == 0
    assert count_rows(tmp_path / "c") == 2
    assert latentmill("verify", tmp_path / "c", "--recount", "--source", f"photos={pics}")[0] == 0
    previews = ("--to", tmp_path / "p", "--json", "--source", f"photos={pics}")
    assert json.loads(latentmill("decode", *argv, *previews)[1])["psnr"] is not None


def test_retry_encodes_an_image_that_was_repaired_in_its_tar(
    encode: Command, latentmill: Command, tmp_path: Path
) -> None:
    members = {name: data.ljust(9000, b"\0") for name, data in img2dataset_members(0, 3).items()}
    damaged = {name: data if name != "000000001.jpg" else b"no image" for name, data in members.items()}
    shards = write_tar(tmp_path / "s/0.tar", damaged).parent
    assert encode(shards, "--max-reject-rate", 1)[0] == 0
    changed_shard = write_tar(tmp_path / "s/0.tar", members | {"000000002.jpg": encoded(smooth(99))})
    code, _, err = latentmill("retry", tmp_path / "c", "--workers", 0)
    assert (code, f"{changed_shard} has changed since it was planned, and not only where it was damaged" in err) == (
        1,
        True,
    )
    assert count_rows(tmp_path / "c") == 2
    write_tar(tmp_path / "s/0.tar", members)
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    assert count_rows(tmp_path / "c") == 3
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_retry_refuses_another_source_with_the_same_name(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    cats, dogs = write_photos(tmp_path / "cats/images", range(2)), write_photos(tmp_path / "dogs/images", range(50, 52))
    assert encode(cats, "--input-limit", "image_bytes=1", "--max-reject-rate", 1)[0] == 0
    for more in ((), ("--same-source",)):
        code, _, err = latentmill("retry", tmp_path / "c", "--workers", 0, "--source", dogs, *more)
        assert (code, "holds other files" in err) == (2, True)
