"""Decode whole caches: formats, resuming, the table of fidelity, buckets, and every stored form of a latent."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentmill import Cache
from pipeline.errors import Stopped
from pipeline.preview import image_files, render
from pipeline.preview.fidelity_table import write_table
from pipeline.preview.selection import RenderTask
from tests.conftest import encoded, slow_param, smooth
from vae import AutoencoderKL

Command = Callable[..., tuple[int, str, str]]
Decode = Callable[..., Path]


@pytest.fixture
def cache(encode: Command, shards: Path, tmp_path: Path) -> Path:
    """Return a cache of 18 images, which are decoded in two parts, of 12 and 6 rows."""
    assert encode(shards)[0] == 0
    return tmp_path / "c"


@pytest.fixture
def decode(latentmill: Command, tmp_path: Path) -> Decode:
    """Return `latentmill decode` in this process. It returns the folder of the output."""

    def run(cache: Path, name: str, *more: object, code: int = 0) -> Path:
        argv = () if "--workers" in more else ("--workers", 0)
        result, _, err = latentmill("decode", cache, "--to", tmp_path / name, *argv, *more)
        assert result == code, err
        return tmp_path / name

    return run


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def read_table(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / "fidelity.parquet").to_pylist())


def read_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def read_images(folder: Path) -> dict[str, np.ndarray]:
    """Return the pixels of an output of single files, by key."""
    return {row["key"]: read_pixels((folder / row["file"]).read_bytes()) for row in read_table(folder)}


def decode_by_hand(model: AutoencoderKL, cache: Path) -> dict[str, np.ndarray]:
    """Return the pixels of all rows of a cache, by key."""
    opened, images = Cache.open(str(cache)), {}
    for row in (row for file in opened.files() for row in opened.rows(file)):
        latent = opened.raw_latent(row)[: model.config.latent_channels].float()
        with torch.inference_mode():
            pixels = model.decode(latent[None]).sample[0]
        images[row["key"]] = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    return images


def check_pixels(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Check that the pixels differ by rounding at most."""
    assert found.keys() == expected.keys()
    for key, pixels in found.items():
        assert np.abs(pixels.astype(int) - expected[key]).max() <= 1, key


def test_every_row_is_decoded_and_measured(cache: Path, decode: Decode, micro_vae: Path) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    out = decode(cache, "p", "--limit", 0)
    table = read_table(out)
    assert [row["key"] for row in table] == [f"{number:09d}" for number in range(18)]
    assert {(row["height"], row["width"]) for row in table} == {(64, 64)}
    images = read_images(out)
    check_pixels(images, decode_by_hand(AutoencoderKL.from_pretrained(micro_vae), cache))
    original = np.asarray(Image.open(io.BytesIO(encoded(smooth(0), quality=90))).resize((85, 64), 3))[:, 10:74]
    assert table[0]["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(original, images["000000000"]), abs=0.3)
    report = read_report(out)
    assert report["decoded"] == 18
    assert report["ssim"]["mean"] == pytest.approx(np.mean([row["ssim"] for row in table]))
    assert report["psnr"]["min"] == report["worst"][0]["psnr"] == min(row["psnr"] for row in table)
    worst = sorted(table, key=lambda row: row["psnr"])[:5]
    assert [image["key"] for image in report["worst"]] == [row["key"] for row in worst]


def test_the_summary_has_the_fidelity_and_the_worst_images(cache: Path, latentmill: Command, tmp_path: Path) -> None:
    _, out, _ = latentmill("decode", cache, "--to", tmp_path / "p", "--workers", 0)
    report = read_report(tmp_path / "p")
    assert "  fidelity   PSNR {mean:.1f} dB on average, {min:.1f} to {max:.1f}".format(**report["psnr"]) in out
    assert "             SSIM {mean:.3f} on average, {min:.3f} to {max:.3f}".format(**report["ssim"]) in out
    assert f"  lowest     {report['worst'][0]['key']} ({report['worst'][0]['psnr']:.1f} dB), " in out


@pytest.mark.parametrize("form", [*map(slow_param, ("files", "webdataset")), "parquet"])
def test_a_stopped_job_resumes_with_the_missing_parts(
    cache: Path, decode: Decode, latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    argv = ("--limit", 0, "--format", form)
    whole = read_files(decode(cache, "whole", *argv))
    written = list[int]()

    def stop_in_second_part(out: Any, part: int, *rest: Any) -> None:
        if written:
            os.kill(os.getpid(), signal.SIGINT)
            raise Stopped
        write_table(out, part, *rest)
        written.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(render, "write_table", stop_in_second_part)
        patch.setattr(render.RenderSpec, "tasks_per_worker", 1)
        out = decode(cache, "p", *argv, code=130)
    assert [path.name for path in (out / "fidelity.parquet").iterdir()] == [f"{written[0]:05d}.parquet"]
    assert read_report(out)["finished"] is False
    decoded: list[int] = []
    render_task = render.render_task

    def note(task: RenderTask, worker: render.RenderWorker) -> render.RenderReport:
        decoded.append(task.number)
        return render_task(task, worker)

    monkeypatch.setattr(render, "render_task", note)
    _, printed, _ = latentmill("decode", cache, "--to", out, "--workers", 0, *argv)
    assert decoded == [1 - written[0]]
    counts = (6, 12) if decoded == [1] else (12, 6)
    assert printed.startswith("decoded {} images ({} were there already)\n".format(*counts))
    files = read_files(out)
    assert {name: files[name] for name in files if name != "report.json"} == {
        name: whole[name] for name in whole if name != "report.json"
    }
    _, printed, _ = latentmill("decode", cache, "--to", out, "--workers", 0, *argv)
    assert len(decoded) == 1
    assert printed.startswith("decoded 0 images (18 were there already)\n")
    assert read_report(out)["psnr"] == json.loads(whole["report.json"])["psnr"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tars(
    cache: Path, decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(image_files, "FILE_BYTES", 20_000)
    plain, out = decode(cache, "plain", "--limit", 0), decode(cache, "p", "--limit", 0, "--format", "webdataset")
    tars = sorted(str(path) for path in (out / "decoded").iterdir())
    assert len(tars) > 2
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["json"]["key"] for sample in samples] == [row["key"] for row in read_table(plain)]
    assert [sample["json"]["psnr"] for sample in samples] == [row["psnr"] for row in read_table(plain)]
    pixels = read_images(plain)
    for sample, row in zip(webdataset.WebDataset(tars, shardshuffle=False), read_table(out), strict=True):
        np.testing.assert_array_equal(read_pixels(sample["png"]), pixels[row["key"]])
        assert sample["__key__"].endswith(f"/{row['key']}")
        assert (out / row["file"]).is_file()


@pytest.mark.slow
def test_pyarrow_reads_the_parquet_files(cache: Path, decode: Decode) -> None:
    plain, out = decode(cache, "plain", "--limit", 0), decode(cache, "p", "--limit", 0, "--format", "parquet")
    rows = pq.read_table(out / "decoded").to_pylist()
    images = {row["key"]: read_pixels(row.pop("image")["bytes"]) for row in rows}
    assert rows == read_table(out)
    assert {row["file"] for row in rows} == {"decoded/00000-000.parquet", "decoded/00001-000.parquet"}
    expected = read_images(plain)
    assert images.keys() == expected.keys()
    for key, pixels in images.items():
        np.testing.assert_array_equal(pixels, expected[key])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_its_seed_alone(
    cache: Path, decode: Decode, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    argv = ("--sample", 14, "--seed", 3)
    monkeypatch.setattr(render.RenderSpec, "tasks_per_worker", 1)
    one = read_files(decode(cache, "one", *argv))
    monkeypatch.setattr(render.RenderSpec, "tasks_per_worker", 2)
    assert read_files(decode(cache, "two", *argv, "--workers", workers)) == one
    keys = [row["key"] for row in read_table(decode(cache, "three", "--sample", 14, "--seed", 4))]
    assert keys != [image["key"] for image in json.loads(one["report.json"])["images"]]
    assert len(set(keys)) == 14


def test_other_images_are_not_mixed_in(cache: Path, decode: Decode, latentmill: Command, tmp_path: Path) -> None:
    out = decode(cache, "p", "--limit", 2)
    before = read_files(out)
    for other in (("--limit", 3), ("--limit", 2, "--format", "parquet"), ("--sample", 2)):
        code, _, err = latentmill("decode", cache, "--to", out, "--workers", 0, *other)
        assert code == 2
        assert f"{out}/report.json is of other images: " in err
    assert read_files(out) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--limit", -1), "--limit must not be negative"),
        (("--sample", -1), "--sample must not be negative"),
        (("--seed", 1), "--seed is the seed of --sample; give both"),
    ],
)
def test_numbers_without_a_meaning_are_refused(
    latentmill: Command, tmp_path: Path, argv: tuple[object, ...], message: str
) -> None:
    code, _, err = latentmill("decode", tmp_path, "--to", tmp_path / "p", *argv)
    assert (code, message in err) == (2, True)


@pytest.mark.slow
def test_a_cache_without_its_source_is_decoded(
    encode: Command, decode: Decode, latentmill: Command, shards: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(shards, tmp_path / "shards")
    encode(source)
    source.rename(tmp_path / "elsewhere")
    out = decode(tmp_path / "c", "p", "--limit", 0)
    assert [(row["psnr"], row["ssim"]) for row in read_table(out)] == [(None, None)] * 18
    assert read_report(out)["without_original"] == 18
    images = read_images(out)
    _, printed, _ = latentmill("decode", tmp_path / "c", "--to", out, "--limit", 0, "--workers", 0)
    assert "\n  originals  18 of 18 could not be read\n" in printed
    assert "PSNR" not in printed
    (tmp_path / "elsewhere").rename(tmp_path / "shards")
    _, printed, _ = latentmill("decode", tmp_path / "c", "--to", out, "--limit", 0, "--workers", 0, "--source", source)
    assert "decoded 18 images\n" in printed
    assert "could not be read" not in printed
    assert all(row["psnr"] and row["ssim"] for row in read_table(out))
    for key, pixels in read_images(out).items():
        np.testing.assert_array_equal(pixels, images[key])


def test_an_image_that_is_missing_has_nulls(encode: Command, decode: Decode, photos: Path, tmp_path: Path) -> None:
    source = shutil.copytree(photos, tmp_path / "photos")
    encode(source)
    (source / "a/2.png").unlink()
    out = decode(tmp_path / "c", "p")
    assert [row["key"] for row in read_table(out) if row["psnr"] is None] == ["a/2"]
    assert read_report(out)["without_original"] == 1


@pytest.fixture
def bucketed(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Path:
    """Return a cache of 6 images in one bucket, and 3 in another."""
    for number in range(9):
        height, width = (64, 96) if number % 3 else (96, 64)
        path = tmp_path / f"s/{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(smooth(number, height, width), "PNG"))
    argv = ("--vae", micro_vae, "--buckets", 64, "--multiple-of", 8, "--workers", 0)
    assert latentmill("encode", tmp_path / "s", "--to", tmp_path / "b", *argv)[0] == 0
    return tmp_path / "b"


def test_each_bucket_has_its_batches_and_its_sheets(
    bucketed: Path, decode: Decode, micro_vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.resources.CPU_BATCH", 4)
    shapes: list[tuple[int, ...]] = []
    run = render.RenderWorker._run

    def note(self: render.RenderWorker, latents: torch.Tensor, size: int) -> torch.Tensor:
        shapes.append(tuple(latents.shape))
        return run(self, latents, size)

    monkeypatch.setattr(render.RenderWorker, "_run", note)
    out = decode(bucketed, "p")
    table = read_table(out)
    buckets = sorted({(row["height"], row["width"]) for row in table})
    assert len(buckets) == 2
    (low_h, low_w), (high_h, high_w) = buckets
    assert sorted(shapes) == sorted(
        [(4, 4, low_h // 8, low_w // 8), (2, 4, low_h // 8, low_w // 8), (3, 4, high_h // 8, high_w // 8)]
    )
    assert [row["psnr"] is None for row in table] == [False] * 9
    assert read_report(out)["sheets"] == [f"sheets/{low_h}x{low_w}-00000.png", f"sheets/{high_h}x{high_w}-00000.png"]
    check_pixels(read_images(out), decode_by_hand(AutoencoderKL.from_pretrained(micro_vae), bucketed))


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
@pytest.mark.parametrize("options", [slow_param(("--flip", "both")), ("--store", "moments")], ids=["flip", "moments"])
def test_two_latents_or_moments_give_the_same_images(
    encode: Command, decode: Decode, photos: Path, tmp_path: Path, options: tuple[str, str], container: str
) -> None:
    encode(photos, "--to", tmp_path / "mode")
    encode(photos, "--to", tmp_path / "other", *options, "--format", container)
    expected, found = decode(tmp_path / "mode", "p-mode"), decode(tmp_path / "other", "p-other")
    measured, wanted = (
        [(row["key"], row["psnr"], row["ssim"]) for row in read_table(out)] for out in (found, expected)
    )
    assert measured == wanted
    images = read_images(found)
    assert len(images) == 5
    for key, pixels in read_images(expected).items():
        np.testing.assert_array_equal(images[key], pixels)


@pytest.mark.slow
def test_batches_are_halved_until_they_fit(
    cache: Path, decode: Decode, latentmill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_images(decode(cache, "one"))
    monkeypatch.setattr("jobs.resources.CPU_BATCH", 8)
    run, sizes, largest = render.RenderWorker._run, list[int](), 2

    def run_in_memory(self: render.RenderWorker, latents: torch.Tensor, size: int) -> torch.Tensor:
        if len(latents) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(latents))
        return run(self, latents, size)

    monkeypatch.setattr(render.RenderWorker, "_run", run_in_memory)
    check_pixels(read_images(decode(cache, "p")), expected)
    assert sum(sizes) == 18
    largest = 0
    code, _, err = latentmill("decode", cache, "--to", tmp_path / "q", "--workers", 0)
    assert code == 1
    assert "out of memory on cpu while decoding a single image of 64x64 pixels" in err
