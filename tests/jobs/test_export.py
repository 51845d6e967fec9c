"""`latentmill export`: what all formats share, and each format read back as its trainer reads it."""

import base64
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentmill import Cache
from pipeline.exports import manifest
from pipeline.storage import connection
from pipeline.storage.folder import Folder
from tests.conftest import MICRO, encoded, slow_param, smooth, write_tar
from vae import AutoencoderKL, AutoencoderKLFlux2

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder `classes` with two folders of images, which have captions but for one."""
    folder = tmp_path_factory.mktemp("source") / "classes"
    for number, name in enumerate(("cat/a.1", "cat/b", "dog/a", "dog/c", "dog/d")):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(smooth(number, 96, 64 + 32 * number), "PNG"))
        if number:
            (folder / f"{name}.txt").write_text(f"caption {number}", encoding="utf-8")
    return folder


def make_vae(folder: Path, **config: object) -> Path:
    """Save a tiny AutoencoderKL of random weights with these fields of its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**MICRO | config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny VAE with the channels and constants of FLUX.1's."""
    constants = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return make_vae(tmp_path_factory.mktemp("flux") / "vae", **constants)


def read_all(cache: Path) -> list[tuple[dict[str, object], Cache]]:
    """Return the rows of a cache in order, each with the cache."""
    opened = Cache.open(str(cache))
    return [(row, opened) for file in opened.files() for row in opened.rows(file)]


def list_files(folder: Path) -> list[str]:
    """Return the files of an export without its own records."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith("_"))


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_lightningdit_reads_latents_mirrors_labels_and_statistics(
    encode: Command, latentmill: Command, classes: Path, tmp_path: Path, container: str
) -> None:
    assert encode(classes, "--label-from-folder", "--flip", "both", "--format", container)[0] == 0
    code, out, err = latentmill("export", tmp_path / "c", "--format", "lightningdit", "--to", tmp_path / "o", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["exported"] == 5
    # as its ImgLatentDataset: files sorted by name, slices by row, statistics [1, C, 1, 1]
    (file,) = sorted((tmp_path / "o").glob("*.safetensors"))
    with safe_open(file, framework="pt") as opened:
        assert opened.get_slice("labels").get_shape() == [5]
        rows = [{key: opened.get_slice(key)[i : i + 1] for key in opened.keys()} for i in range(5)]  # noqa: SIM118
    for (row, cache), found in zip(read_all(tmp_path / "c"), rows, strict=True):
        assert found["labels"].tolist() == [row["label"]]
        assert torch.equal(found["latents"][0], cache.raw_latent(row).float())
        assert torch.equal(found["latents_flip"][0], cache.raw_latent(row, flipped=True).float())
    stats = torch.load(tmp_path / "o/latents_stats.pt")
    both = torch.cat([torch.cat([row["latents"], row["latents_flip"]]) for row in rows])
    torch.testing.assert_close(stats["mean"], both.mean((0, 2, 3), keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats["std"], both.std((0, 2, 3), correction=0, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("workers", [0, slow_param(2)])
def test_columns_that_came_later_are_exported(
    encode: Command, latentmill: Command, classes: Path, tmp_path: Path, container: str, workers: int
) -> None:
    cache, out = tmp_path / "c", tmp_path / "o"
    assert encode(classes, "--flip", "both", "--format", container)[0] == 0
    export = ("export", cache, "--format", "lightningdit", "--to", tmp_path / "l", "--workers", workers)
    code, _, err = latentmill(*export)
    assert (code, "it has no column 'label'" in err) == (2, True), err
    keys = [row["key"] for row, _ in read_all(cache)]
    rows = [{"key": key, "txt": f"new {number}", "label": number} for number, key in enumerate(keys)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert latentmill("annotate", cache, "--from", tmp_path / "t.jsonl")[0] == 0
    assert latentmill(*export)[0] == 0
    assert load_file(next((tmp_path / "l").glob("*.safetensors")))["labels"].tolist() == list(range(5))
    export = ("export", cache, "--format", "safetensors", "--to", out, "--workers", workers)
    assert latentmill(*export)[0] == 0
    lines = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert [(line["key"], line["txt"], line["label"]) for line in lines] == [tuple(row.values()) for row in rows]
    (tmp_path / "t.jsonl").write_text(json.dumps({"key": keys[0], "txt": "newer"}) + "\n")
    assert latentmill("annotate", cache, "--from", tmp_path / "t.jsonl")[0] == 0
    code, _, err = latentmill(*export)
    assert (code, "has an export with another options" in err) == (2, True), err


def load_like_sd_scripts(path: Path, bucket: tuple[int, int], size_in_keys: bool) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file as sd-scripts finds them. bucket: width and height, in pixels."""
    end = f"_{bucket[1] // 8}x{bucket[0] // 8}" if size_in_keys else ""
    archive = np.load(path)
    return {
        name: archive[name + end]
        for name in ("latents", "original_size", "crop_ltrb", "latents_flipped")
        if name + end in archive
    }


@pytest.mark.parametrize(("name", "suffix", "in_keys"), [("sd", "_sd", False), ("flux", "_flux", True)])
def test_sd_scripts_finds_each_image_by_its_size(
    latentmill: Command,
    micro_vae: Path,
    flux_vae: Path,
    classes: Path,
    tmp_path: Path,
    name: str,
    suffix: str,
    in_keys: bool,
) -> None:
    recipe = ("--transform", "sd-scripts", "--resolution", 256, "--min-bucket-reso", 128, "--flip", "both")
    vae = flux_vae if name == "flux" else micro_vae
    assert latentmill("encode", classes, "--to", tmp_path / "c", "--vae", vae, *recipe, "--workers", 0)[0] == 0
    command = ("export", tmp_path / "c", "--format", f"sd-scripts-{name}", "--to", tmp_path / "o")
    code, out, err = latentmill(*command)
    assert (code, err) == (0, "")
    assert "exported 5 rows for sd-scripts" in out
    assert "resolution = 256, min_bucket_reso = 128, max_bucket_reso = 1024" in out
    for row, cache in read_all(tmp_path / "c"):
        stem = str(row["key"]).replace("%2E", ".")
        width, height = row["original_width"], row["original_height"]
        file = tmp_path / f"o/{stem}_{width:04d}x{height:04d}{suffix}.npz"
        arrays = load_like_sd_scripts(file, (row["width"], row["height"]), in_keys)
        assert {array.dtype for array in (arrays["latents"], arrays["latents_flipped"])} == {np.dtype("float32")}
        for key, flipped in (("latents", False), ("latents_flipped", True)):
            expected = cache.raw_latent(row, flipped).float()
            expected = cache.scaling.to_model(expected) if name == "flux" else expected
            assert np.array_equal(arrays[key], expected.numpy()), file
        assert arrays["original_size"].tolist() == [width, height]
        assert np.allclose(arrays["crop_ltrb"], crop_like_sd_scripts((row["width"], row["height"]), (width, height)))
        caption = tmp_path / f"o/{stem}.txt"
        assert (caption.read_text() if caption.exists() else None) == row["txt"]


def crop_like_sd_scripts(bucket: tuple[int, int], size: tuple[int, int]) -> list[float]:
    """Return the borders of a whole image of this size inside the bucket, both as width and height."""
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    wide, tall = size[0] * scale, size[1] * scale
    left, top = (bucket[0] - wide) // 2, (bucket[1] - tall) // 2
    return [left, top, left + wide, top + tall]


def test_musubi_stacks_latents_that_have_the_size_of_their_name(
    latentmill: Command, flux_vae: Path, classes: Path, tmp_path: Path
) -> None:
    buckets = ("--buckets", 128, "--multiple-of", 32)
    assert latentmill("encode", classes, "--to", tmp_path / "c", "--vae", flux_vae, *buckets, "--workers", 0)[0] == 0
    command = ("export", tmp_path / "c", "--format", "musubi-z-image", "--to", tmp_path / "o", "--json")
    code, out, err = latentmill(*command)
    assert (code, err) == (0, "")
    settings = json.loads(out)["settings"]
    assert (settings["enable_bucket"], settings["bucket_no_upscale"]) == (True, True)
    for row, cache in read_all(tmp_path / "c"):
        stem = str(row["key"]).replace("%2E", ".").rpartition("/")[2]
        (file,) = (tmp_path / "o").glob(f"{stem}_[0-9]*_zi.safetensors")
        # the size is the last step of the name but one, and the bucket follows from it by rounding down
        width, height = map(int, file.name.split("_")[-2].split("x"))
        assert width * height <= settings["resolution"] ** 2
        assert (width % 16, height % 16) == (0, 0)
        ((key, latent),) = load_file(file).items()
        assert key == f"latents_1x{height // 8}x{width // 8}_float32"
        assert torch.equal(latent, cache.raw_latent(row).float())
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {
                "architecture": "z_image",
                "width": str(width),
                "height": str(height),
                "format_version": "1.0.1",
            }


def test_musubi_takes_packed_and_normalized_latents_of_flux2(
    latentmill: Command, classes: Path, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLFlux2(**MICRO | {"latent_channels": 32})
        vae.bn.running_mean, vae.bn.running_var = torch.randn(128), torch.rand(128) + 0.1
        vae.save_pretrained(tmp_path / "vae")
    argv = ("--to", tmp_path / "c", "--vae", tmp_path / "vae", "--resolution", 64, "--workers", 0)
    assert latentmill("encode", classes, *argv, "--exclude", "cat/a.1.png")[0] == 0
    code, out, err = latentmill("export", tmp_path / "c", "--format", "musubi-flux2-dev", "--to", tmp_path / "o")
    assert (code, err) == (0, "")
    assert "settings   enable_bucket = false, resolution = [64, 64]" in out
    for row, cache in read_all(tmp_path / "c"):
        (latent,) = load_file(tmp_path / f"o/{str(row['key'])[4:]}_0064x0064_f2d.safetensors").items()
        assert latent[0] == "latents_4x4_float32"
        raw = cache.raw_latent(row).float()
        packed = raw.reshape(32, 4, 2, 4, 2).permute(0, 2, 4, 1, 3).reshape(128, 4, 4)  # c, row, column in the patch
        eps = vae.config.batch_norm_eps
        expected = (packed - vae.bn.running_mean[:, None, None]) / (vae.bn.running_var[:, None, None] + eps).sqrt()
        torch.testing.assert_close(latent[1], expected, rtol=1e-4, atol=1e-5)


def test_simpletuner_finds_scaled_latents_by_the_hash_of_the_stem(
    latentmill: Command, flux_vae: Path, classes: Path, tmp_path: Path
) -> None:
    argv = ("--to", tmp_path / "c", "--vae", flux_vae, "--resolution", 64, "--workers", 0)
    assert latentmill("encode", classes, *argv)[0] == 0
    assert latentmill("export", tmp_path / "c", "--format", "simpletuner", "--to", tmp_path / "o")[0] == 0
    for row, cache in read_all(tmp_path / "c"):
        folder, _, stem = str(row["key"]).replace("%2E", ".").rpartition("/")
        file = tmp_path / "o" / folder / f"{hashlib.sha256(stem.encode()).hexdigest()}.pt"
        latent = torch.load(file, weights_only=True)
        assert latent.dtype == torch.float16
        expected = (cache.raw_latent(row).float() - 0.1159) * 0.3611
        torch.testing.assert_close(latent.float(), expected, rtol=1e-3, atol=1e-4)


def test_repa_pairs_sorted_images_and_moments(
    encode: Command, latentmill: Command, classes: Path, tmp_path: Path
) -> None:
    assert encode(classes, "--store", "moments", "--label-from-folder")[0] == 0
    assert latentmill("export", tmp_path / "c", "--format", "repa", "--to", tmp_path / "o")[0] == 0
    images = sorted(str(path.relative_to(classes)) for path in classes.rglob("*.png"))
    features = [name for name in list_files(tmp_path / "o") if name.endswith(".npy")]
    labels = dict(json.loads((tmp_path / "o/dataset.json").read_text())["labels"])
    rows = {str(row["key"]).replace("%2E", "."): (row, cache) for row, cache in read_all(tmp_path / "c")}
    assert len(images) == len(features) == 5
    for image, feature in zip(images, features, strict=True):
        row, cache = rows[image.removesuffix(".png")]
        assert labels[feature] == row["label"] == ("dog" in image)
        mean, log_variance = cache.raw_latent(row).float().chunk(2)
        found = torch.from_numpy(np.load(tmp_path / "o" / feature))
        assert found.dtype == torch.float32
        assert torch.equal(found[:4], mean)
        torch.testing.assert_close(found[4:], (log_variance / 2).exp())


def read_mds(folder: Path) -> list[dict[str, object]]:
    """Return the samples of an MDS data set, by the layout that MosaicML documents."""
    samples = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        count = int(np.frombuffer(data[:4], np.uint32)[0])
        assert count == shard["samples"]
        offsets = np.frombuffer(data[4 : 4 * (count + 2)], np.uint32)
        for start, end in itertools.pairwise(offsets):
            samples.append(read_mds_sample(data[start:end], shard))
    return samples


def read_mds_sample(data: bytes, shard: dict[str, list[object]]) -> dict[str, object]:
    """Return the values of a sample. Sizes of columns without a fixed one precede the values."""
    decode = {
        "str": bytes.decode,
        "int": lambda value: int(np.frombuffer(value, np.int64)[0]),
        "ndarray:float16": read_mds_array,
    }
    variable = shard["column_sizes"].count(None)
    sizes = iter(np.frombuffer(data[: 4 * variable], np.uint32).tolist())
    sample, place = {}, 4 * variable
    for name, kind, size in zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True):
        end = place + (size or next(sizes))
        sample[name] = decode[kind](data[place:end])
        place = end
    assert place == len(data)
    return sample


def read_mds_array(value: bytes) -> np.ndarray:
    """Return an array: its number of axes in a byte, its shape, its values."""
    assert value[0] % 4 == 0, "shapes are of bytes"
    axes = value[0] >> 2
    return np.frombuffer(value[1 + axes :], np.float16).reshape(*value[1 : 1 + axes])


def test_mds_samples_have_scaled_latents_captions_and_labels(
    encode: Command, latentmill: Command, classes: Path, tmp_path: Path
) -> None:
    assert encode(classes, "--label-from-folder")[0] == 0
    assert latentmill("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / "o")[0] == 0
    samples = read_mds(tmp_path / "o")
    for (row, cache), sample in zip(read_all(tmp_path / "c"), samples, strict=True):
        assert (sample["key"], sample["shard"], sample["label"]) == (row["key"], row["shard"], row["label"])
        assert sample["caption"] == (row["txt"] or "")
        expected = cache.raw_latent(row).float() * 0.18215
        np.testing.assert_allclose(sample["latent"], expected.numpy(), rtol=1e-3, atol=1e-4)


def test_safetensors_files_have_one_size_and_the_columns_of_their_rows(
    latentmill: Command, micro_vae: Path, classes: Path, tmp_path: Path
) -> None:
    argv = ("--buckets", 128, "--store", "moments", "--flip", "both", "--dtype", "bfloat16", "--workers", 0)
    assert latentmill("encode", classes, "--to", tmp_path / "c", "--vae", micro_vae, *argv)[0] == 0
    assert latentmill("export", tmp_path / "c", "--format", "safetensors", "--to", tmp_path / "o")[0] == 0
    files = sorted((tmp_path / "o").glob("*.safetensors"))
    found = [(load_file(file), file.with_suffix(".jsonl").read_text().splitlines()) for file in files]
    assert len(files) > 1, "one for each bucket"
    pairs = [
        (json.loads(line), *latents)
        for tensors, lines in found
        for line, *latents in zip(lines, tensors["latents"], tensors["latents_flipped"], strict=True)
    ]
    for (row, cache), (facts, latent, flipped) in zip(read_all(tmp_path / "c"), pairs, strict=True):
        assert torch.equal(latent, cache.raw_latent(row))
        assert torch.equal(flipped, cache.raw_latent(row, flipped=True))
        assert facts == {name: value for name, value in row.items() if not name.startswith("latent")}
    with safe_open(files[0], framework="pt") as opened:
        assert json.loads(opened.metadata()["vae"])["scaling_factor"] == 0.18215


def test_ai_toolkit_finds_scaled_latents_by_the_hash_of_its_own_sizes(
    latentmill: Command, flux_vae: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for name, size in (("a.png", (64, 128)), ("b/c.jpg", (128, 64)), ("b/d.e.webp", (64, 64))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.rpartition(".")[2]]
        (folder / name).write_bytes(encoded(smooth(1, *size), kind))
    argv = ("--to", tmp_path / "c", "--vae", flux_vae, "--transform", "none", "--workers", 0)
    assert latentmill("encode", folder, *argv)[0] == 0
    code, out, err = latentmill("export", tmp_path / "c", "--format", "ai-toolkit-flux", "--to", folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["settings"] == {"resolution": 91, "bucket_tolerance": 64, "cache_latents_to_disk": True}
    names = {"a": "a.png", "b/c": "b/c.jpg", "b/d%2Ee": "b/d.e.webp"}
    for row, cache in read_all(tmp_path / "c"):
        path = folder / names[str(row["key"])]
        width, height = row["width"], row["height"]
        text = (
            f'{{"crop_height": {height}, "crop_width": {width}, "crop_x": 0, "crop_y": 0, "filename": "{path.name}", '
            f'"latent_space_version": "flux1", "latent_version": 1, "scale_to_height": {height}, '
            f'"scale_to_width": {width}}}'
        )
        code = base64.urlsafe_b64encode(hashlib.md5(text.encode()).digest()).decode().replace("=", "")
        latent = load_file(path.parent / "_latent_cache" / f"{path.stem}_{code}.safetensors")["latent"]
        expected = (cache.raw_latent(row).float() - 0.1159) * 0.3611
        torch.testing.assert_close(latent.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "missing", "remedy"),
    [
        ("lightningdit", ("--flip", "both"), "no column 'label'", "--label-from-folder"),
        ("lightningdit", ("--label-from-folder",), "no latents of the mirrored images", "--flip both"),
        ("repa", ("--label-from-folder",), "only the mode of each posterior", "--store moments"),
        (
            "repa",
            ("--label-from-folder", "--store", "moments", "--buckets", 128),
            "images have 2 sizes (192x64, 128x128), but REPA reads one size",
            "--resolution",
        ),
        ("sd-scripts-sdxl", (), "the scaling factor 0.18215 and the shift 0, but sd-scripts uses", "of the model"),
        ("sd-scripts-flux", (), "its latents have 4 channels, but sd-scripts expects 16", "of the model"),
        (
            "sd-scripts-sd",
            ("--buckets", 128, "--multiple-of", 32),
            "buckets in steps of 64 pixels, and images of 160x96, 96x160 do not fit",
            "--transform sd-scripts",
        ),
        ("simpletuner", ("--latents-mean",), "a mean of each channel, which SimpleTuner does not subtract", "its own"),
    ],
)
def test_a_cache_that_lacks_what_a_format_needs_is_refused(
    latentmill: Command,
    micro_vae: Path,
    classes: Path,
    tmp_path: Path,
    name: str,
    options: tuple[object, ...],
    missing: str,
    remedy: str,
) -> None:
    vae = micro_vae
    if options == ("--latents-mean",):
        options, vae = (), make_vae(tmp_path / "vae", latents_mean=(1.0,) * 4, latents_std=(2.0,) * 4)
    if "--buckets" not in options:
        options = (*options, "--resolution", 64)
    argv = ("--to", tmp_path / "c", "--vae", vae, "--workers", 0, *options)
    assert latentmill("encode", classes, *argv)[0] == 0
    code, _, err = latentmill("export", tmp_path / "c", "--format", name, "--to", tmp_path / "o")
    assert code == 2
    assert f"the cache {tmp_path}/c cannot be exported with --format {name}: " in err
    assert missing in err
    assert remedy in err.partition("; ")[2]
    assert not (tmp_path / "o").exists()


def test_nothing_is_written_into_a_cache(encode: Command, latentmill: Command, photos: Path, tmp_path: Path) -> None:
    assert encode(photos)[0] == 0
    for to in ("c", "c/data"):
        code, _, err = latentmill("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / to)
        assert (code, "--to is in the cache itself" in err) == (2, True)


def test_an_unknown_format_or_column_is_named(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path
) -> None:
    assert encode(photos)[0] == 0
    to = ("--to", tmp_path / "o")
    code, _, err = latentmill("export", tmp_path / "c", "--format", "lightningdi", *to)
    assert (code, "did you mean lightningdit?" in err) == (2, True)
    code, _, err = latentmill("export", tmp_path / "c", "--format", "mds", *to, "--caption-column", "text")
    assert (code, "has the columns txt, json" in err) == (2, True), err
    code, _, err = latentmill("export", tmp_path / "c", "--format", "simpletuner", *to, "--label-column", "json")
    assert (code, "--label-column does not apply to --format simpletuner" in err) == (2, True)
    code, _, err = latentmill("export", tmp_path / "c", "--format", "mds", *to, "--with-shard")
    assert (code, "--with-shard does not apply to --format mds" in err) == (2, True)


def test_two_rows_of_one_name_are_an_error_that_names_both(
    encode: Command, latentmill: Command, tmp_path: Path
) -> None:
    for number in range(2):
        members = {"x/a.png": encoded(smooth(number), "PNG"), f"x/b{number}.png": encoded(smooth(9), "PNG")}
        write_tar(tmp_path / f"shards/{number}.tar", members)
    assert encode(tmp_path / "shards")[0] == 0
    command = ("export", tmp_path / "c", "--format", "sd-scripts-sd", "--to", tmp_path / "o")
    code, _, err = latentmill(*command)
    assert code == 2
    assert "two rows would have the files of one image, x/a: x/a of shards/0.tar, and x/a of shards/1.tar; " in err
    assert "use --with-shard" in err
    assert list_files(tmp_path / "o") == []
    code, _, err = latentmill(*command, "--with-shard")
    assert (code, err) == (0, "")
    size = "0064x0064_sd.npz"
    assert list_files(tmp_path / "o") == [f"shards/{n}/x/{stem}_{size}" for n in range(2) for stem in ("a", f"b{n}")]


def test_names_that_differ_in_case_are_one_on_a_disk_that_ignores_it(
    encode: Command, latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {name: encoded(smooth(number), "PNG") for number, name in enumerate(("a.png", "A.png"))}
    write_tar(tmp_path / "shards/0.tar", images)
    assert encode(tmp_path / "shards")[0] == 0
    command = ("export", tmp_path / "c", "--format", "simpletuner", "--to")
    assert latentmill(*command, tmp_path / "o")[0] == 0
    # as if the disk found the record under this name as well
    monkeypatch.setattr(manifest, "name_manifest", lambda form: "EXPORT.JSON")
    monkeypatch.setattr("jobs.export.name_manifest", lambda form: "export.json")
    code, _, err = latentmill(*command, tmp_path / "p")
    assert (code, "A of shards/0.tar" in err) == (2, True), err


def test_a_stopped_export_goes_on_where_it_was(
    encode: Command, latentmill: Command, shards: Path, tmp_path: Path
) -> None:
    assert encode(shards)[0] == 0
    command = ("export", tmp_path / "c", "--format", "simpletuner", "--to", tmp_path / "o", "--workers", 0, "--json")
    assert json.loads(latentmill(*command)[1])["exported"] == 18
    written = {path: path.read_bytes() for path in (tmp_path / "o").glob("*.pt")}
    times = {path: path.stat().st_mtime_ns for path in written}
    # as if it was stopped in the second part: its record and some of its files are missing
    (tmp_path / "o/_latentmill/simpletuner/00001.json").unlink()
    lost = [path for path in written if path.name[0] in "01234"]
    mine = {hashlib.sha256(f"{number:09d}".encode()).hexdigest() for number in range(5, 12)}
    lost = [path for path in lost if path.stem in mine]
    assert 0 < len(lost) < 7
    for path in lost:
        path.unlink()
    summary = json.loads(latentmill(*command)[1])
    assert (summary["exported"], summary["skipped"], summary["refused"]) == (len(lost), 18 - len(lost), 0)
    assert {path: path.read_bytes() for path in (tmp_path / "o").glob("*.pt")} == written
    assert all(path.stat().st_mtime_ns == times[path] for path in written if path not in lost)
    again = json.loads(latentmill(*command)[1])
    assert (again["exported"], again["skipped"]) == (0, 18)


@pytest.mark.parametrize("name", ["simpletuner", "safetensors"])
def test_files_that_were_removed_are_written_again(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path, name: str
) -> None:
    assert encode(photos, "--rows-per-part", 2)[0] == 0
    command = ("export", tmp_path / "c", "--format", name, "--to", tmp_path / "o", "--workers", 0, "--json")
    assert json.loads(latentmill(*command)[1])["exported"] == 5
    files = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    removed = max(path for path in files if path.suffix in (".pt", ".safetensors"))
    removed.unlink()
    again = json.loads(latentmill(*command)[1])
    assert again["exported"] + again["skipped"] == 5 and again["exported"] in (1, 2)
    assert {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()} == files


def test_exports_for_several_trainers_may_be_beside_the_images(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path
) -> None:
    assert encode(photos)[0] == 0
    for name in ("sd-scripts-sd", "simpletuner", "sd-scripts-sd"):
        assert latentmill("export", tmp_path / "c", "--format", name, "--to", tmp_path / "o")[0] == 0
    assert len(list(tmp_path.glob("o/*/*.npz"))) == len(list(tmp_path.glob("o/*/*.pt"))) == 5
    code, _, err = latentmill("export", tmp_path / "c", "--format", "safetensors", "--to", tmp_path / "o")
    assert (code, "has an export with --format sd-scripts-sd" in err) == (2, True), err


def test_an_export_refuses_columns_that_do_not_cover_all_parts(
    encode: Command, latentmill: Command, shards: Path, tmp_path: Path
) -> None:
    assert encode(shards, "--columns", "txt", "--max-shards", 1)[0] == 0
    table = "".join(json.dumps({"key": f"{n:09d}", "txt": f"new {n}", "score": 1.0}) + "\n" for n in range(18))
    (tmp_path / "t.jsonl").write_text(table)
    annotate = ("annotate", tmp_path / "c", "--from", tmp_path / "t.jsonl")
    assert latentmill(*annotate)[0] == 0
    assert encode(shards, "--columns", "txt")[0] == 0
    command = ("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / "o")
    code, _, err = latentmill(*command)
    assert (code, "(txt) does not cover 2 parts, such as data/" in err) == (2, True), err
    assert not (tmp_path / "o").exists()
    assert latentmill("export", tmp_path / "c", "--format", "simpletuner", "--to", tmp_path / "p")[0] == 0
    assert latentmill(*annotate)[0] == 0
    assert latentmill(*command)[0] == 0
    assert sorted(sample["caption"] for sample in read_mds(tmp_path / "o")) == sorted(f"new {n}" for n in range(18))


def test_labels_of_cls_files_are_numbers(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    members = {
        f"{n}.{kind}": data
        for n in range(3)
        for kind, data in (("png", encoded(smooth(n), "PNG")), ("cls", b"%d\n" % n))
    }
    members |= {"3.png": encoded(smooth(3), "PNG"), "3.cls": b"cat"}
    write_tar(tmp_path / "s/0.tar", members)
    assert encode(tmp_path / "s", "--columns", "cls")[0] == 0
    command = ("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / "o", "--label-column", "cls")
    code, _, err = latentmill(*command)
    assert (code, "refused: 3 of s/0.tar: its column 'cls' is 'cat', not a whole number" in err) == (3, True), err
    assert sorted(sample["label"] for sample in read_mds(tmp_path / "o")) == [0, 1, 2]


def test_an_export_is_completed_after_its_cache_has_grown(
    encode: Command, latentmill: Command, shards: Path, tmp_path: Path
) -> None:
    command = ("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / "o", "--json")
    assert encode(shards, "--max-shards", 1)[0] == 0
    assert json.loads(latentmill(*command)[1])["exported"] == 5
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").glob("*.mds")}
    assert encode(shards)[0] == 0
    summary = json.loads(latentmill(*command)[1])
    assert (summary["exported"], summary["skipped"]) == (13, 5)
    assert {name: (tmp_path / "o" / name).read_bytes() for name in before} == before
    assert sorted(sample["key"] for sample in read_mds(tmp_path / "o")) == [f"{n:09d}" for n in range(18)]


def test_another_cache_is_refused_in_the_folder_of_an_export(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path
) -> None:
    command = ("export", tmp_path / "c", "--format", "safetensors", "--to", tmp_path / "o")
    source = shutil.copytree(photos, tmp_path / "photos")
    assert encode(source)[0] == 0
    assert latentmill(*command)[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "c")
    (source / "a/2.png").write_bytes(encoded(smooth(7), "PNG"))
    assert encode(source)[0] == 0
    code, _, err = latentmill(*command)
    assert (code, "has changed in the cache" in err) == (2, True), err
    shutil.rmtree(tmp_path / "c")
    assert encode(source, "--dtype", "float32")[0] == 0
    code, _, err = latentmill(*command)
    assert (code, "has an export with another identity" in err) == (2, True), err
    code, _, err = latentmill(*command[:3], "mds", *command[4:])
    assert (code, "has an export with --format safetensors; export to an empty folder" in err) == (2, True), err
    assert {path: path.read_bytes() for path in (tmp_path / "o").rglob("*") if path.is_file()} == files


def test_a_cache_of_a_running_job_is_refused(
    encode: Command, latentmill: Command, shards: Path, tmp_path: Path
) -> None:
    assert encode(shards)[0] == 0
    next((tmp_path / "c/data").iterdir()).unlink()
    code, _, err = latentmill("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / "o")
    assert (code, "run the same encode command to finish it" in err) == (2, True)


def test_a_users_file_is_never_overwritten(encode: Command, latentmill: Command, photos: Path, tmp_path: Path) -> None:
    assert encode(photos)[0] == 0
    out = tmp_path / "o"
    (out / "a").mkdir(parents=True)
    (out / "a/1.txt").write_text("an edited caption")
    (out / "a/2_0064x0064_sd.npz").write_text("something else")
    command = ("export", tmp_path / "c", "--format", "sd-scripts-sd", "--to", out)
    code, _, err = latentmill(*command)
    assert code == 1
    assert f"{out}/a/2_0064x0064_sd.npz exists and is not the file of this export" in err
    assert (out / "a/2_0064x0064_sd.npz").read_text() == "something else"
    (out / "a/2_0064x0064_sd.npz").unlink()
    code, _, err = latentmill(*command)
    assert (code, "1 caption file existed already" in err) == (0, True)
    assert (out / "a/1.txt").read_text() == "an edited caption"


def test_rows_without_a_label_are_refused_by_name(
    encode: Command, latentmill: Command, classes: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(classes, tmp_path / "classes")
    (source / "none.png").write_bytes(encoded(smooth(8), "PNG"))
    assert encode(source, "--label-from-folder", "--flip", "both")[0] == 0
    command = ("export", tmp_path / "c", "--format", "lightningdit", "--to", tmp_path / "o")
    for exported in (5, 0):
        code, out, err = latentmill(*command)
        assert code == 3
        assert f"exported {exported} rows for LightningDiT ({5 - exported} were there already, 1 refused)" in out
        assert "refused: none of classes: its column 'label' is None, not a whole number" in err


def test_a_latent_that_exceeds_the_dtype_of_the_format_is_refused(
    latentmill: Command, photos: Path, tmp_path: Path
) -> None:
    vae = make_vae(tmp_path / "vae", scaling_factor=1e9)
    argv = ("--to", tmp_path / "c", "--vae", vae, "--resolution", 64, "--workers", 0)
    assert latentmill("encode", photos, *argv)[0] == 0
    code, out, _ = latentmill("export", tmp_path / "c", "--format", "mds", "--to", tmp_path / "o", "--json")
    summary = json.loads(out)
    assert (code, summary["exported"], summary["refused"]) == (3, 0, 5)
    assert summary["refusals"][0]["reason"] == "its latent has values that float16 cannot hold"


def test_no_key_leads_out_of_the_folder(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    keys = ["../../evil", "/root", "fine", "x/../../y", "a" * 300]
    table = pa.table({"id": keys, "image": [encoded(smooth(number)) for number in range(5)]})
    (tmp_path / "s").mkdir()
    pq.write_table(table, tmp_path / "s/0.parquet")
    encode(tmp_path / "s", "--key-column", "id")
    stored = sorted(str(row["key"]) for row, _ in read_all(tmp_path / "c"))
    outside = set(tmp_path.parent.iterdir()) | set(tmp_path.iterdir())
    code, out, _ = latentmill("export", tmp_path / "c", "--format", "sd-scripts-sd", "--to", tmp_path / "o/p", "--json")
    summary = json.loads(out)
    assert summary["exported"] + summary["refused"] == len(stored)
    assert set(tmp_path.parent.iterdir()) | set(tmp_path.iterdir()) - {tmp_path / "o"} == outside
    assert list_files(tmp_path / "o/p") == ["fine_0064x0064_sd.npz"]
    assert code == 3, stored


@pytest.mark.slow
def test_processes_write_the_same_files(encode: Command, latentmill: Command, shards: Path, tmp_path: Path) -> None:
    assert encode(shards)[0] == 0
    for workers in (0, 2):
        command = ("export", tmp_path / "c", "--format", "simpletuner", "--to", tmp_path / f"o{workers}")
        code, _, err = latentmill(*command, "--workers", workers)
        assert code == 0, err
    files = [{path.name: path.read_bytes() for path in (tmp_path / f"o{n}").glob("*.pt")} for n in (0, 2)]
    assert len(files[0]) == 18
    assert files[0] == files[1]


def test_an_export_can_go_to_a_url(encode: Command, latentmill: Command, photos: Path, tmp_path: Path) -> None:
    assert encode(photos, "--to", "memory://export-test/c")[0] == 0
    command = ("export", "memory://export-test/c", "--format", "safetensors", "--to", "memory://export-test/o")
    code, _, err = latentmill(*command, "--workers", 2)
    assert (code, "memory:// works with --workers 0 only" in err) == (2, True)
    assert latentmill(*command)[0] == 0
    assert fsspec.filesystem("memory").exists("/export-test/o/part-00000-000.safetensors")


@pytest.mark.slow
def test_an_export_to_a_store_is_resumed(
    encode: Command, latentmill: Command, photos: Path, tmp_path: Path, bucket: str
) -> None:
    assert encode(photos, "--to", f"{bucket}/c")[0] == 0
    out = Folder(f"{bucket}/o", {})
    command = ("export", f"{bucket}/c", "--format", "simpletuner", "--to", out.url, "--json")
    assert json.loads(latentmill(*command)[1])["exported"] == 5
    filesystem, path = connection.get_filesystem(out.url, {})
    filesystem.rm_file(f"{path}/_latentmill/simpletuner/00000.json")
    filesystem.rm_file(f"{path}/a/{hashlib.sha256(b'1').hexdigest()}.pt")
    summary = json.loads(latentmill(*command)[1])
    assert (summary["exported"], summary["skipped"]) == (1, 4)
    assert len(out.list_files("a")) == 2
