"""Jobs with `--flip both`: encode, verify, stats, decode, retry, and the reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentmill import Cache
from latentmill.errors import UsageError
from pipeline.records import EncodedImage
from tests.conftest import encoded, smooth

Command = Callable[..., tuple[int, str, str]]
Run = Callable[..., Path]


@pytest.fixture
def encode(latentmill: Command, micro_vae: Path, tmp_path: Path) -> Run:
    def run(source: Path, name: str, *more: object) -> Path:
        argv = ["encode", source, "--to", tmp_path / name, "--vae", micro_vae, "--resolution", 64, "--workers", 0]
        code, _, err = latentmill(*argv, "--max-reject-rate", 1, *more)
        assert code == 0, err
        return tmp_path / name

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of images that are 35 pixels too wide, so that the margins of a center crop differ by one."""
    (tmp_path / "s").mkdir()
    for number in range(3):
        (tmp_path / f"s/{number}.png").write_bytes(encoded(smooth(number, 64, 99), "PNG"))
    return tmp_path / "s"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    cache = Cache.open(str(folder))
    return [row for file in cache.files() for row in cache.rows(file)]


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_the_second_latent_is_that_of_the_mirrored_crop(
    encode: Run, latentmill: Command, source: Path, tmp_path: Path, container: str
) -> None:
    """Mirrored after the crop: before an odd one, mirroring would move the image by one pixel."""
    (tmp_path / "mirrored").mkdir()
    for number in range(3):
        crop = smooth(number, 64, 99)[:, 17:81]
        (tmp_path / f"mirrored/{number}.png").write_bytes(encoded(np.ascontiguousarray(crop[:, ::-1]), "PNG"))
    plain, mirrored = encode(source, "plain"), encode(tmp_path / "mirrored", "c-mirrored")
    both = encode(source, "both", "--flip", "both", "--format", container)
    rows = rows_of(both)
    assert [row["latent"] for row in rows] == [row["latent"] for row in rows_of(plain)]
    assert [row["latent_flipped"] for row in rows] == [row["latent"] for row in rows_of(mirrored)]
    assert [(row["flipped"], row["shape"]) for row in rows] == [(False, [4, 8, 8])] * 3
    code, out, _ = latentmill("verify", both, "--recount", "--reencode", 3)
    assert code == 0, out
    assert latentmill("stats", both)[1].startswith("6 latents of 3 images and their mirror images, raw, made by ")
    values = torch.cat([torch.stack([to_tensor(row, name) for row in rows]) for name in ("latent", "latent_flipped")])
    stats = json.loads((both / "stats.json").read_text())
    assert (stats["count"], stats["buckets"]["64x64"]["count"]) == (3, 3)
    assert stats["mean"] == pytest.approx(values.double().mean(dim=(0, 2, 3)).tolist())


def to_tensor(row: dict[str, Any], name: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(row[name]), dtype=torch.float16).reshape(row["shape"])


def test_files_do_not_depend_on_the_batch_size(encode: Run, source: Path) -> None:
    digests = {
        json.loads((encode(source, f"c{size}", "--flip", "both", "--batch-size", size) / "stats.json").read_text())[
            "digest"
        ]
        for size in (2, 3)
    }
    assert len(digests) == 1


def test_the_reader_gives_both_latents(encode: Run, source: Path) -> None:
    cache = Cache.open(str(encode(source, "c", "--flip", "both", "--store", "moments")))
    (row, *_) = cache.rows(cache.files()[0])
    raw, model = cache.raw_latent(row, flipped=True), cache.model_latent(row, flipped=True)
    assert torch.equal(raw, to_tensor(row, "latent_flipped"))
    assert not torch.equal(raw, cache.raw_latent(row))
    assert torch.equal(model, cache.scaling.to_model(raw[:4]))
    columns = ["latent_flipped", "shape", "dtype"]
    (row, *_) = cache.rows(cache.files()[0], columns=columns)
    assert torch.equal(cache.raw_latent(row, flipped=True), raw)


def test_a_cache_without_flipped_latents_is_an_error(encode: Run, latentmill: Command, source: Path) -> None:
    folder = encode(source, "c")
    cache = Cache.open(str(folder))
    (row, *_) = cache.rows(cache.files()[0])
    for read in (cache.raw_latent, cache.model_latent):
        with pytest.raises(UsageError, match=rf"the cache {folder} has no flipped latents; .* with --flip both"):
            read(row, flipped=True)
    options = ["--vae", cache.info.vae.reference, "--flip", "both", "--workers", 0]
    code, _, err = latentmill("encode", source, "--to", folder, *options)
    assert code == 2
    assert "was made with --flip none, this command has --flip both" in err


def test_a_retry_encodes_both_latents(encode: Run, latentmill: Command, source: Path) -> None:
    size = sorted(path.stat().st_size for path in source.iterdir())[1]
    cache = encode(source, "c", "--flip", "both", "--input-limit", f"image_bytes={size}")
    assert latentmill("retry", cache, "--workers", 0)[0] == 0
    assert sorted(row["key"] for row in rows_of(cache) if len(row["latent_flipped"]) == 512) == ["0", "1", "2"]
    code, out, _ = latentmill("verify", cache, "--recount", "--reencode", 3)
    assert code == 0, out


def test_verify_finds_a_flipped_latent_of_another_image(
    encode: Run, latentmill: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(EncodedImage, "with_flipped", lambda self, flipped: EncodedImage(self.latent, False, self.latent))
        cache = encode(source, "c", "--flip", "both")
    assert latentmill("verify", cache)[0] == 0
    code, out, _ = latentmill("verify", cache, "--reencode", 1)
    assert code == 1
    assert "0 is encoded to another latent_flipped: it differs by " in out


def test_verify_checks_the_values_of_flipped_latents(encode: Run, latentmill: Command, source: Path) -> None:
    """In a tar, whose values have no checksum."""
    cache = encode(source, "c", "--flip", "both", "--format", "webdataset")
    (path,) = (cache / "data").iterdir()
    data, (row, *_) = path.read_bytes(), rows_of(cache)
    start = data.index(row["latent_flipped"])
    for value, finding in ((0x7C00, "the latent_flipped of 0 is not finite"), (0x4000, "the statistics of its rows")):
        path.write_bytes(data[:start] + value.to_bytes(2, "little") + data[start + 2 :])
        code, out, _ = latentmill("verify", cache)
        assert (code, finding in out) == (1, True), out
