"""The encode job without Ray, through the command line."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill.part_files import to_tensor
from pipeline.cache.reader import Cache
from pipeline.encoder import normalize_pixels
from pipeline.images.decode import open_pixels
from pipeline.images.transform import Transform
from tests.conftest import MICRO, encoded, img2dataset_members, smooth, write_tar
from vae import AutoencoderKL

Command = Callable[..., tuple[int, str, str]]


def read_rows(cache: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((cache / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def read_digest(cache: Path) -> str:
    return str(json.loads((cache / "stats.json").read_text())["digest"])


def test_every_sample_of_the_shards_is_a_row(encode: Command, shards: Path, tmp_path: Path) -> None:
    code, out, _ = encode(shards, "--to", tmp_path / "c")
    rows = read_rows(tmp_path / "c")
    assert code == 0
    assert "encoded 18 images" in out
    assert [row["key"] for row in rows] == [f"{index:09d}" for index in range(18)]
    assert rows[5]["txt"] == "image 5"
    assert json.loads(rows[5]["json"]) == {"key": "000000005"}
    assert {row["shard"] for row in rows} == {f"shards/{n:05d}.tar" for n in range(3)}


def test_a_row_holds_the_latent_of_its_image(encode: Command, tmp_path: Path, micro_vae: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(smooth(7, 64, 64)).save(tmp_path / "photos/x.png")
    encode(tmp_path / "photos", "--to", tmp_path / "c", "--dtype", "float32")
    (row,) = read_rows(tmp_path / "c")
    pixels = torch.from_numpy(smooth(7, 64, 64)).permute(2, 0, 1)[None] / 127.5 - 1
    expected = AutoencoderKL.from_pretrained(micro_vae).encode(pixels).latent_dist.mode()[0]
    assert torch.allclose(to_tensor(row), expected, atol=1e-5)
    assert (row["height"], row["width"], row["shape"], row["dtype"]) == (64, 64, [4, 8, 8], "float32")


def test_rows_of_photos_hold_their_sidecars_and_sizes(encode: Command, photos: Path, tmp_path: Path) -> None:
    encode(photos, "--to", tmp_path / "c")
    rows = {row["key"]: row for row in read_rows(tmp_path / "c")}
    assert list(rows) == ["a/1", "a/2", "b/1", "b/2", "b/3"]
    assert (rows["a/1"]["txt"], rows["a/2"]["txt"], rows["b/3"]["json"]) == ("one", None, '{"n": 3}')
    assert rows["a/1"]["shard"] == "photos"
    assert (rows["a/1"]["original_height"], rows["a/1"]["original_width"]) == (96, 128)
    assert (rows["a/1"]["crop_top"], rows["a/1"]["crop_left"]) == (0, 10)


def test_repeating_the_command_encodes_nothing(encode: Command, shards: Path, tmp_path: Path) -> None:
    encode(shards, "--to", tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c/data").iterdir()}
    digest = read_digest(tmp_path / "c")
    code, out, _ = encode(shards, "--to", tmp_path / "c")
    assert code == 0
    assert "encoded 0 images" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c/data").iterdir()} == before
    assert read_digest(tmp_path / "c") == digest


def test_only_missing_parts_are_encoded(encode: Command, shards: Path, tmp_path: Path) -> None:
    encode(shards, "--to", tmp_path / "reference", "--rows-per-part", 3)
    encode(shards, "--to", tmp_path / "c", "--rows-per-part", 3)
    digest = read_digest(tmp_path / "c")
    lost_part = sorted((tmp_path / "c/data").iterdir())[1]
    lost_part.unlink()
    (tmp_path / "c/_commits" / f"{lost_part.name[:-14]}.json").unlink()
    code, out, _ = encode(shards, "--to", tmp_path / "c", "--json")
    counts = json.loads(out)["run"]["counts"]
    assert code == 0
    assert (counts["parts"], counts["adopted"]) == (2, 1)
    assert (counts["rows"], counts["encoded"]) == (5, 2)
    assert read_digest(tmp_path / "c") == digest == read_digest(tmp_path / "reference")


def test_parts_without_a_commit_are_not_encoded_again(encode: Command, shards: Path, tmp_path: Path) -> None:
    encode(shards, "--to", tmp_path / "c")
    records = {path.name: json.loads(path.read_text())["parts"] for path in (tmp_path / "c/_commits").iterdir()}
    for name in records:
        (tmp_path / "c/_commits" / name).unlink()
    code, out, err = encode(shards, "--to", tmp_path / "c")
    assert code == 0, err
    assert out.startswith("encoded 0 images")
    written = {path.name: json.loads(path.read_text())["parts"] for path in (tmp_path / "c/_commits").iterdir()}
    assert (len(written), written) == (3, records), "the commits are written again"


def test_the_location_of_the_source_does_not_change_the_digest(encode: Command, tmp_path: Path) -> None:
    for disk in ("one", "two"):
        write_tar(tmp_path / disk / "shards/0.tar", img2dataset_members(0, 3))
    encode(tmp_path / "one/shards", "--to", tmp_path / "a")
    encode(str(tmp_path / "two/shards") + "/{0..0}.tar", "--to", tmp_path / "b")
    assert read_digest(tmp_path / "a") == read_digest(tmp_path / "b")


def test_a_run_with_max_shards_can_be_resumed_without_it(encode: Command, shards: Path, tmp_path: Path) -> None:
    encode(shards, "--to", tmp_path / "whole")
    code, out, _ = encode(shards, "--to", tmp_path / "c", "--max-shards", 2)
    assert (code, len(read_rows(tmp_path / "c"))) == (0, 12), out
    code, out, _ = encode(shards, "--to", tmp_path / "c")
    assert "2 of 3 units were done before" in out
    assert read_digest(tmp_path / "c") == read_digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings", [("--store", "moments"), ("--store", "sample", "--seed", "5", "--crop", "random", "--flip", "random")]
)
def test_the_stored_form_of_the_posterior_is_part_of_the_identity(
    encode: Command, latentmill: Command, micro_vae: Path, photos: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    code, _, _ = encode(photos, "--to", tmp_path / "c", *settings, "--dtype", "bfloat16")
    assert code == 0
    second_code, out, _ = encode(photos, "--to", tmp_path / "c")
    assert second_code == 0, "omitted settings are taken from the cache"
    other_code, _, err = encode(photos, "--to", tmp_path / "c", "--store", "mode")
    assert other_code == 2
    assert f"was made with --store {settings[1]}" in err
    code, out, err = latentmill("decode", tmp_path / "c", "--to", tmp_path / "p", "--vae", micro_vae, "--workers", 0)
    assert code == 0, err
    assert "PSNR" in out, "originals are cropped and mirrored as the latents were"


def test_a_webdataset_cache_holds_the_same_rows(
    encode: Command, latentmill: Command, micro_vae: Path, shards: Path, tmp_path: Path
) -> None:
    encode(shards, "--to", tmp_path / "parquet")
    code, _, err = encode(shards, "--to", tmp_path / "tar", "--format", "webdataset", "--max-shards", 1)
    assert code == 0, err
    code, out, err = encode(shards, "--to", tmp_path / "tar")
    assert (code, "1 of 3 units was done before" in out) == (0, True), err
    assert {path.suffix for path in (tmp_path / "tar/data").iterdir()} == {".tar"}
    parquet, tar = Cache.open(str(tmp_path / "parquet")), Cache.open(str(tmp_path / "tar"))
    rows = [[row for file in cache.files() for row in cache.rows(file)] for cache in (parquet, tar)]
    assert rows[0] == rows[1]
    parquet_stats, tar_stats = (json.loads((tmp_path / name / "stats.json").read_text()) for name in ("parquet", "tar"))
    assert parquet_stats.pop("digest") != tar_stats.pop("digest")
    assert parquet_stats == tar_stats
    code, out, err = latentmill("decode", tmp_path / "tar", "--to", tmp_path / "p", "--vae", micro_vae, "--workers", 0)
    assert (code, "PSNR" in out) == (0, True), err
    code, _, err = encode(shards, "--to", tmp_path / "x", "--format", "webdataset", "--dtype", "bfloat16")
    assert (code, "which do not support bfloat16" in err) == (2, True)


def test_images_are_sorted_into_buckets_by_shape(latentmill: Command, micro_vae: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(96, 128), (128, 96), (90, 90), (96, 130)]):
        Image.fromarray(smooth(number, *size)).save(tmp_path / f"photos/{number}.png")
    job = ("encode", tmp_path / "photos", "--vae", micro_vae, "--workers", 0, "--to", tmp_path / "c")
    code, _, err = latentmill(*job, "--buckets", 64, "--multiple-of", 8)
    assert code == 0, err
    rows = read_rows(tmp_path / "c")
    assert [(row["key"], row["height"], row["width"]) for row in rows] == [
        ("0", 56, 72),
        ("3", 56, 72),
        ("2", 64, 64),
        ("1", 72, 56),
    ], "rows are in the order of buckets, then of positions"
    assert [row["shape"] for row in rows] == [[4, row["height"] // 8, row["width"] // 8] for row in rows]
    stats = json.loads((tmp_path / "c/stats.json").read_text())
    assert {name: bucket["count"] for name, bucket in stats["buckets"].items()} == {"56x72": 2, "64x64": 1, "72x56": 1}
    assert latentmill(*job)[0] == 0, "without options, the buckets are those of the cache"
    code, _, err = latentmill(*job, "--resolution", 64)
    message = "was made with --buckets 64, this command has --resolution 64;"
    assert (code, message in err, "[" in err) == (2, True, False), err
    code, _, err = latentmill(*job, "--multiple-of", 16)
    assert (code, "was made with --multiple-of 8, this command has --multiple-of 16;" in err) == (2, True), err
    code, _, err = latentmill(*job[:-1], tmp_path / "d", "--resolution", 64, "--multiple-of", 8)
    assert (code, "--multiple-of is for the sides of --buckets" in err) == (2, True), err
    assert not (tmp_path / "d").exists()
    code, _, err = latentmill("decode", tmp_path / "c", "--to", tmp_path / "p", "--vae", micro_vae, "--workers", 0)
    assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--buckets", 64, "--multiple-of", 12), "--multiple-of 12 is not a multiple of the VAE's factor 8"),
        (("--buckets", 64, "--multiple-of", 40), "--buckets 64 is less than twice --multiple-of 40"),
        (("--buckets", 64, "--resolution", 64), "give only one of them"),
    ],
)
def test_invalid_buckets_are_refused(
    latentmill: Command, micro_vae: Path, photos: Path, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    code, _, err = latentmill("encode", photos, "--vae", micro_vae, "--workers", 0, "--to", tmp_path / "c", *flags)
    assert (code, message in err) == (2, True), err


@pytest.mark.parametrize("batch", [2, 6])
def test_the_batch_size_does_not_change_the_digest(encode: Command, shards: Path, tmp_path: Path, batch: int) -> None:
    encode(shards, "--to", tmp_path / "a", "--batch-size", 2)
    encode(shards, "--to", tmp_path / "b", "--batch-size", 2, "--batch-size", batch)
    assert read_digest(tmp_path / "a") == read_digest(tmp_path / "b")


def test_bad_images_are_rejected_by_name_and_the_others_are_encoded(encode: Command, tmp_path: Path) -> None:
    members = img2dataset_members(0, 2)
    members["2.jpg"] = b"not an image"
    members["3.jpg"] = encoded(smooth(3))[:200]
    members["4.txt"] = b"a caption alone"
    write_tar(tmp_path / "s/0.tar", members)
    code, out, _ = encode(tmp_path / "s", "--to", tmp_path / "c")
    (rejects,) = (tmp_path / "c/_rejects").iterdir()
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert code == 3
    assert "rejected   3: 1 corrupt, 1 no_image, 1 not_an_image" in out
    assert [(r["shard"], r["position"], r["key"], r["stage"], r["reason"]) for r in found] == [
        ("s/0.tar", 2, "2", "open", "not_an_image"),
        ("s/0.tar", 3, "3", "open", "corrupt"),
        ("s/0.tar", 4, "4", "read", "no_image"),
    ]
    assert encode(tmp_path / "s", "--to", tmp_path / "c", "--max-reject-rate", 0.6)[0] == 0


def test_small_images_are_filtered_and_enlarged_ones_counted(encode: Command, tmp_path: Path) -> None:
    for name, side in (("tiny", 20), ("small", 40), ("large", 90)):
        path = tmp_path / "p" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(smooth(side, side, side), "PNG"))
    _, out, _ = encode(tmp_path / "p", "--to", tmp_path / "c", "--min-size", 30)
    assert [row["key"] for row in read_rows(tmp_path / "c")] == ["large", "small"]
    assert "filtered   1: 1 min_size\n  enlarged   1\n" in out


def test_with_json_standard_output_is_only_json(encode: Command, photos: Path, tmp_path: Path) -> None:
    code, out, _ = encode(photos, "--to", tmp_path / "c", "--json")
    assert code == 0
    assert json.loads(out)["stats"] == {
        "count": 5,
        "rejected": {},
        "filtered": {},
        "enlarged": 0,
        "digest": read_digest(tmp_path / "c"),
    }


def test_a_run_writes_its_record(encode: Command, photos: Path, tmp_path: Path) -> None:
    encode(photos, "--to", tmp_path / "c")
    (path,) = (tmp_path / "c/_runs").glob("*.json")
    run = json.loads(path.read_text())
    assert (run["verb"], run["outcome"], run["exit_code"]) == ("encode", "done", 0)
    assert run["counts"]["rows"] == 5


def test_a_cache_is_read_with_the_scaling_that_it_records(encode: Command, photos: Path, tmp_path: Path) -> None:
    encode(photos, "--to", tmp_path / "c")
    cache = Cache.open(str(tmp_path / "c"), digest=read_digest(tmp_path / "c"))
    (file,) = cache.files()
    raw = to_tensor(next(cache.rows(file)))
    assert torch.equal(cache.scaling.to_model(raw), raw * torch.tensor(0.18215, dtype=torch.float16))


def test_omitted_options_are_taken_from_the_cache(
    encode: Command, latentmill: Command, micro_vae: Path, photos: Path, tmp_path: Path
) -> None:
    encode(photos, "--to", tmp_path / "c", "--dtype", "float32")
    code, out, _ = latentmill("encode", photos, "--to", tmp_path / "c", "--vae", micro_vae, "--workers", 0)
    assert code == 0, out


class TestRefusals:
    """Each error is one line. A refused job does not create a cache."""

    def assert_refused(self, result: tuple[int, str, str], code: int, pattern: str) -> None:
        assert result[:2] == (code, "")
        assert len(result[2].splitlines()) == 1
        assert re.search(pattern, result[2]), result[2]

    def test_a_missing_source(self, encode: Command, tmp_path: Path) -> None:
        self.assert_refused(encode(tmp_path / "no", "--to", tmp_path / "c"), 2, "there is no source at .*/no")
        assert not (tmp_path / "c").exists()

    def test_an_empty_source(self, encode: Command, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self.assert_refused(
            encode(tmp_path / "empty", "--to", tmp_path / "c"), 2, "there is no source at .*empty|no tar"
        )
        assert not (tmp_path / "c").exists()

    def test_a_source_without_images(self, encode: Command, tmp_path: Path) -> None:
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts/a.txt").write_text("a")
        self.assert_refused(
            encode(tmp_path / "texts", "--to", tmp_path / "c"),
            2,
            "no tars, zips, Parquet or Arrow files, or images in .*texts",
        )

    def test_a_missing_vae(self, latentmill: Command, photos: Path, tmp_path: Path) -> None:
        result = latentmill("encode", photos, "--to", tmp_path / "c", "--vae", tmp_path / "no", "--workers", 0)
        self.assert_refused(result, 2, "there is no VAE at .*/no")

    def test_another_kind_of_vae(self, latentmill: Command, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other/config.json").write_text('{"_class_name": "AutoencoderDC"}')
        result = latentmill("encode", photos, "--to", tmp_path / "c", "--vae", tmp_path / "other", "--workers", 0)
        self.assert_refused(
            result, 2, "this is a configuration of class AutoencoderDC; the classes of VAEs that can be loaded"
        )

    def test_another_identity(self, encode: Command, photos: Path, tmp_path: Path) -> None:
        encode(photos, "--to", tmp_path / "c")
        self.assert_refused(
            encode(photos, "--to", tmp_path / "c", "--interpolation", "lanczos"),
            2,
            "was made with --interpolation bicubic, this command has --interpolation lanczos; use the settings",
        )

    def test_other_weights(self, encode: Command, latentmill: Command, photos: Path, tmp_path: Path) -> None:
        encode(photos, "--to", tmp_path / "c")
        AutoencoderKL(**MICRO).save_pretrained(tmp_path / "v")
        result = latentmill("encode", photos, "--to", tmp_path / "c", "--vae", tmp_path / "v", "--workers", 0)
        self.assert_refused(
            result,
            2,
            "was made with a VAE whose weights have the sha256 [0-9a-f]{12}",
        )

    def test_a_folder_that_is_not_a_cache(self, encode: Command, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c/thesis.tex").write_text("years of work")
        self.assert_refused(encode(photos, "--to", tmp_path / "c"), 2, "is not a latentmill cache: it is not empty")

    def test_a_cache_below_a_file(self, encode: Command, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        self.assert_refused(encode(photos, "--to", tmp_path / "file/c"), 1, "cannot .* .*file/c.*: not a directory")

    def test_a_resolution_that_is_not_a_multiple_of_the_factor(
        self, latentmill: Command, photos: Path, micro_vae: Path, tmp_path: Path
    ) -> None:
        result = latentmill("encode", photos, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 100)
        self.assert_refused(result, 2, "--resolution 100 is not a multiple of the VAE's factor 8; the nearest is 96")

    def test_a_cache_in_memory_with_workers(self, latentmill: Command, photos: Path, micro_vae: Path) -> None:
        result = latentmill("encode", photos, "--to", "memory://c", "--vae", micro_vae, "--resolution", 64)
        self.assert_refused(result, 2, "use it with --workers 0")

    def test_remote_openers_without_ray(self, encode: Command, photos: Path, tmp_path: Path) -> None:
        result = encode(photos, "--to", tmp_path / "c", "--remote-openers", 2)
        self.assert_refused(result, 2, "--remote-openers does not work with --workers 0; leave it out")

    @pytest.mark.parametrize("name", ["--open-workers", "--remote-openers", "--batch-size"])
    def test_a_negative_count(self, encode: Command, photos: Path, tmp_path: Path, name: str) -> None:
        self.assert_refused(encode(photos, "--to", tmp_path / "c", name, -1), 2, f"{name} must not be negative")

    def test_the_rest_of_a_damaged_shard_is_one_reject(self, encode: Command, tmp_path: Path) -> None:
        write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 30))
        write_tar(tmp_path / "s/1.tar", img2dataset_members(30, 30))
        intact = (tmp_path / "s/1.tar").read_bytes()
        cut = len(intact) // 2
        (tmp_path / "s/1.tar").write_bytes(intact[:cut])
        code, out, err = encode(tmp_path / "s", "--to", tmp_path / "c", "--rows-per-part", 4)
        rows = len(read_rows(tmp_path / "c"))
        assert code == 3
        assert 40 < rows < 50
        assert f"damaged: {tmp_path}/s/1.tar is truncated at byte {cut}: it has no end mark; what could be read" in err
        assert "rejected   1: 1 rest_of_shard" in out
        (reject,) = (
            json.loads(line) for path in tmp_path.glob("c/_rejects/*") for line in path.read_text().splitlines()
        )
        assert (reject["shard"], reject["position"], reject["key"]) == ("s/1.tar", rows - 30, "")
        assert encode(tmp_path / "s", "--to", tmp_path / "c")[0] == 3, "the rest is still missing in the second run"


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_resumable_cache(
    encode: Command, micro_vae: Path, tmp_path: Path, sign: int, code: int
) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(100 * number, 60))
    argv = [tmp_path / "s", "--vae", micro_vae, "--resolution", 64, "--workers", 0, "--rows-per-part", 10]
    command = [sys.executable, "-m", "jobs.encode", *map(str, argv), "--to", str(tmp_path / "c")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and len(list(tmp_path.glob("c/data/*"))) < 2:
        time.sleep(0.01)
    job.send_signal(sign)
    out, err = job.communicate(timeout=60)
    (run,) = (json.loads(path.read_text()) for path in (tmp_path / "c/_runs").glob("*.json"))
    assert (job.returncode, out) == (code, "")
    assert "run the same command to resume" in err
    assert (run["outcome"], run["exit_code"]) == ("stopped", code)
    assert len(list(tmp_path.glob("c/data/*"))) < 24
    assert encode(tmp_path / "s", "--to", tmp_path / "c", "--rows-per-part", 10)[0] == 0
    encode(tmp_path / "s", "--to", tmp_path / "reference", "--rows-per-part", 10)
    assert read_digest(tmp_path / "c") == read_digest(tmp_path / "reference")


@pytest.mark.slow
def test_large_images_are_tiled_on_request(latentmill: Command, photos: Path, micro_vae: Path, tmp_path: Path) -> None:
    def encode(name: str, *more: object) -> tuple[int, str]:
        options = ("--vae", micro_vae, "--resolution", 128, "--workers", 0, "--dtype", "float32", *more)
        code, _, err = latentmill("encode", photos, "--to", tmp_path / name, *options)
        return code, err

    assert encode("whole")[0] == 0
    assert encode("tiled", "--tile-above", 64)[0] == 0
    whole, tiled = (to_tensor(read_rows(tmp_path / name)[0]) for name in ("whole", "tiled"))
    model = AutoencoderKL.from_pretrained(micro_vae)
    model.tile_sample_min_size, model.tile_latent_min_size = 64, 8
    rgb = load_model_input(photos / "a/1.jpg", 128)
    assert torch.allclose(tiled, model.tiled_encode(rgb).latent_dist.mode()[0], atol=1e-5)
    assert not torch.allclose(tiled, whole, atol=1e-3)
    assert encode("tiled")[0] == 0, "an omitted option is taken from the cache"
    code, err = encode("tiled", "--tile-above", 96)
    assert (code, "was made with --tile-above 64, this command has --tile-above 96;" in err) == (2, True)
    code, err = encode("other", "--tile-above", 50)
    assert (code, "--tile-above 50 is not a multiple of 32" in err) == (2, True)
    assert latentmill("decode", tmp_path / "tiled", "--to", tmp_path / "out", "--workers", 0)[0] == 0


def load_model_input(path: Path, resolution: int) -> torch.Tensor:
    """Return an image as the model receives it: [1, 3, H, W] in [-1, 1]."""
    transform = Transform(resolution=resolution)
    rgb = open_pixels(path.read_bytes())
    fit = transform.fit(*rgb.shape[:2], "photos", "a/1")
    assert fit is not None
    return normalize_pixels(transform.apply(rgb, fit)[None], torch.float32)


@pytest.mark.parametrize(("upcast", "precision"), [(True, "fp32"), (False, "fp16")])
def test_a_vae_that_overflows_in_fp16_runs_in_fp32(
    latentmill: Command, photos: Path, tmp_path: Path, upcast: bool, precision: str
) -> None:
    AutoencoderKL(**MICRO, force_upcast=upcast).save_pretrained(tmp_path / "vae")
    argv = (photos, "--to", tmp_path / "c", "--vae", tmp_path / "vae", "--resolution", 64, "--workers", 0)
    for _ in range(2):
        code, _, err = latentmill("encode", *argv, "--precision", "fp16")
        assert (code, "it is run in fp32" in err) == (0, upcast), err
    assert json.loads((tmp_path / "c/cache.json").read_text())["identity"]["precision"] == precision


def test_a_constant_channel_gives_a_warning(latentmill: Command, photos: Path, micro_vae: Path, tmp_path: Path) -> None:
    broken = AutoencoderKL.from_pretrained(micro_vae)
    weights = broken.state_dict()
    weights["quant_conv.weight"][2] = 0.0
    broken.load_state_dict(weights)
    broken.save_pretrained(tmp_path / "vae")
    argv = ["encode", photos, "--vae", tmp_path / "vae", "--resolution", 64, "--workers", 0]
    code, _, err = latentmill(*argv, "--to", tmp_path / "c")
    assert code == 0
    assert "WARNING Channel 2 of the latents is constant" in err
    assert err.count("WARNING") == 1
    (doubt,) = json.loads(latentmill(*argv, "--to", tmp_path / "d", "--json")[1])["findings"]
    assert (doubt["code"], doubt["severity"]) == ("dead-channel", "error")
    assert doubt["sentence"].startswith("Channel 2 of the latents is constant (mean ")
