"""Sources of each kind: tars, Parquet files and folders, alone and together, and their columns."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import plan
from pipeline.cache.reader import Cache
from tests.conftest import encoded, img2dataset_members, smooth, write_tar

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(encode: Command) -> Command:
    """Return the encode command, which must succeed."""

    def run(*argv: object) -> tuple[int, str, str]:
        result = encode(*argv)
        assert result[0] == 0, result[2]
        return result

    return run


def read_table(cache: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((cache / "data").iterdir())])


def read_column(cache: Path, column: str) -> dict[str, Any]:
    table = read_table(cache)
    return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))


def make_images(first: int, count: int) -> list[bytes]:
    return [encoded(smooth(index), quality=90) for index in range(first, first + count)]


def write_parquet(path: Path, jpegs: Sequence[bytes], **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": data, "path": None} for data in jpegs], **columns}), path)
    return path


def test_tar_parquet_and_folder_give_the_same_latents(encode: Command, tmp_path: Path) -> None:
    keys = [f"{n:09d}" for n in range(4)]
    write_tar(tmp_path / "tars/0.tar", img2dataset_members(0, 4))
    write_parquet(tmp_path / "parquet/0.parquet", make_images(0, 4), id=keys)
    (tmp_path / "folder").mkdir()
    for key, data in zip(keys, make_images(0, 4), strict=True):
        (tmp_path / f"folder/{key}.jpg").write_bytes(data)
    for kind in ("tars", "parquet", "folder"):
        more = ("--key-column", "id") if kind == "parquet" else ()
        encode(tmp_path / kind, "--to", tmp_path / f"c-{kind}", *more)
    latents = [read_column(tmp_path / f"c-{kind}", "latent") for kind in ("tars", "parquet", "folder")]
    assert list(latents[0]) == keys
    assert latents[0] == latents[1] == latents[2]


def test_columns_of_a_parquet_file_keep_their_types(encode: Command, tmp_path: Path) -> None:
    columns = {
        "caption": ["a", None],
        "width": pa.array([7, 8], pa.int16()),
        "score": [0.5, float("nan")],
        "tags": [["x", "y"], []],
        "when": pa.array([1, None], pa.timestamp("ns", "UTC")),
        "mask": [b"m", b"m"],
    }
    write_parquet(tmp_path / "p/0.parquet", make_images(0, 2), **columns)
    encode(tmp_path / "p", "--to", tmp_path / "c")
    table = read_table(tmp_path / "c")
    assert table["source_width"].equals(pa.chunked_array([columns["width"]]))
    assert table["when"].equals(pa.chunked_array([columns["when"]]))
    assert table["tags"].to_pylist() == columns["tags"]
    assert table["caption"].to_pylist() == ["a", None]
    assert not {"mask", "image", "txt"} & set(table.column_names)
    schema = json.loads((tmp_path / "c/cache.json").read_text())["schema"]
    assert schema == [{"name": field.name, "type": str(field.type)} for field in table.schema]


def test_columns_are_chosen_by_name(encode: Command, latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p/0.parquet", make_images(0, 2), caption=["a", "b"], score=[1, 2], mask=[b"m", b"n"])
    encode(tmp_path / "p", "--to", tmp_path / "c", "--columns", "score,mask")
    assert read_table(tmp_path / "c").column_names[-3:] == ["flipped", "score", "mask"]
    encode(tmp_path / "p", "--to", tmp_path / "none", "--columns", "")
    assert read_table(tmp_path / "none").column_names[-1] == "flipped"
    argv = ("encode", tmp_path / "p", "--to", tmp_path / "c", "--vae", micro_vae, "--workers", 0)
    code, _, err = latentmill(*argv, "--columns", "captoin")
    assert (code, "there is no column captoin in the sources; did you mean caption?" in err) == (2, True)
    code, _, err = latentmill(*argv, "--columns", "caption")
    assert (code, "--columns 'score,mask', this command has --columns 'caption';" in err) == (2, True)


def write_img2dataset_shard(folder: Path, number: int, first: int, count: int) -> None:
    """Write a shard as img2dataset does: the tar, its metadata with one failed download, and its statistics."""
    write_tar(folder / f"{number:05d}.tar", img2dataset_members(first, count))
    keys = [f"{n:09d}" for n in range(first, first + count + 1)]
    columns = {
        "key": keys,
        "url": [f"http://host/{key}" for key in keys],
        "width": [64] * len(keys),
        "similarity": [n / 10 for n in range(len(keys))],
        "error_message": pa.nulls(len(keys)) if number else [*[None] * count, "404"],
    }
    pq.write_table(pa.table(columns), folder / f"{number:05d}.parquet")
    (folder / f"{number:05d}_stats.json").write_text("{}")


def test_metadata_of_img2dataset_is_joined_by_key(encode: Command, tmp_path: Path) -> None:
    (tmp_path / "laion").mkdir()
    for number in range(2):
        write_img2dataset_shard(tmp_path / "laion", number, 10 * number, 3)
    _, out, _ = encode(tmp_path / "laion", "--to", tmp_path / "c")
    assert "encoded 6 images" in out
    assert "rejected   0" in out
    table = read_table(tmp_path / "c")
    assert table.schema.field("similarity").type == pa.float64()
    assert read_column(tmp_path / "c", "url")["000000012"] == "http://host/000000012"
    assert read_column(tmp_path / "c", "similarity")["000000012"] == 0.2
    assert read_column(tmp_path / "c", "txt")["000000012"] == "image 12"
    assert table["source_width"].to_pylist() == [64] * 6
    encode(str(tmp_path / "laion/{00000..00001}.tar"), "--to", tmp_path / "by-range")
    assert read_table(tmp_path / "by-range").equals(table)


def test_a_tar_without_metadata_beside_it_has_nulls(encode: Command, tmp_path: Path) -> None:
    (tmp_path / "laion").mkdir()
    write_img2dataset_shard(tmp_path / "laion", 0, 0, 2)
    write_img2dataset_shard(tmp_path / "laion", 1, 10, 2)
    (tmp_path / "laion/00001.parquet").unlink()
    encode(tmp_path / "laion", "--to", tmp_path / "c")
    assert list(read_column(tmp_path / "c", "similarity").values()) == [0.0, 0.1, None, None]


def test_other_text_members_are_copied_on_request(encode: Command, tmp_path: Path) -> None:
    members = {
        f"{n}.{kind}": data
        for n, image in enumerate(make_images(0, 2))
        for kind, data in (("jpg", image), ("cls", b"%d" % n), ("txt", b"t"))
    }
    write_tar(tmp_path / "wds/0.tar", members)
    encode(tmp_path / "wds", "--to", tmp_path / "c", "--columns", "cls,txt")
    assert read_column(tmp_path / "c", "cls") == {"0": "0", "1": "1"}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(members["0.jpg"])
    (tmp_path / "photos/a.caption").write_text("of a file beside it")
    encode(tmp_path / "photos", "--to", tmp_path / "d", "--columns", "caption")
    assert read_column(tmp_path / "d", "caption") == {"a": "of a file beside it"}


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_a_chosen_image_of_a_tar_is_encoded_and_others_are_copied(
    encode: Command, latentmill: Command, tmp_path: Path, container: str
) -> None:
    source, target, jpeg = make_images(0, 3)
    write_tar(tmp_path / "s/0.tar", {"0.source.jpg": source, "0.target.jpg": target, "0.txt": b"t"})
    write_tar(tmp_path / "s/1.tar", {"1.jpg": jpeg, "1.source.jpg": source})
    argv = ("--columns", "txt,target.jpg", "--image-column", "source.jpg", "--format", container)
    encode(tmp_path / "s", "--to", tmp_path / "c", *argv)
    cache = Cache.open(str(tmp_path / "c"))
    rows = [row for file in cache.files() for row in cache.rows(file)]
    assert [(row["key"], row["txt"], row["target.jpg"]) for row in rows] == [("0", "t", target), ("1", None, None)]
    assert rows[0]["latent"] == rows[1]["latent"]
    assert latentmill("verify", tmp_path / "c", "--recount", "--json")[0] == 0
    code, out, err = latentmill("decode", tmp_path / "c", "--to", tmp_path / "out", "--workers", 0, "--json")
    assert (code, err) == (0, ""), err
    assert (code, all(image["psnr"] for image in json.loads(out)["images"])) == (0, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "s/0.tar is an image by its extension (.jpg, .png and the like); they end in .source.jpg, .img. A key ends",
        ),
        (["--image-column", "jpg"], "s/0.tar has the extension .jpg; they end in .source.jpg, .img, .txt. A key ends"),
    ],
)
def test_tars_without_images_are_refused_if_an_image_can_be_named(
    latentmill: Command, micro_vae: Path, tmp_path: Path, argv: list[str], message: str
) -> None:
    write_tar(tmp_path / "s/0.tar", {"0.source.jpg": b"", "0.img": b"", "0.txt": b"t"})
    code, _, err = latentmill("encode", tmp_path / "s", "--to", tmp_path / "c", "--vae", micro_vae, *argv)
    assert (code, message in err) == (2, True), err


def test_folders_of_a_partitioned_table_are_columns(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    for split, n in (("train", 0), ("val", 1)):
        write_parquet(tmp_path / f"t/split={split}/0.parquet", make_images(n, 1), text=[f"{n}"])
    write_parquet(tmp_path / "t/split=x/0.parquet", make_images(2, 1), split=["inside"], text=["2"])
    encode(tmp_path / "t", "--to", tmp_path / "c")
    table = read_table(tmp_path / "c").sort_by("text")
    assert table["split"].to_pylist() == ["train", "val", "inside"]
    assert latentmill("verify", tmp_path / "c", "--recount")[0] == 0


def test_several_sources_in_one_job(encode: Command, photos: Path, shards: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "hf/train-0.parquet", make_images(300, 3), label=[1, 2, 3])
    _, out, _ = encode(shards, photos, tmp_path / "hf", "--to", tmp_path / "c")
    assert "encoded 26 images" in out
    table = read_table(tmp_path / "c")
    assert table.column_names[-3:] == ["txt", "json", "label"]
    assert set(table["shard"].to_pylist()) == {f"shards/{n:05d}.tar" for n in range(3)} | {
        "photos",
        "hf/train-0.parquet",
    }
    assert [label for label in table["label"].to_pylist() if label] == [1, 2, 3]


def test_new_shards_are_added_by_the_same_command(encode: Command, tmp_path: Path) -> None:
    source, cache = tmp_path / "p", tmp_path / "c"
    write_parquet(source / "0.parquet", make_images(0, 2), caption=["a", "b"])
    encode(source, "--to", cache)
    before = {path.name: path.read_bytes() for path in (cache / "data").iterdir()}
    write_parquet(source / "1.parquet", make_images(2, 2), caption=["c", "d"], more=[1, 2])
    _, out, err = encode(source, "--to", cache)
    assert "encoded 2 images" in out
    assert "skipped, because the cache was created without them: the columns more" in err
    assert read_table(cache)["caption"].to_pylist() == ["a", "b", "c", "d"]
    assert before.items() <= {path.name: path.read_bytes() for path in (cache / "data").iterdir()}.items()


def test_a_changed_shard_is_reported_and_not_encoded(encode: Command, tmp_path: Path) -> None:
    source, cache = tmp_path / "p", tmp_path / "c"
    write_parquet(source / "0.parquet", make_images(0, 2), caption=["a", "b"])
    encode(source, "--to", cache)
    write_parquet(source / "0.parquet", make_images(5, 3), caption=["x", "y", "z"])
    _, out, err = encode(source, "--to", cache)
    assert "encoded 0 images" in out
    assert "since they were planned: 1 (p/0.parquet); the cache still holds the old version" in err
    assert read_table(cache)["caption"].to_pylist() == ["a", "b"]


def test_files_of_other_kinds_are_named(encode: Command, tmp_path: Path) -> None:
    write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 1))
    for name in ("1.gz", "a.npy", "b.npy", "0_stats.json"):
        (tmp_path / "s" / name).write_bytes(b"")
    _, _, err = encode(tmp_path / "s", "--to", tmp_path / "c")
    assert "INFO passed over files that are neither shards nor images: 1 .gz, 2 .npy" in err


def test_unusual_files_of_a_folder_are_skipped_or_rejected(
    encode: Command, latentmill: Command, tmp_path: Path
) -> None:
    source, cache = tmp_path / "photos", tmp_path / "c"
    (source / "2.txt").mkdir(parents=True)
    for name, data in zip(("1.jpg", "2.jpg", os.fsdecode(b"caf\xe9.jpg")), make_images(0, 3), strict=True):
        (source / name).write_bytes(data)
    os.mkfifo(source / "pipe.jpg")
    _, out, err = encode(source, "--to", cache, "--max-reject-rate", 0.5)
    assert "encoded 2 images" in out
    assert "1 bad_key" in out
    kinds = "special files (pipes and the like) and links to folders that contain the source"
    assert f"INFO skipped {kinds}: {source}/pipe.jpg" in err
    (rejects,) = (cache / "_rejects").iterdir()
    assert json.loads(rejects.read_text())["key"] == "caf\\xe9"
    assert "encoded 0 images" in encode(source, "--to", cache, "--max-reject-rate", 0.5)[1]
    assert latentmill("verify", cache, "--recount")[0] == 0


def test_a_folder_that_disappears_after_planning_fails_its_unit(
    latentmill: Command, micro_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = tmp_path / "photos", tmp_path / "c"
    (source / "a").mkdir(parents=True)
    for name, data in zip("12", make_images(0, 2), strict=True):
        (source / f"a/{name}.jpg").write_bytes(data)
    argv = ("encode", source, "--to", cache, "--vae", micro_vae, "--resolution", 64, "--workers", 0)

    def extend_and_unmount(*args: Any, **kwargs: Any) -> Any:
        planned = extend(*args, **kwargs)
        source.rename(tmp_path / "away")
        return planned

    extend = plan.extend_plan
    with monkeypatch.context() as patch:
        patch.setattr(plan, "extend_plan", extend_and_unmount)
        code, _, err = latentmill(*argv)
    assert (code, f"{source}/a is missing or empty" in err) == (1, True)
    (tmp_path / "away").rename(source)
    code, out, _ = latentmill(*argv)
    assert (code, "rejected   0" in out) == (0, True)


def test_incompatible_types_of_a_column_are_refused(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p/0.parquet", make_images(0, 1), label=["cat"])
    write_parquet(tmp_path / "p/1.parquet", make_images(1, 1), label=[{"a": 1}])
    code, _, err = latentmill("encode", tmp_path / "p", "--to", tmp_path / "c", "--vae", micro_vae, "--workers", 0)
    assert code == 2
    assert "the sources have columns with the same name and incompatible types" in err


@pytest.mark.parametrize("damaged", [b"", b"PAR1", b"<html>404 not found</html>"])
def test_a_damaged_parquet_file_does_not_stop_the_others(
    latentmill: Command, micro_vae: Path, tmp_path: Path, damaged: bytes
) -> None:
    write_parquet(tmp_path / "p/good.parquet", make_images(0, 2), caption=["a", "b"])
    (tmp_path / "p/bad.parquet").write_bytes(damaged)
    argv = ("--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    code, out, err = latentmill("encode", tmp_path / "p", *argv, "--json")
    assert (code, json.loads(out)["stats"]["rejected"]) == (3, {"rest_of_shard": 1})
    assert "damaged: " in err
    assert "bad.parquet is not a Parquet file" in err
    assert read_table(tmp_path / "c")["caption"].to_pylist() == ["a", "b"]
    code, _, err = latentmill("encode", tmp_path / "p/bad.parquet", *argv[:1], tmp_path / "d", *argv[2:])
    assert (code, "bad.parquet is not a Parquet file" in err) == (2, True)


def test_a_footer_above_the_limit_is_not_read_for_columns(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p/0.parquet", make_images(0, 2), caption=["a", "b"])
    argv = ["encode", tmp_path / "p", "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]
    code, _, err = latentmill(*argv, "--input-limit", "footer_bytes=100")
    assert code == 2
    assert f"{tmp_path / 'p/0.parquet'} has a footer of more than 100 bytes" in err
    assert latentmill(*argv)[0] == 0


def test_damaged_metadata_fails_only_its_tar(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_img2dataset_shard(tmp_path / "laion", number, 10 * number, 3)
    (tmp_path / "laion/00001.parquet").write_bytes(b"")
    argv = (tmp_path / "laion", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    code, _, err = latentmill("encode", *argv, "--to", tmp_path / "c")
    assert code == 1
    assert "00001.parquet is not a Parquet file: it has 0 bytes; repair or remove this metadata file" in err
    assert list(read_column(tmp_path / "c", "url")) == [f"{n:09d}" for n in range(3)]
    (tmp_path / "laion/00000.parquet").write_bytes(b"")
    code, _, err = latentmill("encode", *argv, "--to", tmp_path / "d")
    assert (code, "00000.parquet is not a Parquet file: it has 0 bytes" in err) == (2, True), (
        "the columns of this file would be missing"
    )


def test_columns_are_found_if_the_first_tar_is_damaged(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    members = img2dataset_members(0, 2)
    members |= {name.replace(".jpg", ".tags"): b"t" for name in members}
    write_tar(tmp_path / "s/1.tar", dict(sorted(members.items())))
    (tmp_path / "s/0.tar").write_bytes(b"no tar" * 1000)
    argv = ("--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0, "--columns", "tags")
    assert latentmill("encode", tmp_path / "s", *argv)[0] == 3
    assert read_table(tmp_path / "c")["tags"].to_pylist() == ["t", "t"]


def test_metadata_without_images_is_not_a_source(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"size": [1], "caption": ["one"]}), tmp_path / "meta.parquet")
    code, _, err = latentmill("encode", tmp_path / "meta.parquet", "--to", tmp_path / "c", "--vae", micro_vae)
    assert code == 2
    assert "meta.parquet has no column with the bytes of images: it has size, caption" in err


def test_webdataset_parts_hold_the_columns(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p/0.parquet", make_images(0, 2), txt=["a", None], score=[0.5, float("nan")], n=[1, 2])
    encode(tmp_path / "p", "--to", tmp_path / "c", "--format", "webdataset")
    cache = Cache.open(str(tmp_path / "c"))
    rows = [row for file in cache.files() for row in cache.rows(file)]
    assert [(row["txt"], row["score"], row["n"]) for row in rows] == [("a", 0.5, 1), (None, None, 2)]
    assert latentmill("decode", tmp_path / "c", "--to", tmp_path / "out", "--workers", 0)[0] == 0


def test_decode_finds_originals_in_parquet_files(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p/0.parquet", make_images(0, 2), name=["a", "b"])
    encode(tmp_path / "p", "--to", tmp_path / "c", "--key-column", "name")
    code, out, _ = latentmill("decode", tmp_path / "c", "--to", tmp_path / "out", "--workers", 0, "--json")
    assert code == 0
    assert [image["key"] for image in json.loads(out)["images"] if image["psnr"]] == ["a", "b"]
